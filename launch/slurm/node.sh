#!/usr/bin/env bash
# The node side of a job: runs `torchrun "$@"` and, on SIGUSR1, asks its workers by SIGTERM to save and leave.
# torchrun itself is spared: told to stop, it kills the workers after a while and reports a failure.
set -euo pipefail

# For a SIGTERM from elsewhere (preemption), which torchrun does pass on: seconds to save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

# Ignored here means ignored in torchrun and its workers too, to whichever process Slurm delivers the signal.
(
  trap '' USR1
  exec torchrun "$@"
) &
agent=$!

interrupted=true
stop_workers() {
  interrupted=true
  local workers=()
  read -r -a workers < "/proc/$agent/task/$agent/children" || true
  if ((${#workers[@]})); then
    kill -TERM "${workers[@]}" 2> /dev/null || true
  fi
}
trap stop_workers USR1
trap 'interrupted=true' TERM

# A trapped signal ends `wait` early: only an uninterrupted one brings torchrun's status.
while $interrupted; do
  interrupted=false
  status=0
  wait "$agent" || status=$?
done
(exit "$status")
