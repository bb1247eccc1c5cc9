"""The command line, as a user meets it: a whole small run, its files, and its answers to mistakes."""

import contextlib
import csv
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from livo_jax.files import directories
from livo_jax.runs import attacked_pairs
from tests import small_run

pytestmark = pytest.mark.usefixtures("one_device")

ROOT = pathlib.Path(__file__).parents[2]
# One device, a bias and a harm, no sheets: what is asserted here does not depend on how well the model draws.
QUICK = ("--config.mesh.data=1", "--config.principles=('shape', 'bloody')", "--config.log.samples_every=0")


CONSTANT = ("--config.train.schedule=constant", "--config.train.warmup_steps=0")


def arguments(workdir, *given, config="configs/tiny.py:smoke"):
    return ["run.py", f"--config={config}", f"--workdir={workdir}", *small_run.overridden(QUICK, given)]


def run(workdir, *given, **kw):
    """As a user starts it: a process of one device."""
    command = [sys.executable, *arguments(workdir, *given, **kw)]
    return subprocess.run(command, cwd=ROOT, env=small_run.environment(), capture_output=True, text=True)


@pytest.fixture
def main(capfd):
    """main(workdir, flags) is what the command prints, run in this process, which saves the seconds of a start."""

    def main(workdir, *given, **kw) -> str:
        small_run.run_here(arguments(workdir, *given, **kw))
        return "".join(capfd.readouterr())

    return main


@pytest.fixture
def answer_to(capfd):
    """answer_to(arguments) is the error that the command ends with, and what it prints."""

    def answer_to(arguments) -> str:
        with pytest.raises((Exception, SystemExit)) as error:
            small_run.run_here(arguments)
        assert error.type is not SystemExit or error.value.code not in (0, None), "it tells the shell"
        return f"{error.type.__name__}: {error.value}\n{''.join(capfd.readouterr())}"

    return answer_to


@pytest.fixture
def answer(answer_to):
    """answer(workdir, flags) is that of the embedded world's run."""

    def answer(workdir, *given) -> str:
        return answer_to(arguments(workdir, *given))

    return answer


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_device):
    """A workdir of a finished run, and what it printed."""
    workdir, printed, progress = tmp_path_factory.mktemp("runs") / "finished", io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(progress):
        small_run.run_here(arguments(workdir, "--config.log.samples_every=4"))
    return workdir, printed.getvalue(), progress.getvalue()


@pytest.fixture
def pairs(finished):
    return f"--config.data.directory={finished[0] / 'preferences'}"


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def train_metrics(workdir, step):
    (line,) = (m for m in metrics(workdir) if m["step"] == step and "train/loss" in m)
    return {k: v for k, v in line.items() if k not in ("train/pairs_per_sec", "train/tflops_per_device")}


FLOORED = ("D1", "D2", "entropy", "TV", "joint_TV", "joint_D1", "mutual_information")


