"""launch/: the commands that each script prints and executes. No cloud's or cluster's own command is called here."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = ("tpu_pod.sh", "xpk.sh", "slurm.sh", "gpu_box.sh")
TOOLS = "gcloud xpk docker kubectl sbatch srun scancel squeue scontrol tar python tail".split()
# Records its words. sbatch starts the job, as SLURM would; srun and python do what SRUN and PYTHON say.
FAKE = r"""#!/usr/bin/env bash
printf '%s\0' "${0##*/}" "$@" $'\1' >>"$CALLS"
case ${0##*/} in
  sbatch) while [[ $1 == -* ]]; do shift; done; SLURM_JOB_ID=7 "$@" ;;
  srun) eval "${SRUN:-}" ;;
  python) eval "${PYTHON:-}" ;;
esac
"""
TPU = dict(ZONE="us-east5-b", TPU="v6e-32")
GKE = TPU | dict(CLUSTER="lab", IMAGE="reg/livo_jax:1")
RUN = "--config=configs/livo.py --workdir=gs://b/r"
AWKWARD = ["--prompt=a b 'c' \"d\"", "--value=$HOME $(id) `id` $$ {x} \\ * ; & é", "--out="]


@pytest.fixture
def launch(tmp_path):
    """launch(script, *args, **settings) executes it in a copy of launch/, with fakes before the real commands."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "fake").write_text(FAKE)
    (tmp_path / "fake").chmod(0o755)
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(tmp_path / "fake")
    tree = shutil.copytree(ROOT / "launch", tmp_path / "tree" / "launch")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def run(script, *args, **settings):
        environment = dict(PATH=path, CALLS=str(tmp_path / "calls"), TMPDIR="/tmp") | settings
        command = [f"./{script}", *args]
        return subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True)

    return run


def calls(tmp_path, last=None):
    """The words of each command that was called; waits until the last one is `last`."""
    for _ in range(100):
        text = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
        found = [call.split("\0")[:-1] for call in text.split("\1\0")[:-1]]
        if last is None or found and found[-1][0] == last:
            break
        time.sleep(0.1)
    return found


