"""What a run survives: damaged checkpoints, a full disk, SIGKILL, SIGTERM."""

import errno
import gc
import json
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from configs import tiny
from livo_jax import sharding
from livo_jax.files.directories import resolve_directory
from livo_jax.runs import checkpoint
from livo_jax.runs.checkpoint import FORMAT, Checkpoints, Termination
from livo_jax.runs.train import check_finite
from tests import small_run
from tests.runs import served

ROOT = pathlib.Path(__file__).parents[2]


def make_state(step, mesh=(8, 1, 1), names=("a", "b")):
    """Numbers that cannot be compressed: a changed byte is a changed number."""
    place = NamedSharding(sharding.make_mesh(*mesh), PartitionSpec(("data", "fsdp"), "tensor"))
    rng = np.random.default_rng(step)
    params = {name: jax.device_put(rng.normal(size=(256, 64)).astype(np.float32), place) for name in names}
    return {"step": jax.device_put(np.int32(step), sharding.replicated(place.mesh)), "params": params}


def assert_state(state, step):
    jax.tree.map(np.testing.assert_array_equal, state, make_state(step))


@pytest.fixture
def saved(tmp_path):
    """A workdir with the checkpoints 1 and 2."""
    checkpoints = Checkpoints(epath.Path(tmp_path))
    for step in (1, 2):
        checkpoints.save(step, make_state(step))
    checkpoints.close()
    return epath.Path(tmp_path)


