import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import json
import os
import pathlib
import shutil
import signal
import tempfile

import numpy as np
import pytest

# What follows is set before jax is imported.
QUICK = "--xla_backend_optimization_level=0"  # compiles in half of the time
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know the flag
    QUICK += " --xla_cpu_use_fusion_emitters=false"  # in a third
    QUICK += " --xla_cpu_parallel_codegen_split_count=1"  # in a seventh less again: each worker has one core
if "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", ""):
    QUICK = ""  # who starts the tests has chosen
# pytest-xdist's workers find XLA_FLAGS as they are set here: what was chosen goes on beside them.
QUICK = os.environ.setdefault("LIVO_JAX_TESTS_QUICK", QUICK)
DEVICES = "--xla_force_host_platform_device_count={}"  # virtual ones: one mesh can be compared with another
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES.format(8)} {QUICK}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # where diffusers copies custom pipelines to
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads would spin beside JAX's
os.environ.setdefault("MALLOC_ARENA_MAX", "2")  # of workers: more keep a gigabyte that threads have freed

CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "livo_jax_tests"
CACHE_BYTES = 2**30


# What one test compiles is there for the next, for other processes, and for the next time.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it, and so would their runs
gc.set_threshold(100_000, 50, 100)  # tracing makes many objects, few of them garbage

# A Stable Diffusion of two levels, which compiles in seconds. Widths differ, so that no two shapes agree by chance.
LEVELS = dict(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1)
UNET = LEVELS | dict(
    sample_size=8, cross_attention_dim=20, attention_head_dim=2,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
VAE = LEVELS | dict(
    sample_size=16, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
)


# The files that take longest, each half a minute or more: a worker that begins with them does not end with them.
LONGEST = (
    "run multihost train recovery build_preferences value_encoders of_unet step images notebook compare shapeworld"
).split()


def pytest_configure(config):
    """A cache that has grown past CACHE_BYTES starts anew."""
    worker = hasattr(config, "workerinput")
    if not worker and sum(file.stat().st_size for file in CACHE.rglob("*") if file.is_file()) > CACHE_BYTES:
        shutil.rmtree(CACHE)


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))  # stable


def randomised(module):
    """A PyTorch module whose norms are no identities: an unread scale or a swapped bias shows."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


def relative_error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def text_model(vocab_size: int, eos_token_id: int, **settings):
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = dict(hidden_size=20, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4) | settings
    config = CLIPTextConfig(
        vocab_size=vocab_size, max_position_embeddings=16, bos_token_id=vocab_size - 2, eos_token_id=eos_token_id,
        pad_token_id=vocab_size - 1, **sizes,
    )  # fmt: skip
    return randomised(CLIPTextModel(config))


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    from data_tools.shapeworld import build_tokenizer

    root = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(root, context=16)
    return root


@pytest.fixture(scope="session")
def torch_models(tokenizer_dir):
    """Random PyTorch models of a tiny Stable Diffusion: dict of unet, vae, text_encoder."""
    import diffusers
    import torch
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_dir)
    unet = randomised(diffusers.UNet2DConditionModel(**UNET))
    with torch.no_grad():  # so that a text shows in the images
        for name, parameter in unet.named_parameters():
            if "attn2.to_" in name:
                parameter.mul_(3)
    return dict(
        unet=unet, vae=randomised(diffusers.AutoencoderKL(**VAE)),
        text_encoder=text_model(len(tokenizer), tokenizer.eos_token_id),
    )  # fmt: skip


@pytest.fixture(scope="session")
def published(torch_models, tokenizer_dir, tmp_path_factory):
    """The same as a published directory, written by diffusers and transformers."""
    from data_tools.shapeworld import PIPELINE, SCHEDULER

    return write_pipeline(tmp_path_factory.mktemp("published"), torch_models, tokenizer_dir, SCHEDULER, PIPELINE)


def write_pipeline(root, modules: dict, tokenizer_dir, scheduler: dict, index: dict):
    """Writes a published directory of PyTorch's modules by their names, with a tokenizer of each text encoder."""
    for name, module in modules.items():
        module.save_pretrained(root / name)
    for name in modules.keys() & {"text_encoder", "text_encoder_2"}:
        shutil.copytree(tokenizer_dir, root / name.replace("text_encoder", "tokenizer"))
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (root / "model_index.json").write_text(json.dumps(index))
    return root


