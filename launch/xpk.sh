#!/usr/bin/env bash
# TPUs on GKE through XPK: a cluster, an image, and runs as workloads.
#
#   launch/xpk.sh create --spot|--on-demand|... [FLAGS]   makes the cluster, with further flags of XPK's
#   launch/xpk.sh image                                   builds IMAGE from this tree and pushes it
#   launch/xpk.sh run --config=configs/livo.py --workdir=gs://BUCKET/RUN [--config.FIELD=VALUE ...]
#   launch/xpk.sh list                                    the cluster's runs and their states
#   launch/xpk.sh logs                                    follows worker WORKER (0)
#   launch/xpk.sh stop                                    lets the run save and removes it; run goes on
#   launch/xpk.sh delete                                  deletes the cluster, which ends the costs
#
# CLUSTER and ZONE are needed; TPU, as v6e-32, by create and run; IMAGE, as REGION-docker.pkg.dev/PROJECT/REPO/livo_jax,
# by image and run. NAME (livo) is the run's, SLICES (1) of TPU it takes, RESTARTS (100) it may have. The project is
# gcloud's. DRY_RUN=1 prints the commands and executes none.

set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

command=${1:-}
shift || usage
NAME=${NAME:-livo}

on_cluster() { # GROUP VERB [FLAGS]
  run xpk "$1" "$2" --cluster="$CLUSTER" --zone="$ZONE" "${@:3}"
}

case $command in
  create)
    need CLUSTER ZONE TPU
    on_cluster cluster create --tpu-type="$TPU" --num-slices="${SLICES:-1}" "$@"
    ;;
  image)
    need IMAGE
    # XPK's pods are privileged and see the node's devices as they are: root's.
    run docker build --file=launch/Dockerfile --build-arg=ACCELERATOR=tpu --build-arg=RUN_AS=root --tag="$IMAGE" .
    run docker push "$IMAGE"
    ;;
  run)
    need CLUSTER ZONE TPU IMAGE
    need_workdir "$@"
    # exec: the training itself gets SIGTERM. XPK starts all pods again after the 143 that it then ends with.
    on_cluster workload create --workload="$NAME" --tpu-type="$TPU" --num-slices="${SLICES:-1}" \
      --docker-image="$IMAGE" --max-restarts="${RESTARTS:-100}" --termination-grace-period-seconds=120 \
      --command="exec python -u run.py --distributed=auto$(printf ' %q' "$@")"
    ;;
  list)
    need CLUSTER ZONE
    on_cluster workload list
    ;;
  logs)
    run kubectl logs --follow --prefix --tail=100 \
      --selector="xpk.google.com/workload=$NAME,batch.kubernetes.io/job-completion-index=${WORKER:-0}"
    ;;
  stop)
    need CLUSTER ZONE
    on_cluster workload delete --workload="$NAME" "$@"
    ;;
  delete)
    need CLUSTER ZONE
    on_cluster cluster delete "$@"
    ;;
  *) usage ;;
esac