def largest(step):
    """The file that holds the arrays."""
    return max((f for f in pathlib.Path(step).rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def truncate(step):
    for file in pathlib.Path(step).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(step):
    data = bytearray(largest(step).read_bytes())
    data[len(data) // 2] ^= 1
    largest(step).write_bytes(data)


def rename_a_key(step):
    metadata = step / "_CHECKPOINT_METADATA"
    metadata.write_text(metadata.read_text().replace("init_timestamp", "unit_timestamp"))


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


DAMAGES = {
    "truncated": truncate,
    "flipped": flip,
    "no arrays": lambda step: largest(step).unlink(),
    "no metadata": lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
    "other metadata": rename_a_key,
    "no state": lambda step: shutil.rmtree(step / "state"),
    "empty": empty,
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves reads unawaited
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(saved, damage, caplog):
    DAMAGES[damage](saved / "checkpoints" / "2")
    assert_state(Checkpoints(saved).restore(make_state(0)), 1)
    assert (saved / "checkpoints" / "2").exists(), "who only reads moves nothing"
    caplog.clear()
    checkpoints = Checkpoints(saved)
    assert_state(checkpoints.restore(make_state(0), set_aside=True), 1)
    (warning,) = (r.getMessage() for r in caplog.records if "is used in its place" in r.getMessage())
    assert f"{saved}/checkpoints/2 is damaged, step 1 is used" in warning and len(warning.splitlines()) == 1
    assert {p.name for p in (saved / "checkpoints").iterdir()} == {"1", "2.damaged"}
    checkpoints.save(2, make_state(2))
    checkpoints.close()
    assert_state(Checkpoints(saved).restore(make_state(0)), 2)
    flip(saved / "checkpoints" / "2")
    assert_state(Checkpoints(saved).restore(make_state(0), set_aside=True), 1)
    assert {p.name for p in (saved / "checkpoints").iterdir()} == {"1", "2.damaged", "2.damaged.1"}, "nothing is lost"
    gc.collect()


def itself(path):
    """A link that leads nowhere: reading it fails, as on a bad disk."""
    path.unlink()
    path.symlink_to(path)


UNREADABLE = {
    "arrays": largest,
    "manifest": lambda step: step / "state" / "manifest.ocdbt",
    "metadata": lambda step: step / "_CHECKPOINT_METADATA",
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves reads unawaited
@pytest.mark.parametrize("what", UNREADABLE)
def test_what_cannot_be_read_now_is_not_damaged(saved, what, monkeypatch):
    monkeypatch.setattr(checkpoint, "PAUSES", ())
    step = pathlib.Path(saved / "checkpoints" / "2")
    itself(UNREADABLE[what](step))
    with pytest.raises(
        OSError, match="checkpoints/2 cannot be read now, which is no sign of damage: .*to go on from an"
    ):
        Checkpoints(saved).restore(make_state(0), set_aside=True)
    assert {p.name for p in (saved / "checkpoints").iterdir()} == {"1", "2"}
    gc.collect()


ERRORS = [
    OSError(errno.EIO, "Input/output error"),
    TimeoutError("of the network"),
    ValueError("UNAVAILABLE: Error reading gs://bucket: HTTP 503"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    ConnectionResetError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_read_is_tried_again(saved, error, monkeypatch):
    monkeypatch.setattr(checkpoint, "PAUSES", (0.0, 0.0))
    checkpoints, failures = Checkpoints(saved), [error, error]
    restore = checkpoints.manager.restore

    def fail(*args, **kw):
        if failures:
            raise failures.pop()
        return restore(*args, **kw)

    monkeypatch.setattr(checkpoints.manager, "restore", fail)
    assert_state(checkpoints.restore(make_state(0), set_aside=True), 2)
    failures += [error] * 3
    with pytest.raises(OSError, match="cannot be read now"):
        checkpoints.restore(make_state(0), set_aside=True)
    assert {p.name for p in (saved / "checkpoints").iterdir()} == {"1", "2"}


def test_numbers_that_are_not_finite_are_not_used(saved):
    checkpoints = Checkpoints(saved)
    state = make_state(3)
    state["params"]["a"] = state["params"]["a"].at[7].set(np.nan)
    checkpoints.save(3, state)
    checkpoints.close()
    assert_state(Checkpoints(saved).restore(make_state(0), set_aside=True), 2)
    assert (saved / "checkpoints" / "3.damaged").exists()


def test_a_loss_that_is_not_finite_leaves_checkpoints_where_they_are(saved):
    """The pairs may be at fault: what was saved is finite, and trained again it would be the same."""
    metrics, told = {"loss": np.nan, "grad_norm": np.nan, "params_norm": 1.0}, "the loss of step 3 is nan, the norm of"
    told += " the gradients of step 3 is nan. .* is step 2 in .*: the same command meets the same batch at step 3, and"
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=told):
            check_finite(3, metrics, Checkpoints(saved), tiny.get_config())
    assert {p.name for p in (saved / "checkpoints").iterdir()} == {"1", "2"}


def test_checkpoints_that_cannot_be_read(saved):
    with pytest.raises(ValueError, match="checkpoints/2 does not fit this run: .* another config.model"):
        Checkpoints(saved).restore(make_state(0, names=("a", "c")))
    for step in (1, 2):
        flip(saved / "checkpoints" / str(step))
    with pytest.raises(ValueError, match="checkpoints/2 does not fit this run: it is damaged"):
        Checkpoints(saved).restore(make_state(0), set_aside=True)
    assert {p.name for p in (saved / "checkpoints").iterdir()} == {"1", "2"}


def test_a_newer_format_is_no_damage(saved, monkeypatch):
    metadata = saved / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    metadata.write_text(metadata.read_text().replace(f'"format": {FORMAT}', f'"format": {FORMAT + 1}'))
    with pytest.raises(ValueError, match=f"checkpoints/2 has format {FORMAT + 1}, newer than ours.*update livo_jax"):
        Checkpoints(saved).restore(make_state(0), set_aside=True)
    assert (saved / "checkpoints" / "2").exists()


def test_a_checkpoint_without_a_checksum_is_no_damage(saved):
    """As the first livo_jax wrote them, without a format either."""
    metadata = saved / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    found = json.loads(metadata.read_text())
    assert found["custom_metadata"].keys() == {"format", "checksum"}
    metadata.write_text(json.dumps(found | {"custom_metadata": {}}))
    assert_state(Checkpoints(saved).restore(make_state(0), set_aside=True), 2)


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 1, 1)])
def test_a_checkpoint_of_another_mesh(saved, mesh):
    state = make_state(0, mesh)
    restored = Checkpoints(saved).restore(state)
    assert_state(restored, 2)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, state)


def test_a_full_disk(tmp_path):
    """A process that may write no file over 4 MB, as one that meets a full disk."""
    code = """
import resource, signal, sys
import jax.numpy as jnp
import numpy as np
from etils import epath
from livo_jax.runs.checkpoint import Checkpoints
from tests import small_run
state = lambda step, size: {"step": jnp.int32(step), "a": jnp.array(np.random.rand(size), jnp.float32)}
checkpoints = Checkpoints(epath.Path(sys.argv[1]))
checkpoints.save(1, state(1, 1000))
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000,) * 2)
checkpoints.save(2, state(2, 2_000_000))
checkpoints.wait()
"""
    process = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode != 0
    assert f"OSError: a checkpoint could not be written to {tmp_path}/checkpoints" in process.stderr
    assert "Make room there and start the same command again: it goes on from step 1" in process.stderr
    assert Checkpoints(epath.Path(tmp_path)).latest_step() == 1


def test_a_second_ctrl_c_ends_at_once():
    before = signal.getsignal(signal.SIGINT)
    with Termination(0) as termination:
        assert not termination.asked(1)
        signal.raise_signal(signal.SIGINT)
        assert termination.asked(2) and termination.signal is signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
    with Termination(0) as termination:  # of a terminal that was closed
        signal.raise_signal(signal.SIGHUP)
        assert termination.asked(1) and termination.signal is signal.SIGHUP
    signal.signal(signal.SIGHUP, before)
    with Termination(0) as termination, termination.at_once():
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("what is drawn is left where it is")
    assert termination.received


def test_a_run_in_the_background_of_a_script_ignores_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Termination(0) as termination:
        signal.raise_signal(signal.SIGINT)
        assert not termination.received
    assert signal.signal(signal.SIGINT, before) is signal.SIG_IGN


# ---------------------------------------------------------------------------- whole runs


RUN = ("--config.train.accumulate=2", "--config.train.ema_decay=0.9", "--config.train.steps=16",
       "--config.checkpoint.every=2", "--config.log.samples_every=1000000")  # fmt: skip
HERE = ("--config.mesh.data=1",)  # of eight devices
LIKE_HERE = dict(devices=8)  # among as many threads: sums of other parts would round otherwise


@pytest.fixture(scope="module")
def uninterrupted(root):
    small_run.run_here(small_run.arguments(root, root / "uninterrupted", *RUN, *HERE, "--config.profile.steps=2"))
    return root / "uninterrupted"


def test_a_profile_lies_where_tensorboard_looks(uninterrupted):
    assert list(uninterrupted.glob("tensorboard/plugins/profile/*/*.xplane.pb"))


def wait_for(workdir, process, step):
    """Returns when a checkpoint of this step or a later one is there; the process must still run."""

    def reached():
        return max((int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit()), default=0) >= step

    while not reached():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def assert_same(workdir, whole):
    """Bit for bit: parameters, moments, average, every metric, the picture."""
    ours, theirs = small_run.final(workdir), small_run.final(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name], equal_nan=True)] == []
    assert small_run.metrics(workdir) == small_run.metrics(whole)
    picture = f"samples/step_{len(small_run.metrics(whole))}.png"
    assert (workdir / picture).read_bytes() == (whole / picture).read_bytes()

    def names(place):
        return {p.name for p in (place / "checkpoints").iterdir()}

    assert names(workdir) == names(whole), "nothing half-written is left"


