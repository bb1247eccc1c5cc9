"""The house: who may import whom, and how little the hot path needs."""

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
EXPORTED = "livo_jax/diffusers_pipeline.py"  # copied by an export, imported by nobody
JUDGE = "livo_jax/judges/llava.py"  # the one that needs PyTorch, an extra: it imports it where it uses it
ALLOWED = {(EXPORTED, "torch"), (EXPORTED, "diffusers"), (JUDGE, "torch")}
MATHEMATICS = ("livo_jax/models/", "livo_jax/diffusion.py", "livo_jax/losses.py")


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


def test_one_direction():
    problems = []
    for path in [ROOT / "run.py", *ROOT.glob("livo_jax/**/*.py"), *ROOT.glob("data_tools/*.py")]:
        name = str(path.relative_to(ROOT))
        for module in imports(path):
            top = module.split(".")[0]
            ours = top in ("livo_jax", "data_tools", "configs", "run", "tests")
            if name.startswith("livo_jax") and ours and top != "livo_jax":
                problems.append(f"{name} imports {module}: livo_jax stands below everything else")
            if module.startswith("livo_jax.diffusers_pipeline"):
                problems.append(f"{name} imports {module}: it needs PyTorch")
            if name.startswith(MATHEMATICS):
                below = module.startswith(("livo_jax.models", "livo_jax.diffusion", "livo_jax.losses"))
                library = top in ("jax", "flax", "numpy") or top in sys.stdlib_module_names
                if not (library or below) or top in ("json", "pathlib", "os"):
                    problems.append(f"{name} imports {module}: mathematics knows jax, flax and numpy only")
            if top in ("torch", "tensorflow", "diffusers") and (name, top) not in ALLOWED:
                problems.append(f"{name} imports {module}: not at run time")
    assert not problems, "\n".join(problems)


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
    """models, diffusion, losses, sharding and step import where nothing else is installed."""
    others = (
        "diffusers grain huggingface_hub jinja2 matplotlib ml_collections PIL safetensors tensorboardX"
        " tensorflow_datasets tokenizers torch tqdm transformers"
    ).split()
    code = f"""
import sys
for name in {others}:
    sys.modules[name] = None  # an import of it fails
import livo_jax.step, livo_jax.models.weights, livo_jax.models.clip, livo_jax.models.unet, livo_jax.models.vae
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_files_are_short():
    long = {str(p): n for p in ROOT.glob("livo_jax/**/*.py") if (n := len(p.read_text().splitlines())) > 450}
    assert not long, long
