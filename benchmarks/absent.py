"""Compiles a training step, or a sampler, for an accelerator that is not here, and tells what its compiler knows of it.

    python -m benchmarks.absent --config=configs/livo.py --config.model=benchmarks/sd15 --config.data.cache=True \
        --config.train.batch_size=16 --target="TPU v5e" --topology=4x4

Needs `libtpu` for TPUs and `jax[cuda13]` for GPUs, as those machines have them. No weights are made, nothing runs.
Times of a TPU are its compiler's estimates: the cycles of all instructions, one after another. Pallas kernels have
none: for them stands the limit that their products, filled up to the matrix unit, or the bytes that they read and write
once, set at the chip's peak. Of --what=attention there is also the most that they take but for waiting: the cycles of
the instructions that the compiler made of them, all branches taken. Of a GPU there are counts alone, where its compiler
gives them. JAX's own cache of programs does not serve devices that are not here: what is told of one is kept beside it,
for the next start.
"""

import functools
import os
import pathlib
import tempfile
from typing import NamedTuple

from absl import app, flags, logging
from ml_collections import config_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver
os.environ["XLA_FLAGS"] = "--xla_gpu_enable_triton_gemm=false"  # nor a GPU to try tiles on: cuBLAS for all products
os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",  # nor a cloud to ask: what it would say is asked of these
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several may compile at once
}

from livo_jax.benchmarks import arithmetic, common, hlo  # common sets what jax reads when it is imported

from livo_jax import commands

# isort: split
import jax
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType

from livo_jax import diffusion, methods, sharding
from livo_jax.models.attention import attention
from livo_jax.models.weights import split
from livo_jax.runs import check, plan, restore
from livo_jax.sampling import conditioning, generate
from livo_jax.sampling.guidance import ClassifierFree
from livo_jax.training.objective import split_models
from livo_jax.training.optimizer import make_optimizer
from livo_jax.training.step import init_state, jit_step, make_train_step

# What XLA's compiler asks of a GPU.
HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }} core_count: 132 fpus_per_core: 128 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 l2_cache_size: 52428800
  memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory:.0f}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 2 }} device_description_str: "NVIDIA {name}"
