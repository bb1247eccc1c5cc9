"""Published directories load exactly, and what is wrong with one is said at once."""

import concurrent.futures
import contextlib
import errno
import hashlib
import http.server
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import urllib.parse
import warnings

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from livo_jax import StableDiffusion, ValueEncoder, sharding
from livo_jax.files.modules import initialise, save
from livo_jax.models.weights import from_published, split, to_published


@pytest.fixture
def copy(published, tmp_path):
    return shutil.copytree(published, tmp_path / "model")


def rewrite(path, change):
    """Applies `change` to the state dict of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_round_trip_is_bit_exact(sd, published, torch_models):
    for name in ("unet", "vae", "text_encoder"):
        expected = {k: v.numpy() for k, v in torch_models[name].state_dict().items()}
        got = to_published(split(getattr(sd, name))[1])
        assert got.keys() == {k.removeprefix("text_model.") for k in expected}
        for key, array in expected.items():
            assert np.array_equal(got[key.removeprefix("text_model.")], array), key


def test_old_names_and_buffers_load(copy, sd):
    def old_vae(tensors):
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            for name in [n for n in tensors if f"attentions.0.{new}." in n]:
                tensors[name.replace(new, old)] = tensors.pop(name)

    def old_text(tensors):
        for name in list(tensors):
            tensors["text_model." + name.removeprefix("text_model.")] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = np.arange(16)[None]

    rewrite(copy / "vae" / "diffusion_pytorch_model.safetensors", old_vae)
    rewrite(copy / "text_encoder" / "model.safetensors", old_text)
    old = StableDiffusion.from_pretrained(copy)
    for part in ("vae", "text_encoder"):
        jax.tree.map(np.testing.assert_array_equal, split(getattr(old, part))[1], split(getattr(sd, part))[1])


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_value_encoder_takes_both_key_styles_and_a_dtype(sd, published, tmp_path, prefix):
    config = json.loads((published / "text_encoder" / "config.json").read_text())
    save(sd.text_encoder, tmp_path, config, stem="model", prefix=prefix)
    assert all(name.startswith(prefix) for name in load_file(tmp_path / "model.safetensors"))
    ids = sd.tokenize(["a baker"])
    ours = ValueEncoder.from_pretrained(tmp_path)
    np.testing.assert_array_equal(ours(ids).pooled, sd.text_encoder(ids).pooled)
    assert ValueEncoder.from_pretrained(tmp_path, jnp.bfloat16)(ids).pooled.dtype == jnp.bfloat16


def test_all_wrong_weights_are_listed(copy):
    def spoil(tensors):
        tensors["conv_in.extra"] = tensors.pop("conv_in.bias")
        tensors["conv_out.weight"] = tensors["conv_out.weight"][:, :-1]

    rewrite(copy / "unet" / "diffusion_pytorch_model.safetensors", spoil)
    with pytest.raises(ValueError) as error:
        StableDiffusion.from_pretrained(copy)
    for part in ("unet", "3 weights", "missing conv_in.bias", "unexpected conv_in.extra", "misshapen conv_out.weight"):
        assert part in str(error.value)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (lambda d: shutil.rmtree(d / "vae"), FileNotFoundError, "vae/config.json is missing"),
        (lambda d: (d / "unet" / "diffusion_pytorch_model.safetensors").unlink(), FileNotFoundError, "unet has no"),
        (lambda d: truncate(d / "unet" / "diffusion_pytorch_model.safetensors"), ValueError, "cut short, fetch it"),
        (lambda d: (d / "unet" / "config.json").write_text("{"), ValueError, "config.json is damaged"),
        (lambda d: (d / "scheduler" / "scheduler_config.json").unlink(), FileNotFoundError, "scheduler_config.json"),
    ],
)
def test_missing_and_damaged_files(copy, spoil, error, message):
    spoil(copy)
    with pytest.raises(error, match=message):
        StableDiffusion.from_pretrained(copy)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(_class_name="FlowMatchEulerDiscreteScheduler"),
            "config.json: _class_name='Flow.*flow matching",
        ),
        (dict(prediction_type="sample"), "scheduler_config.json: prediction_type='sample'"),
    ],
)
def test_unknown_schedulers(copy, change, message):
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        StableDiffusion.from_pretrained(copy)


@pytest.mark.parametrize("name", ["no/such-model", "not a name"])
def test_a_missing_model_says_how_to_fetch_it(name):
    with pytest.raises(FileNotFoundError, match=f"hf download {name}"):
        StableDiffusion.from_pretrained(name)


def test_a_hub_cache_that_cannot_be_written(monkeypatch):
    def snapshot_download(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(OSError, match="'owner/model' is not whole in the hub's cache, .*Read-only.*Set HF_HOME"):
        StableDiffusion.from_pretrained("owner/model")


def test_half_precision_variant_is_read_when_alone(copy, sd):
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(
        {k: v.astype(np.float16) for k, v in load_file(path).items()},
        path.with_name("diffusion_pytorch_model.fp16.safetensors"),
    )
    both = StableDiffusion.from_pretrained(copy)
    jax.tree.map(np.testing.assert_array_equal, split(both.vae)[1], split(sd.vae)[1])
    path.unlink()
    half = split(StableDiffusion.from_pretrained(copy).vae)[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.float16)), half, split(sd.vae)[1])


def test_long_prompts_are_cut_with_a_warning_that_quotes(sd):
    words = "a photo of a baker at work on a bloody day " * 2
    with pytest.warns(UserWarning, match="longer than 16 tokens; cut off: 'a baker at work on a bloody day'"):
        ids = sd.tokenize([words, "a baker"])
    assert ids.shape == (2, 16) and ids.dtype == np.int32 and ids[0, -1] == ids[1, -1] == sd.tokenizer.eos_token_id


def test_threads_tokenize_as_one(sd):
    texts = [" ".join(["baker"] * n) for n in (1, 5, 30)] * 200
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = [sd.tokenize([text]) for text in texts]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda text: sd.tokenize([text]), texts))
    np.testing.assert_array_equal(together, alone)


def test_strict_conversion_counts_every_leaf(sd):
    params = split(sd.unet)[1]
    published = to_published(params)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    jax.tree.map(np.testing.assert_array_equal, from_published(published, abstract), params)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_load(torch_models, published, sd, tmp_path, variant):
    """Shards and their index as diffusers and transformers write them, whole and in half precision."""
    model = shutil.copytree(published, tmp_path / "model")
    for part, module in torch_models.items():
        shutil.rmtree(model / part)
        module.save_pretrained(model / part, max_shard_size="40KB", variant=variant)
    assert len(list(model.rglob("*-of-*.safetensors"))) > 6
    sharded = StableDiffusion.from_pretrained(model, variant=variant)
    for part in torch_models:
        jax.tree.map(np.testing.assert_array_equal, split(getattr(sharded, part))[1], split(getattr(sd, part))[1])
    lost = next((model / "unet").glob("*-00002-of-*.safetensors"))
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=f"unet lacks the shards {lost.name} that diffusion_pytorch.*index"):
        StableDiffusion.from_pretrained(model, variant=variant)


def test_weights_go_to_their_sharding_in_their_dtype(published, sd):
    mesh = sharding.make_mesh(4)
    placed = StableDiffusion.from_pretrained(published, jnp.bfloat16, sharding=sharding.replicated(mesh))
    for leaf, ours in zip(jax.tree.leaves(split(placed.unet)[1]), jax.tree.leaves(split(sd.unet)[1])):
        assert leaf.sharding == sharding.replicated(mesh) and leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, ours.astype(jnp.bfloat16))


def test_random_weights_of_an_architecture(published, sd):
    random, again = (StableDiffusion.from_config(published, jnp.bfloat16, seed=s) for s in (1, 1))
    for part in ("text_encoder", "unet", "vae"):
        one, other, ours = (split(getattr(model, part))[1] for model in (random, again, sd))
        jax.tree.map(np.testing.assert_array_equal, one, other)
        assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, ours)
        assert {x.dtype for x in jax.tree.leaves(one)} == {jnp.dtype(jnp.bfloat16)}
    pooled = random.text_encoder(sd.tokenize(["a baker", "a cook"])).pooled.astype(jnp.float32)
    assert np.isfinite(pooled).all() and np.abs(pooled[0] - pooled[1]).max() > 0.1


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("unet", dict(cross_attention_dim=24), "text encoder is 20 wide, its UNet wants 24"),
        ("unet", dict(in_channels=9), "4 latent channels, its UNet 9 in and 4 out"),
        ("vae", dict(in_channels=9, out_channels=9), "its VAE is of images of 9 channels"),
    ],
)
def test_parts_that_do_not_belong_together(copy, part, change, message):
    path = copy / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        StableDiffusion.from_pretrained(copy)


def test_memory_of_loading(tmp_path):
    """Peak resident memory while 400 MB load grows by at most 1.3 times them."""
    config = {
        "vocab_size": 20_000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6,
        "num_attention_heads": 16, "max_position_embeddings": 77,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = initialise(ValueEncoder, tmp_path)
    save(model, tmp_path, config, stem="model")
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 350e6
    code = f"""