def test_a_run_leaves_what_it_promises(finished):
    workdir, printed, progress = finished
    assert "shape equality" in printed and "held_out" in printed
    assert "train: 100%" in progress and "evaluate: 100%" in progress
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 4
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"2", "4"}
    assert list((workdir / "tensorboard").glob("events*"))
    with Image.open(workdir / "samples" / "step_4.png") as picture:
        sheet = np.asarray(picture).astype(int)
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 50
    with Image.open(workdir / "samples" / "step_4_harmful.png") as picture:
        harmful = np.asarray(picture).astype(int)

    def rough(rows):
        return np.abs(np.diff(rows[:, :64], axis=1)).mean()

    assert rough(sheet[-len(harmful) :]) < rough(harmful) / 2, "what is harmful is blurred, and beside it as it is"
    document = json.loads((workdir / "eval" / "results.json").read_text())
    assert document["schema"] == 2 and document["judges"] == [{"name": "shapeworld", "harmful_from": {"bloody": 12}}]
    results = document["rows"]
    assert {r["method"] for r in results} == {"base", "livo"}
    further = {"other_words", "other_values", "spelled_around", "implied"}
    assert {r["split"] for r in results} == {"seen", "held_out"} | further
    results = [row for row in results if row["split"] not in further]
    for row in results:
        if "over_refusal" in row["metric"]:
            assert 0 <= row["mean"] <= 1 and row["images"] == 4
            assert row["method"] == "livo" or row["metric"] == "over_refusal", "of the base what cannot be read"
            continue
        names = {"method", "value", "split", "metric", "mean", "ci95", "prompts", "images"}
        compared = row["method"] == "livo" and row["metric"] != "distance"
        names |= {"floor"} if row["metric"] in FLOORED else set()
        assert set(row) == names | ({"p_value", "p_holm", "family"} if compared else set())
        assert row["ci95"][0] <= row["mean"] <= row["ci95"][1] and (row["prompts"], row["images"]) == (2, 8)
    assert "<h1>LiVO: finished</h1>" in (workdir / "eval" / "report.html").read_text()
    readings = list(csv.DictReader((workdir / "eval" / "readings.csv").read_text().splitlines()))
    shape = [row["shape"] for row in readings if (row["method"], row["value"]) == ("base", "shape equality")]
    assert len(shape) >= 2 * 2 * 4 and {"method", "split", "prompt", "index", "applied"} <= readings[0].keys()
    names = set().union(*metrics(workdir))
    for name in ("loss", "margin_w", "margin_l", "active_w", "active_l", "grad_norm", "pairs_per_sec"):
        assert f"train/{name}" in names
    assert "eval/shape_equality/livo/seen/D1" in names


def test_rerunning_a_finished_run_says_so(finished, main):
    workdir, *_ = finished
    before, sheet = metrics(workdir), workdir / "samples" / "step_4.png"
    picture = sheet.read_bytes()
    sheet.unlink()
    printed = main(workdir, "--config.log.samples_every=4")
    assert sheet.read_bytes() == picture, "it is drawn where the end came before it was"
    assert "is finished: its 4 steps are trained and evaluated" in printed and "D1" in printed
    assert metrics(workdir) == before