SSH = "gcloud compute tpus tpu-vm ssh livo --zone=us-east5-b"
BOX = "cd livo_jax && . .venv/bin/activate && launch/gpu_box.sh"
XPK = "--cluster=lab --zone=us-east5-b"
COMMANDS = [
    ("tpu_pod.sh create --spot", TPU, [
        "gcloud compute tpus queued-resources create livo --zone=us-east5-b --node-id=livo --accelerator-type=v6e-32"
        " --runtime-version=v2-alpha-tpuv6e --spot",
    ]),
    ("tpu_pod.sh create", dict(ZONE="z", TPU="v5litepod-16", NAME="big"), [
        "gcloud compute tpus queued-resources create big --zone=z --node-id=big --accelerator-type=v5litepod-16"
        " --runtime-version=v2-alpha-tpuv5-lite",
    ]),
    ("tpu_pod.sh create", dict(ZONE="z", TPU="v9-8", RUNTIME="new"), [
        "gcloud compute tpus queued-resources create livo --zone=z --node-id=livo --accelerator-type=v9-8"
        " --runtime-version=new",
    ]),
    ("tpu_pod.sh status", TPU, [
        "gcloud compute tpus queued-resources describe livo --zone=us-east5-b '--format=value(state.state)'",
    ]),
    ("tpu_pod.sh install", TPU, [
        "tar --exclude-vcs '--exclude=./.venv*' --exclude=./runs --exclude=__pycache__ -czf /tmp/livo_jax-livo.tar.gz"
        " .",
        "gcloud compute tpus tpu-vm scp /tmp/livo_jax-livo.tar.gz livo:livo_jax.tar.gz --zone=us-east5-b --worker=all",
        f"{SSH} --worker=all '--command=mkdir -p livo_jax && tar -xzf livo_jax.tar.gz -C livo_jax && cd livo_jax &&"
        " python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python=3.12 &&"
        r" python3 -m uv pip install --quiet '\''jax[tpu]'\'' gcsfs -r requirements.txt'",
    ]),
    ("tpu_pod.sh ssh uptime", TPU, [f"{SSH} --worker=all --command=uptime"]),
    (f"tpu_pod.sh run {RUN}", TPU, [f"{SSH} --worker=all '--command={BOX} run --distributed=auto {RUN}'"]),
    ("tpu_pod.sh logs", TPU | dict(WORKER="3"), [f"{SSH} --worker=3 '--command={BOX} logs'"]),
    ("tpu_pod.sh stop", TPU, [f"{SSH} --worker=all '--command={BOX} stop'"]),
    ("tpu_pod.sh delete --quiet", TPU, [
        "gcloud compute tpus queued-resources delete livo --zone=us-east5-b --force --quiet",
    ]),
    ("xpk.sh create --spot", GKE, [f"xpk cluster create {XPK} --tpu-type=v6e-32 --num-slices=1 --spot"]),
    ("xpk.sh image", GKE, [
        "docker build --file=launch/Dockerfile --build-arg=ACCELERATOR=tpu --build-arg=RUN_AS=root"
        " --tag=reg/livo_jax:1 .",
        "docker push reg/livo_jax:1",
    ]),
    (f"xpk.sh run {RUN}", GKE | dict(NAME="seed1", SLICES="2", RESTARTS="5"), [
        f"xpk workload create {XPK} --workload=seed1 --tpu-type=v6e-32 --num-slices=2 --docker-image=reg/livo_jax:1"
        " --max-restarts=5 --termination-grace-period-seconds=120"
        f" '--command=exec python -u run.py --distributed=auto {RUN}'",
    ]),
    ("xpk.sh list", GKE, [f"xpk workload list {XPK}"]),
    ("xpk.sh logs", GKE, [
        "kubectl logs --follow --prefix --tail=100"
        " --selector=xpk.google.com/workload=livo,batch.kubernetes.io/job-completion-index=0",
    ]),
    ("xpk.sh stop", GKE, [f"xpk workload delete {XPK} --workload=livo"]),
    ("xpk.sh delete", GKE, [f"xpk cluster delete {XPK}"]),
    (f"slurm.sh run {RUN}", dict(NODES="2", GPUS="4"), [
        "mkdir -p runs",
        "sbatch --job-name=livo --dependency=singleton --nodes=2 --gpus-per-node=4 --ntasks-per-node=4"
        " --cpus-per-task=8 --requeue --signal=TERM@300 --output=runs/livo.log --open-mode=append"
        f" launch/slurm.sh job {RUN}",
        "rm -f runs/livo.stop",
        f"srun --cpus-per-task=8 python -u run.py --distributed=auto {RUN}",
    ]),
    ("slurm.sh list", {}, ["squeue --me --name=livo"]),
    ("slurm.sh logs", dict(NAME="seed1"), ["tail -n 100 -F runs/seed1.log"]),
    ("slurm.sh stop", dict(NAME="seed1"), [
        "touch runs/seed1.stop",
        "scancel --me --name=seed1 --state=PENDING",
        "scancel --me --name=seed1 --state=RUNNING --signal=TERM",
    ]),
    ("gpu_box.sh logs", {}, ["tail -n 100 -F runs/livo.log"]),
]  # fmt: skip


@pytest.mark.parametrize("command, settings, expected", COMMANDS, ids=[c[0] for c in COMMANDS])
def test_dry_run_prints_what_is_executed(command, settings, expected, launch, tmp_path):
    dry = launch(*command.split(), **settings, DRY_RUN="1")
    assert (dry.returncode, dry.stdout.splitlines(), dry.stderr) == (0, expected, "")
    assert not calls(tmp_path) and not (tmp_path / "tree" / "runs").exists()

    (tmp_path / "tree" / "runs").mkdir()  # where slurm.sh stop leaves a file
    real = launch(*command.split(), **settings)
    assert (real.returncode, real.stderr) == (0, "")
    executed = [words for line in expected if (words := shlex.split(line))[0] in TOOLS]
    assert calls(tmp_path) == executed


