#!/usr/bin/env bash
# All of GLUE, and one table at the end:  DATA_DIR=/data/glue SEEDS="0 1 2" sbatch slurm/glue_all.sh
# An array job: elements 0 to N share all cells (task, seed) among them; in any other array, each runs the cell of its number.
# The first element submits gather.sh, which starts when all have ended. slurm/README.md explains the rest.
#SBATCH --job-name=glue
#SBATCH --array=0-8
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
set -uo pipefail
cd -- "${PROJECT_DIR:-$SLURM_SUBMIT_DIR}" || exit 2
[[ -f slurm/common.sh ]] || { echo "error: submit from the project's folder, or set PROJECT_DIR to it" >&2; exit 2; }
source slurm/common.sh

known=" cola sst2 mrpc stsb qqp mnli qnli rte wnli "
split_words "${TASKS:-$known}"
tasks=("${words[@]}")
split_words "${SEEDS:-0}"
seeds=("${words[@]}")
((${#tasks[@]} && ${#seeds[@]})) || fail "TASKS and SEEDS must name at least one each"
for task in "${tasks[@]}"; do
    [[ "$task" =~ ^[a-z0-9]+$ && "$known" == *" $task "* ]] || fail "$(printf 'TASKS: there is no task %q; known are%s' "$task" "$known")"
done
for seed in "${seeds[@]}"; do
    [[ "$seed" =~ ^(0|[1-9][0-9]{0,8})$ ]] || fail "$(printf 'SEEDS: %q is not a whole number' "$seed")"
done

job_setup
root="${OUTPUT_ROOT:-outputs/glue}"
mkdir -p -- "$root" || fail "OUTPUT_ROOT=$root cannot be made"
cells=$((${#tasks[@]} * ${#seeds[@]}))
# Indices from 0 without gaps share all cells. With gaps, or another first index, the user has chosen single cells.
if ((SLURM_ARRAY_TASK_MIN == 0 && SLURM_ARRAY_TASK_MAX == SLURM_ARRAY_TASK_COUNT - 1)); then
    stride=$SLURM_ARRAY_TASK_COUNT
else
    stride=$cells
    ((SLURM_ARRAY_TASK_ID < cells)) || fail "--array: there is no cell $SLURM_ARRAY_TASK_ID; TASKS and SEEDS make $cells, from 0"
fi

marker="$root/.gather-$SLURM_ARRAY_JOB_ID"
if [[ "$SLURM_ARRAY_TASK_ID" == "$SLURM_ARRAY_TASK_MIN" && ! -e "$marker" ]]; then
    # The second job needs only these values: words that were checked above, and a folder.
    if gather="$(TASKS="${tasks[*]}" SEEDS="${seeds[*]}" OUTPUT_ROOT="$root" \
        sbatch --parsable --dependency="afterany:$SLURM_ARRAY_JOB_ID" --partition="${GATHER_PARTITION:-$SLURM_JOB_PARTITION}" \
        ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"} ${SLURM_JOB_QOS:+--qos="$SLURM_JOB_QOS"} \
        --output="$root/gather-%j.out" slurm/gather.sh)"; then
        printf '%s\n' "$gather" >"$marker" # so that a requeued element does not submit it again; if sbatch failed, it does
    else
        printf 'no job to gather; afterwards run: TASKS=%q SEEDS=%q OUTPUT_ROOT=%q bash slurm/gather.sh\n' \
            "${tasks[*]}" "${seeds[*]}" "$root" >&2
    fi
fi

common_options
worst=0
for ((cell = SLURM_ARRAY_TASK_ID; cell < cells; cell += stride)); do
    task="${tasks[cell % ${#tasks[@]}]}" seed="${seeds[cell / ${#tasks[@]}]}"
    echo "cell $cell: $task, seed $seed"
    train "$root/$task/seed$seed" "${options[@]}" --task_name "$task" --seed "$seed" "$@"
    ((code != 75)) || requeue_and_exit
    ((code == 0)) || worst=$code
done
exit "$worst"
