#!/usr/bin/env bash
# One machine: a run in the background, which outlives the terminal. One process drives all GPUs.
#
#   launch/gpu_box.sh run --config=configs/livo.py --workdir=runs/livo [--config.FIELD=VALUE ...]
#   launch/gpu_box.sh logs      follows runs/NAME.log
#   launch/gpu_box.sh stop      lets the run save, and waits for its end; run with the same arguments goes on
#
# NAME (livo) tells runs apart. DRY_RUN=1 prints the commands and executes none.

set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

command=${1:-}
shift || usage
run=runs/${NAME:-livo}

running() { # prints the run's process
  pgrep --pidfile "$run.pid" --full run.py 2>/dev/null
}
pid=$(running) || pid=

case $command in
  run)
    [[ -z $pid ]] || fail "$run goes on as process $pid: launch/gpu_box.sh stop ends it, another NAME starts beside it"
    run mkdir -p runs
    # shellcheck disable=SC2016  # expanded by the inner shell
    run bash -c 'nohup "$@" >>"$0.log" 2>&1 </dev/null & echo $! >"$0.pid"' "$run" python -u run.py "$@"
    ;;
  logs) run tail -n 100 -F "$run.log" ;;
  stop)
    [[ -n $pid ]] || fail "no run goes on here as $run"
    run kill -TERM "$pid"
    while [[ -z ${DRY_RUN:-} ]] && running >/dev/null; do sleep 1; done
    ;;
  *) usage ;;
esac
