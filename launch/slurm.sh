#!/usr/bin/env bash
# SLURM: a run on NODES nodes of GPUS GPUs each, requeued before its time limit until it is finished.
#
#   launch/slurm.sh run --config=configs/livo.py --workdir=runs/livo [--config.FIELD=VALUE ...]
#   launch/slurm.sh list      the job and its state
#   launch/slurm.sh logs      follows runs/NAME.log
#   launch/slurm.sh stop      lets the run save and ends the job; run with the same arguments goes on
#
# NODES and GPUS are needed by run; NAME (livo) tells runs apart, each GPU's process gets CPUS_PER_GPU (8). All else
# sbatch reads from its own variables: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, ... DRY_RUN=1 prints the
# commands and executes none.

set -euo pipefail
[[ ${1:-} == job ]] || cd "$(dirname "$0")/.." # sbatch executes a copy, in the directory that it was called in
. launch/common.sh

command=${1:-}
shift || usage
export NAME=${NAME:-livo} CPUS_PER_GPU=${CPUS_PER_GPU:-8} # sbatch hands them to the job

case $command in
  run)
    need NODES GPUS
    run mkdir -p runs
    # jax.distributed gives each task one GPU of its node. A second job of the same name waits for the first. The
    # training's tasks get SIGTERM 5 minutes before the time limit.
    run sbatch --job-name="$NAME" --dependency=singleton --nodes="$NODES" --gpus-per-node="$GPUS" \
      --ntasks-per-node="$GPUS" --cpus-per-task="$CPUS_PER_GPU" --requeue --signal=TERM@300 \
      --output="runs/$NAME.log" --open-mode=append launch/slurm.sh job "$@"
    [[ -z ${DRY_RUN:-} ]] || launch/slurm.sh job "$@"
    ;;
  job) # what sbatch starts on the first node
    run rm -f "runs/$NAME.stop"
    status=0
    run srun --cpus-per-task="$CPUS_PER_GPU" python -u run.py --distributed=auto "$@" || status=$?
    # 143: it was stopped before it was finished, and has saved.
    [[ $status != 143 || -e runs/$NAME.stop ]] || run scontrol requeue "$SLURM_JOB_ID"
    exit "$status"
    ;;
  list) run squeue --me --name="$NAME" ;;
  logs) run tail -n 100 -F "runs/$NAME.log" ;;
  stop)
    run touch "runs/$NAME.stop"
    run scancel --me --name="$NAME" --state=PENDING
    run scancel --me --name="$NAME" --state=RUNNING --signal=TERM
    ;;
  *) usage ;;
esac