def test_evaluate_and_generate_read_the_checkpoint(finished, main, tmp_path):
    workdir, *_ = finished
    shutil.copytree(workdir, tmp_path / "run")
    further = (
        "--config.eval.combinations=True", "--config.eval.strengths=(0.0, 0.5, 1.0)", "--config.eval.seen=('cook',)",
        "--config.eval.held_out=('baker',)", "--config.eval.images_per_prompt=2",
        "--config.eval.harm_images_per_prompt=2", "--config.eval.auto=True",
    )  # fmt: skip
    printed = main(tmp_path / "run", "--mode=evaluate", "--config.eval.seed=1", *further)
    rows = json.loads((tmp_path / "run" / "eval" / "results.json").read_text())["rows"]
    means = {(r["value"], r["method"], r["split"], r["metric"]): r["mean"] for r in rows}
    for (value, method, *rest), mean in means.items():
        if "distance" in rest[1]:
            continue
        if " x 0" == value[-4:] and method == "livo":
            assert mean == means[value, "base", *rest], "strength 0 is the base model"
        if " x 1" == value[-4:] and method == "livo":
            assert mean == means[value, "plain", *rest], "strength 1 is LiVO"
    assert ("shape equality x 0.5", "livo", "seen", "D1") in means
    harm, chosen = "bloody considered inappropriate", {}
    for (value, method, split, metric), mean in means.items():
        if (method, metric) == ("auto", "chosen"):
            chosen[value, split] = mean
            side = {0: "base", 1: "livo"}[mean]
            assert means[value, "auto", split, "readable"] == means[value, side, split, "readable"]
    assert chosen[harm, "held_out"] == chosen["shape equality", "seen"] == 1 and chosen[harm, "implied"] == 0
    assert means[harm, "auto", "held_out", "over_chosen"] == 0
    assert means[harm, "auto", "held_out", "over_refusal"] == means[harm, "base", "held_out", "over_refusal"]
    both = "shape equality + bloody considered inappropriate"
    assert {method for value, method, *_ in means if value == both} == {"base", "plain", "livo"}
    assert both in printed and "plain" in printed
    rates = json.loads((tmp_path / "run" / "eval" / "rates.json").read_text())
    assert rates["shape equality"].keys() == {"", *("shape equality" + x for x in ("", ": round", ": square"))}
    assert all(sum(shares.values()) == pytest.approx(1) for arms in rates.values() for shares in arms.values())
    assert (tmp_path / "run" / "eval" / "results.json").read_text() != (workdir / "eval" / "results.json").read_text()
    (tmp_path / "prompts.txt").write_text("a photo of a baker\n\na photo of a cook\n", "utf-8-sig")
    main(
        tmp_path / "run", "--mode=generate", "--prompt=a tailor", f"--prompts_file={tmp_path / 'prompts.txt'}",
        "--value=shape", "--num_images=3", "--seed=5", f"--out={tmp_path / 'images'}",
    )  # fmt: skip
    assert {p.name for p in (tmp_path / "images").iterdir()} == {f"00{p}_00{i}.png" for p in range(3) for i in range(3)}
    with Image.open(tmp_path / "images" / "002_002.png") as picture:
        assert picture.size == (66, 32)
        assert (picture.text["seed"], json.loads(picture.text["values"])[0]["value"]) == ("5", "shape equality")
        assert picture.text["prompt"] == "a photo of a cook"
        pixels = np.asarray(picture).astype(int)

    # Exported, it draws the same pictures: in a workdir of its own, without a checkpoint.
    main(tmp_path / "run", "--mode=export", f"--out={tmp_path / 'export'}")
    assert "| livo |" in (tmp_path / "export" / "README.md").read_text()
    main(
        tmp_path / "other", "--mode=generate", f"--config.value_encoder.start={tmp_path / 'export'}",
        "--prompt=a photo of a cook", "--value=shape", "--num_images=3", "--seed=5", f"--out={tmp_path / 'again'}",
    )  # fmt: skip
    with Image.open(tmp_path / "again" / "000_002.png") as picture:
        assert np.abs(np.asarray(picture) - pixels).max() <= 1


def test_the_papers_recipe_runs_anywhere(main, answer, tmp_path):
    """Two steps of configs/livo.py on random weights, its answers included; then its checkpoint for another state."""
    main(tmp_path / "run", "--config.sampling.steps=5", config="configs/livo.py:smoke")
    for step in (1, 2):
        assert 0 < train_metrics(tmp_path / "run", step)["train/loss"] < 100
    assert (tmp_path / "run" / "eval" / "report.html").exists()
    told = answer(
        tmp_path / "run", "--mode=export", f"--out={tmp_path / 'out'}", "--config.train.ema_decay=0.9",
        "--config.value_encoder.alone=()",
    )  # fmt: skip
    assert not (tmp_path / "out").exists()
    assert "made with another config.model, config.train.ema_decay or train_embeddings" in told


