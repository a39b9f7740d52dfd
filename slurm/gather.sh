#!/usr/bin/env bash
# Submitted by glue_all.sh; by hand:  OUTPUT_ROOT=outputs/glue bash slurm/gather.sh
#SBATCH --job-name=glue-table
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=00:10:00
#SBATCH --output=slurm-%x-%j.out
set -uo pipefail
cd -- "${PROJECT_DIR:-${SLURM_SUBMIT_DIR:-$PWD}}" || exit 2
[[ -f slurm/common.sh ]] || { echo "error: start this in the project's folder, or set PROJECT_DIR to it" >&2; exit 2; }
source slurm/common.sh

site_setup
runner=()
if [[ -n "${SLURM_JOB_ID:-}" ]]; then # run where the runs did: in a container, if the site's jobs use one
    split_words "${SRUN_OPTIONS:-}"
    runner=(srun --nodes=1 --ntasks=1 "${words[@]}")
    # This job inherits the array's resource requests in its environment, and srun would request them again.
    unset "${!SLURM_GPUS@}" "${!SLURM_TRES@}" "${!SLURM_MEM@}" SLURM_GRES SLURM_CPUS_PER_TASK
fi
split_words "${TASKS:-cola sst2 mrpc stsb qqp mnli qnli rte wnli}"
tasks=("${words[@]}")
split_words "${SEEDS:-0}"
exec "${runner[@]}" python -m prunadapt_ds glue-table "${OUTPUT_ROOT:-outputs/glue}" --tasks "${tasks[@]}" --seeds "${words[@]}"
