#!/usr/bin/env bash
# One run:  sbatch slurm/train.sh --task_name mrpc --target_sparsity 0.6
# slurm/README.md explains the rest.
#SBATCH --job-name=prunadapt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
set -uo pipefail
cd -- "${PROJECT_DIR:-$SLURM_SUBMIT_DIR}" || exit 2
[[ -f slurm/common.sh ]] || { echo "error: submit from the project's folder, or set PROJECT_DIR to it" >&2; exit 2; }
source slurm/common.sh

job_setup
common_options
train "${OUTPUT_DIR:-outputs/$SLURM_JOB_ID}" "${options[@]}" "$@"
((code != 75)) || requeue_and_exit
exit "$code"
