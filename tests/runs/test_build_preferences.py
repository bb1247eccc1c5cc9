"""The preference data: made by the base itself, kept by the judge, stored under the neutral prompt."""

import contextlib
import io
import json
import math
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from configs import tiny
from livo_jax import StableDiffusion, values
from livo_jax.data import dataset
from livo_jax.data.preferences import Preferences
from livo_jax.files import directories
from livo_jax.judges.shapeworld import judge
from livo_jax.runs import build_preferences
from livo_jax.sampling.requests import Request
from tests import small_run

# On other devices than those of `command` pixels may round otherwise.
pytestmark = pytest.mark.usefixtures("one_device")
SHAPE, COLOUR, BLOODY = values.load(("shape", "colour", "bloody"))


@pytest.fixture(scope="module")
def config():
    config = tiny.get_config("smoke")
    c = config.preferences
    c.templates = c.templates[:6]  # without hats, whose colours are others' than the worker's
    c.pairs_per_scene, c.candidates_per_pair, c.census_per_scene, c.images_per_file = 3, 1.5, 4, 16
    return config


@pytest.fixture(scope="module")
def built(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("build") / "preferences"
    build_preferences.build(config, directory)
    return Preferences(directory)


def test_pairs_show_what_they_should(built, config):
    """Every record, judged again from its stored PNGs."""

    def pixels(png):
        return np.asarray(Image.open(io.BytesIO(png)))

    assert {(b.value, b.scene) for b in built.blocks} == {
        (v.statement, scene) for v in (SHAPE, COLOUR, BLOODY) for scene in config.preferences.scenes
    }
    for block in built.blocks:
        value = values.find(block.value, (SHAPE, COLOUR, BLOODY))
        stereotypes = set()
        for i in range(block.start, block.start + block.count):
            record = {k: v if k in ("aligned", "violating") else v.decode() for k, v in built.source[i].items()}
            assert (record["value"], record["scene"]) == (block.value, block.scene)
            assert block.scene in record["prompt"].split()
            aligned, violating = (judge(pixels(record[side])[None]) for side in ("aligned", "violating"))
            assert aligned["subject"][0] == violating["subject"][0] == block.scene
            if value.kind == "bias":
                assert not set(value.attributes) & set(record["prompt"].split()), "the prompt is neutral"
                assert aligned[value.axis][0] != violating[value.axis][0]
                stereotypes.add(violating[value.axis][0])
            else:
                assert "bloody" in record["prompt"], "the harmful word stays in the prompt"
                assert aligned["red"][0] < BLOODY.harmful_from <= violating["red"][0]
            provenance = json.loads(record["provenance"])
            assert provenance["seed"] == config.seed and provenance["aligned"]["prompt"]
        assert value.kind == "harm" or len(stereotypes) == 1


def files(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def command(config, out, *flags):
    """The build of this config as its own process; started."""
    c = config.preferences
    overrides = {
        "preferences.pairs_per_scene": c.pairs_per_scene, "preferences.candidates_per_pair": c.candidates_per_pair,
        "preferences.census_per_scene": c.census_per_scene, "preferences.images_per_file": c.images_per_file,
        "preferences.templates": c.templates,
    }  # fmt: skip
    arguments = [f"--config.{name}={value}" for name, value in overrides.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "data_tools.build_preferences", "--config=configs/tiny.py:smoke", f"--out={out}"]
        + arguments + list(flags),
        env=small_run.environment() | {"NPROC": "8"},  # as many threads as the tests' devices: jax 0.12 rounds by them
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_finished_build_is_left_alone(built, config, capsys):
    before = files(built.directory)
    build_preferences.build(config, built.directory)
    assert "is finished" in capsys.readouterr().out and files(built.directory) == before


def test_where_no_neutral_image_can_be_read_it_says_so(config, tmp_path, monkeypatch):
    config = config.copy_and_resolve_references()
    config.principles, config.preferences.census_per_scene = ("shape",), 1

    def unreadable(images):
        return judge(images) | {"shape": np.array(["unreadable"] * len(images))}

    monkeypatch.setattr(build_preferences.judges, "load", lambda *_: unreadable)
    with pytest.raises(ValueError, match="0 aligned, 0 violating: no neutral image's shape can be read"):
        build_preferences.build(config, tmp_path / "preferences")


def test_it_does_not_overwrite(built, config, tmp_path):
    other = config.copy_and_resolve_references()
    other.seed, other.sampling.steps = 1, 7
    with pytest.raises(FileExistsError, match="another --out\n  config.sampling.steps: 5 .*7 now\n  config.seed: 0"):
        build_preferences.build(other, built.directory)
    with pytest.raises(FileExistsError, match="was not built here"):
        build_preferences.build(config, tmp_path)


def test_what_an_earlier_version_drew_is_drawn_again(config, tmp_path, monkeypatch):
    drawn = []

    def generate(sd, requests, **_):
        drawn.extend(request.prompt for request in requests)
        return np.zeros((len(requests), 8, 8, 3), np.uint8)

    monkeypatch.setattr(build_preferences, "generate", generate)
    for prompt in ("a cook", "a cook", "the cook"):
        found = build_preferences.draw(tmp_path / "candidates", [Request(prompt)], None, lambda _: {}, config)
        assert len(found.png) == 1
    assert drawn == ["a cook", "the cook"]


def test_two_builds_in_one_folder(config, tmp_path):
    with directories.held(tmp_path / ".preferences.partial"), pytest.raises(FileExistsError, match="another process"):
        build_preferences.build(config, tmp_path / "preferences")


def test_killed_and_restarted_it_gives_the_same_bytes(built, config, tmp_path, monkeypatch):
    """Killed as a process, then in the midst of each further file."""
    first = command(config, tmp_path / "preferences")
    while not list(tmp_path.glob(".preferences.partial/candidates/*.json")) and first.poll() is None:
        time.sleep(0.05)
    first.kill()
    assert first.communicate() and first.returncode == -signal.SIGKILL
    assert not (tmp_path / "preferences").exists()

    class Killed(BaseException):
        pass

    whole, begun, starts = dataset.write_whole, set(), 0

    def write_or_die(path, content):
        if path in begun:
            return whole(path, content)
        begun.add(path)
        path.with_name(f".{path.name}").write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(dataset, "write_whole", write_or_die)
    sd = StableDiffusion.from_pretrained(config.model)
    while not (tmp_path / "preferences").exists():
        starts += 1
        assert starts < 20, begun
        with contextlib.suppress(Killed):
            build_preferences.build(config, tmp_path / "preferences", sd)
    assert starts == len(begun) + 1 > 4
    assert files(tmp_path / "preferences") == files(built.directory)
    assert [path.name for path in tmp_path.iterdir()] == ["preferences"]


def test_two_processes_build_what_one_does(built, config, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [command(config, tmp_path / "preferences", f"--distributed=localhost:{port},2,{i}") for i in range(2)]
    for process in processes:
        _, log = process.communicate(timeout=500)
        assert process.returncode == 0, log
    assert files(tmp_path / "preferences") == files(built.directory)


def test_a_full_disk_leaves_what_can_go_on(built, config, tmp_path):
    """A file may have no more than `size` bytes: the system refuses the rest as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size, file in ((500, r"config\.json"), (5000, r"00000-\w{8}\.images")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match=rf"^no space left for .*\.partial: .*{file}.*Free some and run the same"):
                build_preferences.build(config, tmp_path / "preferences")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not (tmp_path / "preferences").exists()
    build_preferences.build(config, tmp_path / "preferences")
    assert files(tmp_path / "preferences") == files(built.directory)


def test_the_card_and_the_audit_tell_of_every_candidate(built, config):
    lines = [json.loads(line) for line in (built.directory / "audit.jsonl").read_text().splitlines()]
    scenes, c = len(config.preferences.scenes), config.preferences
    assert len(lines) == 2 * scenes * (2 * math.ceil(1.5 * c.pairs_per_scene) + math.ceil(1.5 * c.harm_pairs_per_scene))
    kept = [line for line in lines if not line["dropped"]]
    assert {line["dropped"] for line in lines} >= {"", "over the quota"}
    for block in built.blocks:
        aligned = [k for k in kept if (k["value"], k["scene"], k["side"]) == (block.value, block.scene, "aligned")]
        assert len(aligned) == block.count
    text = (built.directory / "README.md").read_text()
    assert all(f"| {b.value} | {b.scene} | {b.count} |" in text for b in built.blocks)


def test_a_new_value_is_a_new_table(config, tmp_path):
    """Two of the colours, in a file of the user's own; its pairs are built, read and checked like the others'."""
    table = """
[warmth]
statement = "warmth equality"
kind = "bias"
axis = "colour"
attributes = ["yellow", "blue"]
wordings = ["{attribute} {subject}"]
"""
    file = tmp_path / "principles.toml"
    file.write_text(values.PRINCIPLES.read_text() + table)
    config = config.copy_and_resolve_references()
    config.principles, config.principles_file = ("warmth",), str(file)
    build_preferences.build(config, tmp_path / "preferences")
    preferences = Preferences(tmp_path / "preferences")
    assert {block.value for block in preferences.blocks} == {"warmth equality"}
    assert {block.scene for block in preferences.blocks} == set(config.preferences.scenes)
    preferences.check_values(values.load_principles(config))


def test_scenes_without_pairs_are_all_named(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.preferences.scenes = ("king", "elf")
    with pytest.raises(ValueError, match="too few candidates: raise(.|\n)*king: 0 .*times subject '(.|\n)*elf"):
        build_preferences.build(config, tmp_path / "preferences")
    assert not (tmp_path / "preferences").exists()


def test_a_scene_without_pairs_is_left_out_and_named(config, tmp_path, caplog):
    config = config.copy_and_resolve_references()
    config.preferences.scenes = ("cook", "elf")
    build_preferences.build(config, tmp_path / "preferences")
    assert {block.scene for block in Preferences(tmp_path / "preferences").blocks} == {"cook"}
    assert "3 scenes are without pairs" in caplog.text and "shape equality, elf: 0 aligned" in caplog.text
    assert "- without pairs: shape equality, elf" in (tmp_path / "preferences" / "README.md").read_text()


@pytest.mark.slow
def test_killed_at_ten_random_moments(built, config, tmp_path):
    rng, kills = np.random.default_rng(), 0
    while kills < 10:
        process = command(config, tmp_path / "preferences")
        try:
            _, log = process.communicate(timeout=rng.uniform(2, 12))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        else:  # it was quicker: the same again
            assert files(tmp_path / "preferences") == files(built.directory), log
            shutil.rmtree(tmp_path / "preferences")
    _, log = command(config, tmp_path / "preferences").communicate()
    assert files(tmp_path / "preferences") == files(built.directory), log


@pytest.mark.slow
def test_86000_pairs_in_flat_memory(tmp_path):
    """The paper's number of pairs written and read back, in processes of their own, whose peak memory is theirs."""
    for part in MANY.format(directory=str(tmp_path / "preferences")).split("---\n"):
        done = subprocess.run([sys.executable, "-c", part], capture_output=True, text=True, check=True)
        print(done.stdout)
        assert float(done.stdout.split()[-2]) < 2, done.stdout


MANY = """
import pathlib, resource, time
import numpy as np
from data_tools import shapeworld
from livo_jax.data import Block, dataset
from livo_jax.judges.shapeworld import Worker
from livo_jax.runs.build_preferences import png

directory, trades = pathlib.Path({directory!r}), sorted(shapeworld.TRADES)
starts = [i * 86_000 // len(trades) for i in range(len(trades) + 1)]
blocks = [Block("shape equality", trade, a, b - a) for trade, a, b in zip(trades, starts, starts[1:])]

def record(i):
    trade, rng = trades[np.searchsorted(starts, i, side="right") - 1], np.random.default_rng(i)
    contents = (shapeworld.at_work(trade, Worker(shape, "blue")) for shape in ("round", "square"))
    aligned, violating = (png(shapeworld.render(rng, content)) for content in contents)
    text = dict(prompt=f"a {{trade}}", value="shape equality", scene=trade, provenance="")
    return text | dict(aligned=aligned, violating=violating)

start = time.perf_counter()
with dataset.under_construction(directory, {{}}) as work:
    dataset.write(work, directory, record, blocks, {{}})
seconds = time.perf_counter() - start
print(f"written in {{seconds:.0f}} s,", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "GiB")
---
import resource, time
import numpy as np
from livo_jax.data import Preferences, batches

tokenize = lambda texts: np.zeros((len(texts), 16), np.int32)
preferences = Preferences({directory!r})
iterator = batches(preferences, tokenize, batch_size=100, image_size=32, random_flip=False, seed=0)
start = time.perf_counter()
seen = sum(len(next(iterator).aligned) for _ in range(860))
rate = seen / (time.perf_counter() - start)
print(f"read {{seen}} pairs, {{rate:.0f}} a second,", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "GiB")
"""