MISTAKES = {  # flags: what the answer holds
    ("--config.train.stepz=3", "--config.tran.steps=3"): 
        "no config.train.stepz; there is config.train.steps(.|\n)*no config.tran.steps; there is config.train.steps",
    ("--config=configs/tiny.py:tiny",): "configs/tiny.py:tiny: there is configs/tiny.py and configs/tiny.py:smoke",
    ("--config=configs/none.py",): "configs/none.py",
    ("--workdir=runs/[1e-4]",): "runs/.1e-4.: what is saved there could not be read: choose a path without \\[",
    ("--config.eval.drawn=runs/[1]",): "the config cannot work(.|\n)*runs/.1.: what is saved there could not be read",
    ("--config.train.steps=6", "--config.log.wandb=livo"): "wandb is not installed: pip install wandb",
    ("--mode=trian",): "train.*evaluate.*generate",
    ("--config.model=nowhere",): "no model at 'nowhere'(.|\n)*hf download",
    ("--config.train.batch_size=0", "--config.train.schedule=linear", "--config.judge=human"):
        "train.batch_size=0(.|\n)*'linear': choose from(.|\n)*'human': choose from classifier, clip, detector",
    ("--config.loss.timesteps=(900, 2000)", "--config.sampling.sampler=heun"):
        "timesteps=\\(900, 2000\\)(.|\n)*'heun'",
    ("--config.principles=('shape', 'age')", "--config.train.ema_decay=1.0"):
        "ema_decay=1.0(.|\n)*no value 'age'. Values there: gender.*shape, colour, bloody",
    ("--config.log.samples_every=-1", "--config.profile.steps=-2"):
        "profile.steps=-2: choose 0 .no profile.(.|\n)*samples_every=-1: choose 0 .no samples. or more",
    ("--config.judge=vlm",): "'shape' has no `question`.*model is",
    ("--mode=evaluate",): "no checkpoint: train first",
    ("--mode=attack", "--config.attack.search=best", "--config.attack.steps=0"):
        "'best': choose from coordinate, projected, .*queries, paraphrases(.|\n)*attack.steps=0: choose at least 1",
    ("--config.preferences.attacks=('nowhere.json',)",): "attacks: nowhere.json cannot be read .*: make it",
    ("--mode=generate",): "generate needs --out=DIR",
    ("--mode=generate", "--out=DIR"): "needs --prompt=TEXT or --prompts_file=FILE",
    ("--mode=generate", "--out=DIR", "--prompt=a\udcff", "--prompts_file=docs/demo.png"):
        "--prompt is 'a.udcff', which is no Unicode text(.|\n)*docs/demo.png:1: not UTF-8 .*: convert the file",
    ("--mode=generate", "--out=DIR", "--prompts_file=tests/__init__.py"): "tests/__init__.py: no prompts in it",
    ("--mode=generate", "--out=DIR", "--prompt=a cook", "--num_images=0"): "num_images=0",
    ("--mode=generate", "--out=DIR", "--prompt=a cook", "--value=shape", "--ratio=equal"):
        "a ratio needs .*rates.json, what the tokens show: run --mode=evaluate first",
    ("--mode=export", "--out=DIR"): "no checkpoint: train first(.|\n)*--config.value_encoder.start=",
    ("--config.train.remat=some", "--config.train.ema_decay=1.0", "--config.train.accumulate=3"):
        "ema_decay=1.0(.|\n)*'some': choose from none, dots, full(.|\n)*batch_size=8 is not a multiple of",
    ("--config.loss.form=ppo",): "config.loss.form='ppo': choose from livo, sft, dpo, ipo, kto",
    ("--config.loss.form=kto", "--config.train.accumulate=2"): "train.accumulate=2: kto compares with the mean of a wh",
    ("--mode=export", "--out=tests"): "--out=tests exists: remove it",
    ("--mode=generate", "--prompt=a cook", "--out=tests"): "--out=tests is not empty: remove it, or generate into",
    ("--config.judge=",): "preferences holds no preference pairs, and without config.judge none can be built",
    ("--config.variant=fp32",): "has no model.fp32.safetensors(.|\n)*There are model.safetensors",
    ("--mode=generate", "--prompt=a cook", "--out=DIR", "--value=age"):
        "'age' is not one of config.principles: 'shape eq",
}  # fmt: skip


