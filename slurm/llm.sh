#!/usr/bin/env bash
# One run of a larger backbone on several nodes:
#   MODEL=/models/large DS_CONFIG=ds_configs/zero3.json sbatch --nodes=4 --gpus-per-node=8 slurm/llm.sh --task_name mnli
# slurm/README.md explains the rest.
#SBATCH --job-name=prunadapt-llm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
set -uo pipefail
cd -- "${PROJECT_DIR:-$SLURM_SUBMIT_DIR}" || exit 2
[[ -f slurm/common.sh ]] || { echo "error: submit from the project's folder, or set PROJECT_DIR to it" >&2; exit 2; }
source slurm/common.sh

[[ -n "${MODEL:-}" ]] || fail "MODEL is not set: name a hub id or a folder that all nodes see"
job_setup
common_options
# With a large backbone, activations are the first to exceed the memory.
train "${OUTPUT_DIR:-outputs/$SLURM_JOB_ID}" "${options[@]}" --gradient_checkpointing "$@"
((code != 75)) || requeue_and_exit
exit "$code"
