#!/usr/bin/env bash
# Real GLUE with the sample encoder: three methods, same epochs. Reports go to benchmarks/results/.
#   [TASKS="mrpc stsb"] benchmarks/first_figures.sh DATA_DIR [EPOCHS] [RANKS]
set -euo pipefail
data=${1:?a folder with the official GLUE TSVs}; epochs=${2:-2}; ranks=${3:-2}
root=$(cd "$(dirname "$0")/.." && pwd)
for task in ${TASKS:-mrpc stsb}; do
  for method in prunadapt lora tmp; do
    results="$root/benchmarks/results/first_figures/$task-$method.json"
    [ -f "$results" ] && continue
    sparsity=(); [ "$method" = prunadapt ] && sparsity=(--target_sparsity 0.5)
    deepspeed --num_accelerators "$ranks" "$root/launcher/train.py" --ds_config "$root/ds_configs/zero3.json" \
      --model_name_or_path sample --task_name "$task" --data_dir "$data" --method "$method" "${sparsity[@]}" \
      --num_train_epochs "$epochs" --output_dir "$root/outputs/first_figures/$task-$method"
    mkdir -p "$(dirname "$results")"
    cp "$root/outputs/first_figures/$task-$method/report.json" "$results"
  done
done