@pytest.mark.parametrize("given", MISTAKES, ids=lambda given: given[-1])
def test_mistakes_are_answered_before_work_is_done(given, answer, tmp_path):
    told = answer(tmp_path / "run", *given)
    assert re.search(MISTAKES[given], told), told
    assert not list(tmp_path.rglob("preferences")) and not list(tmp_path.rglob("checkpoints/*"))


@pytest.mark.parametrize(
    "given, told",
    [
        ("--config.train.stepz=3", "no config.train.stepz; there is config.train.steps"),
        ("--config=configs/tinny.py", "--config=configs/tinny.py: there is no such file"),
        ("--config=configs", "--config=configs: this is a folder, name a file in it"),
        ("--config=configs/tiny.py:tiny", "configs/tiny.py:tiny: there is configs/tiny.py and configs/tiny.py:smoke"),
        ("--config.train.batch_size=0", "the config cannot work:\n  config.train.batch_size=0: choose"),
    ],
)
def test_a_mistake_is_answered_by_the_command(given, told, tmp_path):
    process = run(tmp_path / "run", given)
    assert process.returncode != 0 and told in process.stdout + process.stderr, process.stdout + process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    "line, told",
    [
        ("config.train.stepz = 3", 'Did you mean "steps" instead of "stepz"?'),
        ("raise ValueError('there is no such variant')", "ValueError: there is no such variant"),
    ],
)
def test_what_is_wrong_in_a_config_file_is_told_with_its_place(answer_to, tmp_path, line, told):
    file = tmp_path / "own.py"
    lines = ["from configs import tiny", "def get_config():", "    config = tiny.get_config()", f"    {line}"]
    file.write_text("\n".join([*lines, "    return config"]))
    answered = answer_to(["run.py", f"--config={file}", f"--workdir={tmp_path / 'run'}"])
    assert f'File "{file}", line 4' in answered and told in answered and "Traceback" not in answered
    assert "learning_rate" not in answered, "not all of the fields that there are"


@pytest.mark.parametrize("search", ["projected", "continuous"])
def test_an_attack_leaves_its_rates_and_what_it_found(finished, main, tmp_path, search):
    workdir, *_ = finished
    shutil.copytree(workdir, tmp_path / "run")
    budget = [f"--config.attack.{name}=1" for name in ("tokens", "steps", "noises", "candidates")]
    images = ("--config.eval.harm_images_per_prompt=2", "--config.eval.left_alone_images=1", "--config.eval.auto=True")
    budget += [f"--config.attack.search={search}", "--config.attack.splits=('seen',)"]
    printed = main(tmp_path / "run", "--mode=attack", *budget, *images)
    document = json.loads((tmp_path / "run" / "eval" / "attacks.json").read_text())
    means = {(r["method"], r["split"], r["metric"]): r["mean"] for r in document["rows"]}
    assert document["attack"]["search"] == search and document["judges"][0]["name"] == "shapeworld"
    assert means["base", "neutral", "R"] == 0 and means["base", "harm said", "R"] == 1
    assert means["base", "neutral", "distance"] == 0 < means["base", "harm said", "distance"]
    assert means["auto", "harm said", "chosen"] == 1 and means["auto", "neutral", "chosen"] == 0
    # Prompts that nobody seeks: where words are sought.
    known = [means.get(("base", "spelled_around", "R")), means.get(("livo", "implied", "R"))]
    assert known[0] == 1 and known[1] is not None if search == "projected" else known == [None, None]
    assert ("livo", f"attacked by {search}", "R") in means and ("livo", "held_out", "over_refusal") in means
    found = json.loads((tmp_path / "run" / "eval" / "attacks_found.json").read_text())
    assert [row["method"] for row in found] == (["base"] * 2 + ["livo"] * 2 if search == "projected" else [])
    assert {row["subject"] for row in found} <= {"cook", "butcher"} and all(map(attacked_pairs.is_row, found))
    assert all(len(row["tokens"]) == 1 and row["prompt"].startswith("a photo of a") for row in found)
    assert f"attacked by {search}" in printed


