#!/usr/bin/env bash
# A TPU pod slice: a queued resource, and a run on all of its workers.
#
#   launch/tpu_pod.sh create [--spot] [FLAGS]   asks for the slice, with further flags of gcloud's
#   launch/tpu_pod.sh status                    ACTIVE: it is there; SUSPENDED, FAILED: delete it
#   launch/tpu_pod.sh install                   copies this tree to all workers, with what it needs
#   launch/tpu_pod.sh ssh 'COMMAND'             does this on all workers, in the home directory
#   launch/tpu_pod.sh run --config=configs/livo.py --workdir=gs://BUCKET/RUN [--config.FIELD=VALUE ...]
#   launch/tpu_pod.sh logs                      follows worker WORKER (0)
#   launch/tpu_pod.sh stop                      lets the run save, and waits for its end; run goes on
#   launch/tpu_pod.sh delete                    ends the costs
#
# ZONE is needed, and TPU, as v6e-32, by create. NAME (livo) is the slice's, RUNTIME its image where the usual one of
# its kind will not do. The project is gcloud's. DRY_RUN=1 prints the commands and executes none.

set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

command=${1:-}
shift || usage
NAME=${NAME:-livo}

workers() { # WORKERS COMMAND
  run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"
}

queued() { # VERB [FLAGS]
  run gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"
}

# A worker starts, follows and stops its process as a single machine does.
box="cd livo_jax && . .venv/bin/activate && launch/gpu_box.sh"

case $command in
  create)
    need ZONE TPU
    case $TPU in
      v6e-*) image=v2-alpha-tpuv6e ;;
      v5p-*) image=v2-alpha-tpuv5 ;;
      v5litepod-*) image=v2-alpha-tpuv5-lite ;;
      v[234]-*) image=tpu-ubuntu2204-base ;;
      *) image= ;;
    esac
    image=${RUNTIME:-$image}
    [[ -n $image ]] || fail "TPU=$TPU: name a v2, v3, v4, v5litepod, v5p or v6e slice, as v6e-32, or set RUNTIME"
    queued create --node-id="$NAME" --accelerator-type="$TPU" --runtime-version="$image" "$@"
    ;;
  status)
    need ZONE
    queued describe --format='value(state.state)'
    ;;
  install)
    need ZONE
    archive=${TMPDIR:-/tmp}/livo_jax-$NAME.tar.gz
    run tar --exclude-vcs --exclude='./.venv*' --exclude=./runs --exclude=__pycache__ -czf "$archive" .
    run gcloud compute tpus tpu-vm scp "$archive" "$NAME:livo_jax.tar.gz" --zone="$ZONE" --worker=all
    # The images' own Python may be older than what the project needs: uv brings one.
    workers all "mkdir -p livo_jax && tar -xzf livo_jax.tar.gz -C livo_jax && cd livo_jax &&\
 python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python=3.12 &&\
 python3 -m uv pip install --quiet 'jax[tpu]' gcsfs -r requirements.txt"
    ;;
  ssh)
    need ZONE
    [[ $# == 1 ]] || fail "ssh takes one argument, the command in quotes"
    workers all "$1"
    ;;
  run)
    need ZONE
    need_workdir "$@"
    workers all "$box run --distributed=auto$(printf ' %q' "$@")"
    ;;
  logs)
    need ZONE
    workers "${WORKER:-0}" "$box logs"
    ;;
  stop)
    need ZONE
    workers all "$box stop"
    ;;
  delete)
    need ZONE
    queued delete --force "$@"
    ;;
  *) usage ;;
esac
