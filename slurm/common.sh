# shellcheck shell=bash
# Sourced by the other templates. Everything that a site has to change is in `site_setup`.
#
# The user's values are only expanded inside double quotes or matched against a pattern: nothing here is evaluated twice.

# Whatever the user's umask, nobody else may write to a job's output.
umask go-w

site_setup() {
    # Modules, containers, network: put your site's lines here, e.g.
    #   module load cuda/12.4
    #   SRUN_OPTIONS="--container-image=/images/train.sqsh --container-mounts=$PWD --container-workdir=$PWD" VENV=none
    #   SRUN_OPTIONS="apptainer exec --nv --pwd $PWD /images/train.sif" VENV=none
    #   export NCCL_SOCKET_IFNAME=ib0
    local environment="${VENV:-.venv}"
    if [[ -f "$environment/bin/activate" ]]; then
        # shellcheck source=/dev/null
        source "$environment/bin/activate"
    elif [[ -n "${VENV:-}" && "$VENV" != none ]]; then
        fail "VENV=$VENV: has no bin/activate; of conda, activate it in site_setup and set VENV=none"
    fi
}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# Split $1 at spaces, tabs and newlines into the array `words`.
split_words() {
    words=()
    local IFS=$' \t\n'
    read -r -d '' -a words <<<"$1" || true
}

# Set the number of ranks per node, the threads, and where the ranks meet; check that this is a SLURM job.
job_setup() {
    [[ -n "${SLURM_JOB_ID:-}" ]] || fail "this is a SLURM job: submit it with sbatch"
    site_setup
    # Every GPU of a node gets a rank; a node without GPUs gets one, or RANKS_PER_NODE.
    local gpus="${SLURM_GPUS_ON_NODE:-1}"
    [[ "$gpus" != 0 ]] || gpus=1
    ranks_per_node="${RANKS_PER_NODE:-$gpus}"
    [[ "${MAX_REQUEUES:-100}" =~ ^(0|[1-9][0-9]{0,8})$ ]] || fail "MAX_REQUEUES='$MAX_REQUEUES': must be a whole number"
    [[ "$ranks_per_node" =~ ^[1-9][0-9]{0,3}$ ]] || fail "RANKS_PER_NODE='$ranks_per_node': must be a whole number of at least 1"
    cpus_per_rank=$((${SLURM_CPUS_ON_NODE:-1} / ranks_per_node))
    ((cpus_per_rank > 0)) || cpus_per_rank=1
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$cpus_per_rank}"
    # The hosts of a large job do not all start within the default of 25 seconds.
    export PRUNADAPT_RENDEZVOUS_SECONDS="${PRUNADAPT_RENDEZVOUS_SECONDS:-180}"
    export PYTHONUNBUFFERED=1
    # If they are unset, the program uses the step's first host and a port derived from the ids of job and step.
    if [[ -n "${MASTER_ADDR:-}" ]]; then export MASTER_ADDR; else unset MASTER_ADDR; fi
    if [[ -n "${MASTER_PORT:-}" ]]; then export MASTER_PORT; else unset MASTER_PORT; fi
    unset SLURM_GPUS_PER_NODE # the template's, not the job's: a step would not take more, even where --gres gave more
    split_words "${SRUN_OPTIONS:-}"
    srun_options=("${words[@]}")
    # TERM and USR1 are meant for the ranks; the script lets the ranks end, then decides whether to requeue the job.
    trap : TERM USR1
}

# Put the options that environment variables stand for into the array `options`. The template's arguments come after them.
common_options() {
    options=()
    [[ -z "${DS_CONFIG:-}" ]] || options+=(--ds_config "$DS_CONFIG")
    [[ -z "${CHECKPOINT_STEPS:-}" ]] || options+=(--checkpoint_steps "$CHECKPOINT_STEPS")
    [[ -z "${MODEL:-}" ]] || options+=(--model_name_or_path "$MODEL")
    [[ -z "${SPARSITY:-}" ]] || options+=(--target_sparsity "$SPARSITY")
    [[ -z "${DATA_DIR:-}" ]] || options+=(--data_dir "$DATA_DIR")
}