"""


class Target(NamedTuple):
    """A TPU: its name in topologies, the smallest slice, its clock in Hz, and the side of its matrix unit.

    The clock is the peak in the data sheet over what its matrix units do in a cycle.
    """

    generation: str
    smallest: str
    clock: float
    unit: int


TPUS = {
    "TPU v5e": Target("v5e", "2x2", 1.5e9, 128),
    "TPU v5p": Target("v5p", "2x2x1", 1.75e9, 128),
    "TPU v6e": Target("v6e", "2x2", 1.75e9, 256),
}
CONFIG = config_flags.DEFINE_config_file("config", None, "The config whose step is compiled.")
TARGET = flags.DEFINE_enum("target", "H200", list(plan.CHIPS), "What for.")
WHAT = flags.DEFINE_enum("what", "step", ["step", "sampler", "attention"], "What is compiled.")
TOPOLOGY = flags.DEFINE_string("topology", "", "The slice of TPUs, as 4x4. Default: one chip.")
TOP = flags.DEFINE_integer("top", 30, "So many of the dearest lines of the program are told.", lower_bound=1)
LEAST_MIB = flags.DEFINE_integer("least_mib", 64, "Results of so many MiB at least are told.", lower_bound=1)
TEXT = commands.define_path("text", "A file for the compiled program's text.")


def devices_of(name: str, topology: str) -> list:
    """The devices, which are not here, of a target."""
    jax.devices()  # the plug-ins are found
    if name in TPUS:
        tpu = TPUS[name]
        slice_name = f"{tpu.generation}:{topology or tpu.smallest}"
        devices = topologies.get_topology_desc(platform="tpu", topology_name=slice_name).devices
        return devices if topology else devices[:1]
    if topology:
        raise app.UsageError(f"--topology={topology}: {name} is compiled for alone")
    described = HOPPER.format(name=name, **plan.CHIPS[name]._asdict())
    settings = dict(platform="cuda", topology_name=name.lower(), target_config=described, topology="1x1x1")
    return topologies.get_topology_desc(**settings).devices


def on(where, tree):
    """Shapes that lie as `where` says: one sharding for all, or a tree of them."""
    if isinstance(where, jax.sharding.Sharding):
        where = jax.tree.map(lambda _: where, tree)
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, where)


def frozen_on(mesh, config, frozen: dict) -> dict:
    """The weights of the frozen models, divided as the config wants."""
    if not config.shard_frozen:
        return on(sharding.replicated(mesh), frozen)
    return {name: on(sharding.by_rules(part, mesh), part) for name, part in frozen.items()}


def trace_step(config, mesh):
    """The training step of a config, traced for shapes on the mesh."""
    check.check_config(config, mesh)
    sd, method, tx = plan.abstract_model(config), methods.make_method(config), make_optimizer(config)
    check.check_with_model(config, sd, judge=False)
    trained = nnx.eval_shape(lambda unet: method.make_module(methods.with_unet(sd, unet)), sd.unet)
    restore.compute_on(mesh, config, sd, trained)
    networks, params, frozen = split_models(sd, trained, with_vae=not config.data.cache)
    state = jax.eval_shape(functools.partial(init_state, tx=tx, ema_decay=config.train.ema_decay), params)
    state, frozen = on(sharding.by_rules(state, mesh, trained.RULES), state), frozen_on(mesh, config, frozen)
    batch = on(sharding.over_batch(mesh), plan.abstract_batch(sd, config, config.train.batch_size))
    step = make_train_step(networks, tx, config, method.make_loss(networks))
    return jit_step(step, state, frozen, mesh).trace(state, frozen, batch)


def trace_sampler(config, mesh):
    """What draws config.sampling.batch_size images of the base model on each device, from texts to pixels, traced."""
    sd, c = plan.abstract_model(config), config.sampling
    graphs, params = zip(*(split(module) for module in (sd.text_encoder, sd.unet, sd.vae)))
    params = frozen_on(mesh, config, dict(enumerate(params)))
    rows = c.batch_size * sharding.batch_parts(mesh)
    (shape, time_ids), ids = sd.shape_of(None), np.repeat(sd.tokenize([""]), rows, axis=0)
    words = np.zeros(rows, np.uint32)
    guided = ids if c.guidance_scale > 1 else None
    batch = conditioning.Batch(words, words, words, words, ids, guided, np.zeros((rows, 0), np.float32))
    if sd.zeros_for_empty_prompt and c.guidance_scale > 1:
        batch.zeros = np.zeros((rows, 2), bool)
    table = diffusion.sampler_table(sd.scheduler_config, c.sampler or sd.family.SAMPLER, c.steps)
    whole = on(sharding.replicated(mesh), jax.eval_shape(lambda: (table, c.guidance_scale, time_ids)))
    parts = generate.decoder_parts(c.batch_size, (sd.image_size, sd.image_size))
    settings = dict(shape=shape, decoder_parts=parts, guidance=ClassifierFree())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        given = (*graphs, None), (*params.values(), None), on(sharding.over_batch(mesh), batch), *whole
        return generate._sample.trace(*given, **settings)


def trace_attention(config, mesh):
    """The self-attention of a UNet's first level that attends, or a transformer's of image and text, forward and
    backward, of all images of a step.
    """
    sd = plan.abstract_model(config)
    network, (h, w, _) = sd.unet.config, sd.latent_shape
    if sd.family.DENOISER == "unet":
        level = next(i for i, name in enumerate(network.down_block_types) if name.startswith("CrossAttn"))
        heads, width = network.per_level("attention_head_dim")[level], network.block_out_channels[level]
        tokens = h * w >> 2 * level
    else:
        heads, width = network.num_attention_heads, network.width
        tokens = h * w // network.patch_size**2 + sd.family.states_shape[0] + 1  # the value's
    attend = functools.partial(attention, heads=heads)
    shape = (2 * config.train.batch_size, tokens, width)
    x = jax.ShapeDtypeStruct(shape, config.dtype, sharding=sharding.over_batch(mesh))

    def forward_and_backward(q, k, v, gradient):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out, backward = jax.vjp(attend, q, k, v)
            return out, backward(gradient)

    return jax.jit(forward_and_backward).trace(x, x, x, x)


def have_bundles_written(directory: str):
    """Has libtpu, which is not loaded yet, write the final program of each instruction that it compiles."""
    settings = {"dump_to": directory, "dump_llo_text": "true", "dump_llo_pass_label_regex": ".*final_bundles"}
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([given, *(f"--xla_jf_{name}={x}" for name, x in settings.items())])


def kernel_rows(work: list[hlo.Work], jaxpr, chip: plan.Chip, tpu: Target, bundles: dict) -> list[dict]:
    """Pallas kernels, like ones counted: FLOPs as they are and filled up, bytes, and the time that these set.

    bundles: of hlo.read_bundles, which set a time too; empty where they are not written.
    """
    known, rows = arithmetic.kernels(jaxpr, "tpu"), {}
    for x in work:
        if x.kind != "kernel":
            continue
        given = " ".join(shape for _, shape in x.operands)
        equation = known[hlo.sizes(given), hlo.sizes(x.shape)]
        flops, filled = (arithmetic.flops_of(equation, "tpu", side) for side in (1, tpu.unit))
        moved = hlo.memory(given)[0] + x.bytes
        seconds = max(filled / chip.flops, moved / chip.bandwidth)
        row = {"kernel": x.name.rsplit(".", 1)[0], "of": str(hlo.sizes(x.shape)[0]), "count": 0}
        row |= {"gflop": flops / 1e9, "filled_gflop": filled / 1e9, "mb": moved / 1e6, "limit_ms": 1e3 * seconds}
        if bundles:
            row["bundles_ms"] = None if bundles[x.name] is None else 1e3 * bundles[x.name] / tpu.clock
        rows.setdefault(tuple(row.values()), row)["count"] += x.times
    return sorted(rows.values(), key=lambda row: -row["limit_ms"] * row["count"])


TRACES = {"step": trace_step, "sampler": trace_sampler, "attention": trace_attention}


def main(_):
    logging.set_verbosity(logging.WARNING)
    config, target = CONFIG.value, TARGET.value
    chip, tpu = plan.CHIPS[target], TPUS.get(target)
    written = tempfile.TemporaryDirectory()
    if WHAT.value == "attention":  # of a step they would be gigabytes
        have_bundles_written(written.name)
    devices = devices_of(target, TOPOLOGY.value)
    shape = sharding.mesh_shape(len(devices), **config.mesh)
    mesh = jax.make_mesh(
        shape, sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[: shape[0] * shape[1] * shape[2]]
    )
    traced = TRACES[WHAT.value](config, mesh)
    directory = os.path.join(jax.config.jax_compilation_cache_dir, "absent")
    told, from_cache = hlo.compile_once(traced.lower(), f"{target} {TOPOLOGY.value}", directory, written.name)
    if TEXT.value:
        pathlib.Path(TEXT.value).write_text(told["text"], encoding="utf-8")
    work, jaxpr = hlo.read(told["text"]), traced.jaxpr.jaxpr
    platform = "tpu" if tpu else "cuda"
    flops = arithmetic.flops(jaxpr, platform) / mesh.size
    row = {
        "target": target,
        "chips": mesh.size,
        "weights_state_batch_gib": told["arguments"] / 2**30,
        "temporary_gib": told["temporary"] / 2**30,
        "compile_s": told["seconds"],
        "from_cache": from_cache,
        "tflop": flops / 1e12,
        "peak_ms": 1e3 * flops / chip.flops,
    }
    tables = {"collectives": hlo.collectives(work), "buffers": hlo.buffers(work, LEAST_MIB.value * 2**20)}
    if tpu:
        cycles = sum(x.cycles or 0 for x in work)
        tables["kernels"] = kernel_rows(work, jaxpr, chip, tpu, told["bundles"])
        kernels_ms = sum(kernel["limit_ms"] * kernel["count"] for kernel in tables["kernels"])
        row |= {
            "filled_ms": 1e3 * arithmetic.flops(jaxpr, platform, tpu.unit) / mesh.size / chip.flops,
            "estimated_mcycles": cycles / 1e6,
            "estimated_ms": 1e3 * cycles / tpu.clock,
            "kernels_limit_ms": kernels_ms,
        }
        dearest = hlo.dearest(work)
        kinds = {kind: sum(x["cycles"] for x in dearest if x["kind"] == kind) for kind in {x["kind"] for x in dearest}}
        tables["estimated cycles by kind"] = [
            {"kind": kind, "mcycles": of_kind / 1e6, "share": of_kind / cycles}
            for kind, of_kind in sorted(kinds.items(), key=lambda x: -x[1])
        ]
        tables["estimated cycles by line"] = dearest[: TOP.value]
    elif told["flops"]:
        row |= {"xla_tflop": told["flops"] / 1e12, "xla_gb": told["bytes"] / 1e9}
        row["bytes_ms"] = 1e3 * told["bytes"] / chip.bandwidth
    settings = {"what": WHAT.value, "model": config.model, "dtype": config.dtype, "quantised": config.quantised}
    settings |= {"mesh": dict(mesh.shape), "topology": TOPOLOGY.value, "source": "compiler's estimates, nothing ran"}
    if WHAT.value != "sampler":
        settings |= {"batch_size": config.train.batch_size, "cache": config.data.cache, "remat": config.train.remat}
    else:
        settings |= {**config.sampling}
    common.report("absent", settings, [row], **tables)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=commands.parse)
