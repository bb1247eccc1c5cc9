"""The benchmarks run, find their peers equal, and write what they measured; how fast is no matter here."""

import json
import subprocess
import sys

import pytest

from tests import small_run

pytestmark = pytest.mark.slow  # pytest -m slow tests/test_benchmarks.py


def run(root, results, benchmark: str, *flags) -> dict:
    command = [
        sys.executable, "-m", f"benchmarks.{benchmark}", "--config=configs/tiny.py:smoke",
        f"--config.model={root / 'model'}", "--config.random_weights=True", "--repeats=1", f"--results={results}",
        *flags,
    ]  # fmt: skip
    subprocess.run(command, cwd=small_run.ROOT, env=small_run.environment(), check=True)
    found = json.loads((results / f"{benchmark}.json").read_text())
    assert found["device"] and found["date"] and found["versions"]["jax"]
    return {row[next(iter(row))]: row for row in found["rows"]}


def test_train_step(root, tmp_path):
    """It fails where the steps differ in loss or gradient norm."""
    rows = run(root, tmp_path, "train_step", "--peers=eager")
    assert list(rows) == ["livo_jax, cached", "livo_jax, images", "PyTorch eager, images"]
    assert all(row["pairs_per_sec"] > 0 and row["grad_norm"] > 0 for row in rows.values())


def test_sampler(root, tmp_path):
    rows = run(root, tmp_path, "sampler", "--peers=eager", "--config.sampling.steps=4")
    assert rows["diffusers, PyTorch eager"]["difference"] < 0.5
    assert rows["livo_jax, no guidance"]["images_per_sec"] > 0


def test_loader(root, tmp_path):
    rows = run(root, tmp_path, "loader", "--pairs=8", "--batches=2")
    assert rows["cache"]["pairs_per_sec"] > 0 and rows["images"]["pairs_per_sec"] > 0


def test_startup(root, tmp_path):
    rows = run(root, tmp_path, "startup")
    first, second = (rows[f"livo_jax, images: compile, {start} start"]["seconds"] for start in ("first", "second"))
    assert second < first
