#!/usr/bin/env bash
# The batch side of every job: one torchrun agent a node; ahead of the time limit a checkpoint, then back to the queue.
# Called by the .sbatch files: job.sh ENTRY_POINT [OVERRIDE]...
# submit.py may set JOB_SETUP (shell lines to run here first) and JOB_SRUN_FLAGS (shell words).
set -euo pipefail

cd "$SLURM_SUBMIT_DIR"
entry_point=$1
shift

# Modules and activation scripts often read unset variables.
set +u
eval "${JOB_SETUP:-}"
set -u
declare -a srun_flags=()
eval "srun_flags=(${JOB_SRUN_FLAGS:-})"
if [[ -d .venv/bin ]]; then
  export PATH="$PWD/.venv/bin:$PATH"
fi

gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-}}
gpus=${gpus##*:} # "h100:8" is 8
if [[ -z $gpus ]]; then
  echo "No GPU was allocated: pass --gpus-per-node to sbatch, or set it in recipes/cluster/." >&2
  exit 2
fi
nodes=$SLURM_JOB_NUM_NODES
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first_host=${hosts%%$'\n'*}
# Jobs that share a node meet at ports of their own.
port=$((20000 + SLURM_JOB_ID % 20000))

cpus=${SLURM_CPUS_ON_NODE:-$gpus}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > gpus ? cpus / gpus : 1))}
# srun does not take over sbatch's --cpus-per-task by itself.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

# The job id survives a requeue, so the run finds its checkpoints again.
run_dir="runs/$SLURM_JOB_NAME-$SLURM_JOB_ID"

leaving=false
leave_early() {
  echo "Time limit ahead: saving a checkpoint."
  leaving=true
  interrupted=true
  # Not SIGTERM: srun answers that one by killing its tasks. It forwards SIGUSR1, and node.sh does the rest.
  kill -USR1 "$step" 2> /dev/null || true
}

srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 "${srun_flags[@]}" \
  bash launch/slurm/node.sh \
  --nnodes="$nodes" --nproc-per-node="$gpus" --max-restarts=0 \
  --rdzv-backend=c10d --rdzv-endpoint="$first_host:$port" --rdzv-id="$SLURM_JOB_ID" \
  "$entry_point" "run.dir=$run_dir" "$@" &
step=$!
trap leave_early USR1

# A trapped signal ends `wait` early: only an uninterrupted one brings the status of the step.
interrupted=true
while $interrupted; do
  interrupted=false
  status=0
  wait "$step" || status=$?
done

if ((status != 0)); then
  echo "Training failed with status $status: not requeued." >&2
  exit "$status"
fi
if $leaving; then
  scontrol requeue "$SLURM_JOB_ID"
fi