@pytest.fixture(scope="session")
def sd(published):
    from livo_jax import StableDiffusion

    return StableDiffusion.from_pretrained(published)


@pytest.fixture(scope="session")
def parts(sd):
    """What a training step takes: a StableDiffusion, its Networks, parameters and a batch."""
    return sd, *parts_of(sd), batch_of(sd)


@pytest.fixture(scope="session")
def small(published, tmp_path_factory):
    """The same of one level, one text layer and random weights: a step compiles in half the time."""
    from livo_jax import StableDiffusion

    root = tmp_path_factory.mktemp("small")
    shutil.copytree(published, root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    down, up = ["CrossAttnDownBlock2D"], ["CrossAttnUpBlock2D"]
    changes = {
        "unet": {"block_out_channels": [8], "down_block_types": down, "up_block_types": up},
        "vae": {"block_out_channels": [8], "down_block_types": ["DownEncoderBlock2D"],
                "up_block_types": ["UpDecoderBlock2D"]},
        "text_encoder": {"num_hidden_layers": 1},
    }  # fmt: skip
    for part, change in changes.items():
        file = root / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    sd = StableDiffusion.from_config(root)
    return sd, *parts_of(sd), batch_of(sd)


@contextlib.contextmanager
def compiled_with(**options):
    """Has what is compiled within take these of XLA's options."""
    from jax._src import compiler  # flags are of a whole process, and options of a call are not the tests' to give

    without = compiler.get_compile_options

    def get_compile_options(*args, env_options_overrides=None, **kw):
        return without(*args, env_options_overrides=options | (env_options_overrides or {}), **kw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", get_compile_options)
        yield


@pytest.fixture(scope="session", autouse=True)
def shuffled_once():
    """Keeps what Grain shuffles: of the few pairs of tests each takes it milliseconds, and all seeds are alike."""
    from grain._src.python.dataset.transformations.shuffle import index_shuffle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_shuffle, "index_shuffle", functools.cache(index_shuffle.index_shuffle))
        yield


@pytest.fixture(scope="module")
def optimised():
    """Has a module's programs compiled with a little optimisation: those that draw much are done sooner in all."""
    with compiled_with(xla_backend_optimization_level=1):
        yield


@pytest.fixture(scope="module")
def one_device():
    """Has pairs drawn and encoded on one device, whatever devices there are: by the program of other runs of one."""
    from livo_jax import sharding

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_local_mesh", lambda: sharding.make_mesh(1))
        yield


@pytest.fixture(autouse=True, scope="module")
def little_memory():
    """What a module compiled is of no use to the next but for the smallest of it, and would take gigabytes."""
    gc.freeze()  # collections pass over what was there before the module: most are libraries
    yield
    import jax

    jax.clear_caches()
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc keeps what was freed
        trim(0)


def parts_of(sd):
    """The Networks and parameters of a step whose value encoder has the text encoder's shapes."""
    from livo_jax import ValueEncoder
    from livo_jax.files.modules import skeleton
    from livo_jax.training.objective import split_models

    networks, params, frozen = split_models(sd, sd.text_encoder, with_vae=True)
    graph, _ = skeleton(ValueEncoder, sd.root / "text_encoder")
    return networks._replace(graphs=networks.graphs | {"trained": graph}), frozen


def batch_of(sd):
    """Eight pairs of noise."""
    from livo_jax.training.batch import Batch

    rng, size = np.random.default_rng(0), sd.image_size
    prompts = [f"a photo of a {word}" for word in "baker cook smith tailor farmer miller sailor diver".split()]
    images = {name: rng.uniform(-1, 1, (8, size, size, 3)).astype(np.float32) for name in ("aligned", "violating")}
    value_prompts = ["shape equality, " + prompt for prompt in prompts]
    return Batch(sd.tokenize(value_prompts), prompt_ids=sd.tokenize(prompts), **images)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Where small_run finds its model and pairs."""
    from tests import small_run

    root = tmp_path_factory.mktemp("small")
    small_run.prepare(root)
    return root


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, by playwright."""
    if not (chromium := shutil.which("chromium")):
        pytest.skip("needs Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()