def remote(call: list[str]) -> str:
    """The command that a call has run on another machine."""
    return next(word.removeprefix("--command=") for word in call if word.startswith("--command="))


def test_arguments_arrive_as_they_were_given(launch, tmp_path):
    worker = tmp_path / "worker" / "livo_jax"
    (worker / ".venv" / "bin").mkdir(parents=True)
    (worker / ".venv" / "bin" / "activate").touch()
    (worker / "launch").mkdir()
    (worker / "launch" / "gpu_box.sh").symlink_to(tmp_path / "fake")
    environment = dict(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", CALLS=str(tmp_path / "calls"))
    workdir = "--workdir=gs://b/r"

    printed = launch("tpu_pod.sh", "run", workdir, *AWKWARD, **TPU, DRY_RUN="1").stdout
    launch("tpu_pod.sh", "run", workdir, *AWKWARD, **TPU)
    (ssh,) = calls(tmp_path)
    assert shlex.split(printed) == ssh
    subprocess.run(["bash", "-c", remote(ssh)], cwd=worker.parent, env=environment, check=True)
    assert calls(tmp_path)[-1] == ["gpu_box.sh", "run", "--distributed=auto", workdir, *AWKWARD]

    launch("xpk.sh", "run", workdir, *AWKWARD, **GKE)
    pod = f"({remote(calls(tmp_path)[-1])}) & wait $!"  # so XPK starts it
    subprocess.run(["bash", "-c", pod], env=environment, check=True)
    assert calls(tmp_path)[-1] == ["python", "-u", "run.py", "--distributed=auto", workdir, *AWKWARD]

    launch("slurm.sh", "run", *AWKWARD, NODES="1", GPUS="1")
    assert calls(tmp_path)[-1][1:] == ["--cpus-per-task=8", "python", "-u", "run.py", "--distributed=auto", *AWKWARD]

    launch("gpu_box.sh", "run", *AWKWARD)
    assert calls(tmp_path, last="python")[-1] == ["python", "-u", "run.py", *AWKWARD]


def test_a_slurm_job_is_requeued_when_it_was_stopped_before_its_end(launch, tmp_path):
    def last(**settings):
        launch("slurm.sh", "run", NODES="1", GPUS="1", **settings)
        return calls(tmp_path)[-1]

    assert last(SRUN="exit 143") == ["scontrol", "requeue", "7"]
    assert last(SRUN="exit 0")[0] == last(SRUN="exit 1")[0] == "srun"
    assert last(SRUN="launch/slurm.sh stop; exit 143")[0] == "scancel"
    assert last(SRUN="exit 143") == ["scontrol", "requeue", "7"]  # a stop holds for the job that it stopped


def test_a_gpu_box_starts_one_run_and_stops_it(launch, tmp_path):
    dry = launch("gpu_box.sh", "run", RUN, DRY_RUN="1").stdout.splitlines()
    assert dry == [
        "mkdir -p runs",
        """bash -c 'nohup "$@" >>"$0.log" 2>&1 </dev/null & echo $! >"$0.pid"' runs/livo python -u run.py """
        f"'{RUN}'",
    ]
    assert not (tmp_path / "tree" / "runs").exists()
    assert launch("gpu_box.sh", "run", PYTHON='exec -a "python run.py" sleep 60').returncode == 0
    pid = int((tmp_path / "tree" / "runs" / "livo.pid").read_text())
    try:
        second = launch("gpu_box.sh", "run")
        assert second.returncode == 1 and f"runs/livo goes on as process {pid}" in second.stderr
        assert launch("gpu_box.sh", "stop", DRY_RUN="1").stdout == f"kill -TERM {pid}\n"
        assert f"process {pid}" in launch("gpu_box.sh", "run").stderr
    finally:
        stopped = launch("gpu_box.sh", "stop")
    assert stopped.returncode == 0
    again = launch("gpu_box.sh", "stop")
    assert again.returncode == 1 and "no run goes on here as runs/livo" in again.stderr


@pytest.mark.parametrize(
    "command, settings, message",
    [
        ("tpu_pod.sh create", {}, "set ZONE TPU: "),
        ("tpu_pod.sh create", dict(ZONE="z", TPU="tpu7x-8"), "TPU=tpu7x-8: name a v2, v3, v4, v5litepod, v5p or v6e"),
        ("tpu_pod.sh delete", dict(ZONE=""), "set ZONE: "),
        ("tpu_pod.sh ssh df -h", TPU, "ssh takes one argument"),
        ("tpu_pod.sh run --config=configs/livo.py", TPU, "add --workdir=gs://BUCKET/RUN"),
        ("xpk.sh run", dict(ZONE="z"), "set CLUSTER TPU IMAGE: "),
        ("xpk.sh run --config=c --config.workdirs=1", GKE, "add --workdir=gs://BUCKET/RUN"),
        ("slurm.sh run", {}, "set NODES GPUS: "),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(command, settings, message, launch, tmp_path):
    process = launch(*command.split(), **settings)
    assert process.returncode == 1 and message in process.stderr
    assert not calls(tmp_path)


@pytest.mark.parametrize("script, args", list(zip(SCRIPTS, ([], ["--help"], ["start"], [""]))))
def test_no_known_command_shows_the_usage(script, args, launch, tmp_path):
    process = launch(script, *args)
    assert process.returncode == 2 and not process.stdout and not calls(tmp_path)
    text = (ROOT / "launch" / script).read_text()
    head = [re.sub("^# ?", "", line) for line in text.partition("\n\n")[0].splitlines()[1:]]
    assert process.stderr.splitlines() == head
    explained = set(re.findall(rf"launch/{script} (\w+)", process.stderr))
    assert explained == set(re.findall(r"^  (\w+)\)", text, re.M)) - {"job"}


def test_the_scripts_are_clean():
    scripts = sorted(f"launch/{path.name}" for path in (ROOT / "launch").glob("*.sh"))
    assert {f"launch/{name}" for name in (*SCRIPTS, "common.sh")} == set(scripts)
    for script in scripts:
        subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")  # of requirements-dev.txt
    process = subprocess.run([shellcheck, "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


def test_the_pages_commands_work(launch, tmp_path):
    page = (ROOT / "launch" / "README.md").read_text()
    shown = set()
    for block in re.findall(r"(?:^    .*\n)+", page, re.M):
        # All but the containers' own commands, and stop, which on a machine without a run says so.
        lines = block.replace("\\\n", " ").splitlines()
        lines = [line for line in lines if re.match(r" +(export|DRY_RUN|launch)", line)]
        shown |= set(re.findall(r"launch/(\w+\.sh \w+)", "\n".join(lines)))
        script = "\n".join(["set -e", "export DRY_RUN=1", *(line for line in lines if "gpu_box.sh stop" not in line)])
        environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
        subprocess.run(["bash", "-c", script], cwd=tmp_path / "tree", env=environment, check=True)
    assert shown == {" ".join(command.split()[:2]) for command, *_ in COMMANDS} | {"gpu_box.sh run", "gpu_box.sh stop"}
    assert not calls(tmp_path)


def test_the_image_holds_what_exists():
    lines = (ROOT / "launch" / "Dockerfile").read_text().splitlines()
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / name).exists() for name in allowed)
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1] if word[:2] != "--"]
    assert copied == ["requirements.txt", "."] and "requirements.txt" in allowed
    assert {"run.py", "configs", "livo_jax", "data_tools"} <= set(allowed)
    assert "ARG RUN_AS=livo" in lines and lines.index("USER ${RUN_AS}") > lines.index("ARG RUN_AS=livo")
