"""What the benchmarks share: the clock, the table, the results file."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time

from absl import flags

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants memory of the same GPU
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # compilation is timed
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # PyTorch's idle threads would spin beside JAX's

REPEATS = flags.DEFINE_integer("repeats", 10, "How often each is timed, after a warm-up.", lower_bound=1)
RESULTS = flags.DEFINE_string("results", "benchmarks/results", "Where the results file is written.")
NAME = flags.DEFINE_string("name", "", "Of the results file. Default: the benchmark's.")


def median_seconds(run, inputs) -> float:
    """The median time of run(input) over REPEATS fresh inputs, after two that warm up; `run` returns when it is done.

    Args:
        inputs: a function that makes the next input.
    """
    times = []
    for _ in range(REPEATS.value + 2):
        given = inputs()
        start = time.perf_counter()
        run(given)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def median_seconds_in_turns(runs: dict, inputs) -> dict[str, float]:
    """median_seconds of each of several, by name, in turns: what else the machine does slows all of them alike."""
    times = {name: [] for name in runs}
    for _ in range(REPEATS.value + 2):
        for name, run in runs.items():
            given = inputs()
            start = time.perf_counter()
            run(given)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[2:]) for name, taken in times.items()}


def device() -> str:
    """The accelerator, or the processor and the cores that this process may use."""
    import jax

    kind = jax.devices()[0].device_kind
    if kind != "cpu":
        return f"{jax.device_count()} x {kind}"
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


def show(rows: list[dict]):
    """Prints rows as a table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = [[row.get(name, "") for name in names] for row in rows]
    cells = [names] + [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in values]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells))


def report(benchmark: str, settings: dict, rows: list[dict], **further: list[dict]):
    """Prints rows as a table and writes them as RESULTS/NAME.json: device, versions, date, settings, rows.

    `further`: more tables, by name.
    """
    show(rows)
    for name, table in further.items():
        print(f"\n{name}{'' if table else ': none'}")
        show(table)
    if os.path.isabs(settings.get("model", "")):
        settings = settings | {"model": os.path.relpath(settings["model"])}
    packages = ("jax", "jaxlib", "flax", "torch", "diffusers", "transformers")
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    found = {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": device(),
        "versions": {"python": platform.python_version()} | {p: installed[p] for p in packages if p in installed},
        "settings": settings,
        "rows": rows,
        **further,
    }
    directory = pathlib.Path(RESULTS.value)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{NAME.value or benchmark}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