def test_a_workdir_keeps_its_config(finished, answer):
    workdir, *_ = finished
    before = (workdir / "config.json").read_text()
    told = answer(workdir, "--config.seed=4", "--config.train.learning_rate=1.0", "--config.eval.seed=1",
                  "--config.judging.model=a-vlm", "--config.judging.budget=9")  # fmt: skip
    assert "config.seed: 0 there, 4 now" in told and "config.train.learning_rate" in told
    assert "config.judging.model: '' there" in told, "it may have chosen the pairs"
    for name in ("config.eval.seed", "config.judging.budget"):
        assert name not in told, "which changes no parameter"
    assert (workdir / "config.json").read_text() == before


def test_nothing_that_is_not_finite_is_saved(root, answer_to, tmp_path):
    """The squares of the parameters overflow at the first learning rate, at the second the next loss alone."""
    run = (*CONSTANT, "--config.mesh.data=1", "--config.train.steps=6", "--config.checkpoint.every=1")
    told = answer_to(small_run.arguments(root, tmp_path / "at once", *run, "--config.train.learning_rate=1e30"))
    assert "FloatingPointError: the norm of the parameters after step 1 is inf. There is no checkpoint: the " in told
    assert not (tmp_path / "at once" / "checkpoints").exists()
    told = answer_to(small_run.arguments(root, tmp_path / "later", *run, "--config.train.learning_rate=1e12"))
    saved = tmp_path / "later" / "checkpoints"
    assert "FloatingPointError: the loss of step 2 is nan, the norm of the gradients of step 2 is nan" in told
    assert f"is step 1 in {saved}: the same command meets the same batch at step 2" in told
    assert [path.name for path in saved.iterdir()] == ["1"]


def test_a_run_of_before_goes_on_longer(root, answer_to, capfd, tmp_path, monkeypatch):
    """In a home, from pairs that cannot be written. Its config.json is of before some fields; it gets more steps."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(root / "pairs", tmp_path / "pairs")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "pairs" not in str(path) and access(path, mode))

    def command(*given):
        of_all = ("--config.mesh.data=1", "--config.data.directory=~/pairs", "--config.data.cache=True", *CONSTANT)
        return small_run.arguments(root, "~/run", *of_all, *given)

    small_run.run_here(command("--config.train.steps=2"))
    run = tmp_path / "run"
    assert (run / "cache" / "made_of.json").exists() and not (tmp_path / "pairs" / "cache").exists()
    written = json.loads((run / "config.json").read_text())
    del written["cpu_devices"], written["data"]["cache"], written["loss"]["form"], written["value_encoder"]["states"]
    written["train"]["gone"] = 1
    (run / "config.json").write_text(json.dumps(written))
    small_run.run_here(command("--mode=export", "--out=~/export"))
    assert (tmp_path / "export" / "README.md").exists()
    capfd.readouterr()
    (run / "eval").mkdir()
    for name in ("results.json", "rates.json"):
        (run / "eval" / name).write_text("{}")
    small_run.run_here(command("--config.train.steps=3"))
    assert f"resuming {run} at step 2" in capfd.readouterr().out
    assert not any((run / "eval" / name).exists() for name in ("results.json", "rates.json")), "of an earlier step"
    assert json.loads((run / "config.json").read_text())["loss"]["form"] == "livo"
    told = answer_to(command("--config.train.steps=2"))
    assert f"{run}/checkpoints has step 3, config.train.steps=2: choose as many at least" in told
    with directories.held(run, "trains in"):
        told = answer_to(command("--config.train.steps=3"))
    assert f"FileExistsError: another process trains in {run}: PID {os.getpid()} on " in told


def test_pairs_of_other_values_are_refused(pairs, answer, tmp_path):
    told = answer(tmp_path / "run", pairs, "--config.principles=('shape',)")
    assert "set config.principles to those of the dataset, or build another" in told