import re
from livo_jax import ValueEncoder
import jax, safetensors.numpy
jax.device_put(1.0).block_until_ready()
peak = lambda: 1024 * int(re.search("VmHWM: *([0-9]+)", open("/proc/self/status").read().replace("\\t", " "))[1])
before = peak()
model = ValueEncoder.from_pretrained({str(tmp_path)!r})
print((peak() - before) / {size})
"""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=pathlib.Path(__file__).parents[2],
    )
    assert answer.returncode == 0, answer.stderr
    assert 0.9 < float(answer.stdout) < 1.3


# ---------------------------------------------------------------------------- the hub


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that fetching a repository needs; `root` is served as owner/model."""

    root: pathlib.Path
    fetched: set
    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def etag(self, name: str) -> str:
        return hashlib.sha1(name.encode()).hexdigest()

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        path = urllib.parse.urlparse(urllib.parse.unquote(self.path)).path
        files = {str(p.relative_to(self.root)): p for p in self.root.rglob("*") if p.is_file()}
        headers = {"X-Repo-Commit": self.COMMIT}
        if path.startswith("/api/models/owner/model/tree/"):
            content = json.dumps(
                [
                    {
                        "type": "file",
                        "path": name,
                        "size": p.stat().st_size,
                        "oid": hashlib.sha1(name.encode()).hexdigest(),
                    }
                    for name, p in files.items()
                ]
            ).encode()
        elif path.startswith("/api/models/owner/model"):
            siblings = [{"rfilename": name} for name in files]
            content = json.dumps({"id": "owner/model", "sha": self.COMMIT, "siblings": siblings}).encode()
        elif path.startswith("/owner/model/resolve/") and (name := path.split("/", 5)[5]) in files:
            content = files[name].read_bytes()
            headers["ETag"] = f'"{self.etag(name)}"'
            if body:
                self.fetched.add(name)
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for header, text in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(header, text)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def hub_of(root):
    """A hub on loopback that holds `root`; its RequestHandlerClass.fetched are the files that were asked for."""
    handler = type("Handler", (Hub,), {"root": root, "fetched": set()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(copy):
    """A hub on loopback that holds one model, with much beside it that is not needed."""
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        weights = load_file(copy / part / f"{stem}.safetensors")
        save_file({k: v.astype(np.float16) for k, v in weights.items()}, copy / part / f"{stem}.fp16.safetensors")
        (copy / part / f"{stem}.bin").write_text("a pickle")
    (copy / "unet" / "diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"other weights")
    (copy / "v1-5-pruned.safetensors").write_bytes(b"all in one file")
    (copy / "safety_checker").mkdir()
    (copy / "safety_checker" / "model.safetensors").write_bytes(b"another model")
    with hub_of(copy) as server:
        yield server


def run_beside(hub, home, code, **environment):
    """Runs code in a process that knows the hub at `hub` and the cache HF_HOME=`home`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    clean |= {"HF_HOME": str(home), "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True,
        cwd=pathlib.Path(__file__).parents[2],
    )  # fmt: skip


def load_from(hub, home, code, **environment):
    """Runs code that loads models."""
    return run_beside(hub, home, "from livo_jax import StableDiffusion, ValueEncoder\n" + code, **environment)


def test_a_hub_id_fetches_what_is_needed(hub, tmp_path):
    fetched = hub.RequestHandlerClass.fetched
    load = "StableDiffusion.from_pretrained('owner/model'{}); print('loaded')"
    answer = load_from(hub, tmp_path / "home", load.format(""))
    assert "loaded" in answer.stdout, answer.stderr
    assert {name for name in fetched if name.endswith((".safetensors", ".bin"))} == {
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
    assert {"model_index.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"} <= fetched
    assert list((tmp_path / "home" / "hub").glob("models--owner--model"))

    fetched.clear()
    none = "; StableDiffusion.from_pretrained('owner/none')"
    answer = load_from(hub, tmp_path / "home", load.format(", variant='fp16'") + none)
    assert "loaded" in answer.stdout, answer.stderr
    assert "no model at 'owner/none'" in answer.stderr and "hf download owner/none" in answer.stderr
    assert {name.split(".", 1)[1] for name in fetched} == {"fp16.safetensors"}

    fetched.clear()
    code = "ValueEncoder.from_pretrained('owner/model', subfolder='text_encoder')\n" + load.format("")
    answer = load_from(
        hub, tmp_path / "home", code + "; StableDiffusion.from_pretrained('owner/new')", HF_HUB_OFFLINE="1"
    )
    assert "loaded" in answer.stdout and not fetched, answer.stderr
    assert "hf download owner/new" in answer.stderr, "offline, and nothing is cached"