# Whether another live run owns the folder $1. Its lock ends with the process, however that ends.
is_taken() {
    [[ -e "$1/.lock" ]] && command -v flock >/dev/null || return
    flock --shared --nonblock "$1/.lock" true
    (($? == 1)) # any other failure means that this file system has no locks
}

# train OUTPUT_DIR [OPTION...]: one run on all nodes of the job. Sets `code` and `output`, writes OUTPUT_DIR/log.txt and exit_code.
train() {
    output="$1"
    shift
    # A container need not start in this folder: the program is told the whole path.
    local word folder="$output"
    [[ "$folder" == /* ]] || folder="$PWD/$folder"
    for word in "$@"; do
        [[ "$word" != --output_dir && "$word" != --output_dir=* ]] || fail "$word: a job names it itself, to find it again; set OUTPUT_DIR (of glue_all.sh OUTPUT_ROOT)"
    done
    # A requeued job goes on from its own checkpoint, if it got so far, even if its arguments say how to begin.
    local own=("$output"/checkpoints/step-*)
    if ((${SLURM_RESTART_COUNT:-0} > 0)) && [[ -e "${own[0]}" ]]; then set -- "$@" --resume auto; fi
    mkdir -p -- "$output" || fail "$output cannot be made: set OUTPUT_DIR (of glue_all.sh OUTPUT_ROOT) to a folder that can"
    if is_taken "$output"; then
        code=2 # as the program would return; log.txt and exit_code in the folder belong to the other run
        echo "error: $output: another run is writing there; wait for it, or end it" >&2
        return
    fi
    printf 'running\n' >"$output/exit_code"
    printf 'start of job %s\n' "$SLURM_JOB_ID" >>"$output/log.txt" # the table looks for errors below the last such line
    # --wait: if one rank ends alone, the others wait for it, on GPUs forever.
    # In the foreground: bash handles a signal only after the step has ended, and the last line is in the log, which the table
    # reads, before the script continues.
    srun --nodes="$SLURM_NNODES" --ntasks-per-node="$ranks_per_node" --ntasks="$((SLURM_NNODES * ranks_per_node))" \
        --cpus-per-task="$cpus_per_rank" --kill-on-bad-exit=0 --wait=120 "${srun_options[@]}" \
        python -m prunadapt_ds train "$@" --output_dir "$folder" </dev/null 2>&1 |
        (trap '' TERM USR1 && exec tee -a -- "$output/log.txt")
    code=${PIPESTATUS[0]}
    # Ranks that have not installed their signal handlers yet are killed by the signal that asks them to stop.
    ((code != 128 + $(kill -l USR1) && code != 128 + $(kill -l TERM))) || code=75
    printf '%s\n' "$code" >"$output/exit_code"
    echo "$output: exit code $code"
}

# Exit code 75: the run stopped on request and wants to be restarted; there is a checkpoint if there were steps to save.
requeue_and_exit() {
    local job="$SLURM_JOB_ID" restarts="${SLURM_RESTART_COUNT:-0}" again
    again="submit it again with OUTPUT_DIR=$(printf %q "$output") and --resume auto"
    [[ -z "${SLURM_ARRAY_JOB_ID:-}" ]] || job="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" again="submit it again with --resume auto"
    # Cancelling sends TERM too, and SLURM would requeue a job that is being cancelled.
    if [[ "$(scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null)" =~ JobState=(CANCELLED|COMPLETING) ]]; then
        echo "job $job was cancelled; $again to go on from its checkpoint" >&2
    elif ((restarts >= ${MAX_REQUEUES:-100})); then
        echo "job $job was requeued $restarts times, which is MAX_REQUEUES; it stays stopped" >&2
    elif scontrol requeue "$job"; then
        echo "job $job: requeued to go on from its checkpoint"
        # SLURM ends this script now. If it exited first, SLURM could take that for the end of the requeued job.
        sleep 60 &
        wait $!
    else
        echo "job $job could not be requeued; $again to go on from its checkpoint" >&2
    fi
    exit 75
}