def test_terminated_and_killed_a_run_ends_as_if_it_were_not(root, uninterrupted, tmp_path, capfd):
    workdir = tmp_path / "run"
    command = small_run.arguments(root, workdir, *RUN, *HERE)
    process = served.start(**LIKE_HERE)
    try:
        least = 4
        for one in signal.SIGTERM, signal.SIGINT:
            served.send(process, command)
            wait_for(workdir, process, least)
            process.send_signal(one)
            out, error = served.read_answer(process)
            assert error == f"SystemExit: {128 + one}"
            step = Checkpoints(epath.Path(workdir)).latest_step()
            assert least <= step < 16 and f"{one.name}: step {step} is saved in {workdir}/checkpoints" in out
            least = step + 1  # which the next start has to save
        assert re.search(f"resuming {workdir} at step [0-9]+\n", out), out
        served.send(process, command)
        wait_for(workdir, process, least)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL

    small_run.run_here(command)
    assert re.search(f"resuming {workdir} at step [0-9]+\n", capfd.readouterr().out)
    assert_same(workdir, uninterrupted)


def test_buckets_that_checkpoints_cannot_be_written_to():
    with pytest.raises(ValueError, match="workdir s3://bucket/run: checkpoints can be written to a disk or to gs://"):
        resolve_directory("s3://bucket/run")


@pytest.fixture
def bucket(monkeypatch):
    """gs://bucket, made up by a server on this machine for what the test starts; as gcsfs sees it."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # would ask for what the server has not
    gcsfs, server = pytest.importorskip("gcsfs"), shutil.which("fake-gcs-server")
    if not server:
        pytest.skip("fake-gcs-server (https://github.com/fsouza/fake-gcs-server) is not on the PATH")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)  # for gcsfs
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # for TensorStore
    place = ["-scheme=http", "-host=127.0.0.1", f"-port={port}", f"-external-url={url}"]
    process = subprocess.Popen([server, "-backend=memory", "-log-level=error", *place])
    files = gcsfs.GCSFileSystem(endpoint_url=url, token="anon", project="any", use_listings_cache=False)
    files.mkdir("bucket")  # gcsfs tries until the server is up
    yield files
    process.kill()
    process.wait()


@pytest.mark.slow
def test_killed_a_run_in_a_bucket_ends_as_one_on_disk(root, uninterrupted, bucket, tmp_path):
    process = small_run.start(root, "gs://bucket/run", *RUN, *HERE, **LIKE_HERE)
    while len(bucket.glob("bucket/run/checkpoints/*/commit_success.txt")) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.kill()
    process.communicate()
    out = small_run.finish(small_run.start(root, "gs://bucket/run", *RUN, *HERE, **LIKE_HERE))
    assert re.search("resuming gs://bucket/run at step [0-9]+\n", out), out
    bucket.get("bucket/run", str(tmp_path), recursive=True)
    assert_same(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_twenty_kills_change_nothing(root, tmp_path):
    """At random moments, with a checkpoint being written at nearly all of them."""
    flags = (*RUN, "--config.train.steps=150", "--config.checkpoint.every=1")
    small_run.finish(small_run.start(root, tmp_path / "whole", *flags))
    workdir, rng = tmp_path / "run", np.random.default_rng(0)
    for kill in range(20):
        before = Checkpoints(epath.Path(workdir)).latest_step() or 0
        process = small_run.start(root, workdir, *flags)
        wait_for(workdir, process, before + 1)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"kill {kill}: the run ended before it"
    small_run.finish(small_run.start(root, workdir, *flags))
    assert_same(workdir, tmp_path / "whole")
