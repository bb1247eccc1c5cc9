"""The house: who may import whom, and how little the hot path needs."""

import ast
import importlib
import importlib.util
import pathlib
import subprocess
import sys

import pytest

import livo_jax
from livo_jax.moved import MOVED

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = (  # each uses only those before it
    "models diffusion seeds sharding training processes files values value_encoders retrieval sampling judges data"
    " methods evaluation runs export demo modes"
).split()
BY_ANOTHER_NAME = {("livo_jax/values/__init__.py", "livo_jax.retrieval.retriever.Retriever")}  # values.Retriever
MATHEMATICS = {"models", "diffusion", "seeds", "sharding", "training"}  # jax, flax and optax alone
EXPORTED = "livo_jax/export/diffusers_pipeline.py"  # copied by an export, imported by nobody
# These import PyTorch, an extra, where they use it.
JUDGES = [f"livo_jax/judges/{name}.py" for name in ("_pytorch", "classifier", "detector", "llava")]
CONVERTER = "data_tools/convert_judge.py"  # reads PyTorch's files, once
ALLOWED = {(EXPORTED, "torch"), (EXPORTED, "diffusers"), *((name, "torch") for name in (*JUDGES, CONVERTER))}


def imports(path: pathlib.Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or str(path).endswith(EXPORTED), f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str:
    """Which room a module or file of livo_jax lies in, of a name such as livo_jax.data.cache.Cache."""
    return module.removesuffix(".py").replace("/", ".").split(".")[1]


def test_one_direction():
    problems = []
    folders = ("livo_jax", "benchmarks", "configs", "data_tools")
    for path in [ROOT / "run.py", *(path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py"))]:
        name = str(path.relative_to(ROOT))
        mine = room(name) if name.startswith("livo_jax/") else None
        for module in imports(path):
            top = module.split(".")[0]
            beside = top if top != "livo_jax" or module == "livo_jax" else room(module)
            if mine in ROOMS and beside in ("benchmarks", "configs", "data_tools", "run", "tests"):
                problems.append(f"{name} imports {module}: livo_jax stands below everything else")
            if mine in ROOMS and top == "livo_jax" and (name, module) not in BY_ANOTHER_NAME:
                theirs = room(module)
                if theirs in ROOMS and ROOMS.index(theirs) > ROOMS.index(mine):
                    problems.append(f"{name} imports {module}: {theirs} stands above {mine}")
            if module.startswith("livo_jax.export.diffusers_pipeline"):
                problems.append(f"{name} imports {module}: it needs PyTorch")
            if mine in MATHEMATICS and top != "livo_jax":
                library = top in ("jax", "flax", "optax", "numpy") or top in sys.stdlib_module_names
                if not library or top in ("json", "pathlib", "os"):
                    problems.append(f"{name} imports {module}: mathematics knows jax, flax, optax and numpy only")
            if top in ("benchmarks", "configs", "data_tools"):
                problems.append(f"{name} imports {module}: installed it is livo_jax.{module}")
            at_run_time = not name.startswith("benchmarks/")
            if at_run_time and top in ("torch", "tensorflow", "diffusers") and (name, top) not in ALLOWED:
                problems.append(f"{name} imports {module}: not at run time")
    assert not problems, "\n".join(problems)


def test_texts_are_utf_8_in_any_locale():
    for path in [
        path for folder in ("livo_jax", "benchmarks", "data_tools") for path in ROOT.glob(f"{folder}/**/*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("read_text", "write_text"):
                assert "encoding" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"


def test_flags_are_listed_without_a_wait():
    """What --helpfull imports, at the head of the modes' files, is absl alone."""
    for path in [ROOT / "livo_jax" / "commands.py", *ROOT.glob("livo_jax/modes/*.py")]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= sys.stdlib_module_names, path
            elif isinstance(node, ast.ImportFrom):
                known = node.module in ("absl", "livo_jax", "livo_jax.modes")
                assert known or node.module.split(".")[0] in sys.stdlib_module_names, f"{path} imports {node.module}"


def test_every_file_is_in_a_room():
    outside = {path.relative_to(ROOT / "livo_jax").parts[0] for path in ROOT.glob("livo_jax/**/*.py")}
    others = {*ROOMS, "__init__", "__main__", "commands", "moved", "shelf"}
    outside = {name.removesuffix(".py") for name in outside} - others
    assert not outside, f"{sorted(outside)}: which room is that?"


def test_what_moved_is_told_and_where_it_is():
    for name, place in MOVED.items():
        for part in place.split(", and ")[0].split(" in "):
            assert importlib.util.find_spec(f"livo_jax.{part}"), place
        with pytest.raises(ModuleNotFoundError, match=f"livo_jax.{name} is now livo_jax.{place}"):
            importlib.import_module(f"livo_jax.{name}")
    with pytest.raises(ModuleNotFoundError, match="livo_jax.train is now livo_jax.runs.train"):
        from livo_jax import train  # noqa: F401
    assert not hasattr(livo_jax, "nothing")
    assert importlib.import_module("livo_jax.shelf").Shelf and livo_jax.losses.livo and livo_jax.values.Retriever


def test_no_circles():
    files = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
        for p in [*ROOT.glob("livo_jax/**/*.py"), *ROOT.glob("data_tools/*.py")]
    }
    graph = {
        name: {m if m in files else m.rpartition(".")[0] for m in imports(path)} & files.keys() - {name}
        for name, path in files.items()
    }
    while leaves := [name for name, below in graph.items() if not below & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"circle among {sorted(graph)}"


def test_the_hot_path_needs_jax_flax_and_optax_alone():
    """The mathematics imports where nothing else is installed."""
    others = (
        "diffusers grain huggingface_hub jinja2 matplotlib ml_collections PIL safetensors tensorboardX"
        " tensorflow_datasets tokenizers torch tqdm transformers"
    ).split()
    code = f"""
import sys
for name in {others}:
    sys.modules[name] = None  # an import of it fails
import livo_jax.training.step, livo_jax.models.weights, livo_jax.models.clip, livo_jax.models.unet, livo_jax.models.vae
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_files_are_short():
    long = {str(p): n for p in ROOT.glob("livo_jax/**/*.py") if (n := len(p.read_text().splitlines())) > 450}
    assert not long, long
