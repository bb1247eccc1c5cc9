"""Compiles a training step for an accelerator that is not here, and tells what its compiler knows of it.

    python -m benchmarks.absent --config=configs/livo.py --config.model=benchmarks/sd15 --config.data.cache=True \
        --target="TPU v5e" --topology=4x4

Needs `libtpu` for TPUs and `jax[cuda13]` for GPUs, as those machines have them. No weights are made, nothing runs.
Times of a TPU are its compiler's estimates: the cycles of all instructions, one after another. Pallas kernels have
none: for them stands the limit that their products, filled up to the matrix unit, or the bytes that they read and write
once, set at the chip's peak. Of a GPU there are counts alone. A second start takes the compiled program from JAX's
cache.
"""

import functools
import os
import time
from typing import NamedTuple

from absl import app, flags, logging
from ml_collections import config_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "true")
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver
os.environ["XLA_FLAGS"] = "--xla_gpu_enable_triton_gemm=false"  # nor a GPU to try tiles on: cuBLAS for all products
os.environ |= {
    "TPU_SKIP_MDS_QUERY": "1",  # nor a cloud to ask: what it would say is asked of these
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several may compile at once
}

from benchmarks import arithmetic, common, hlo  # common sets what jax reads when it is imported
from livo_jax import commands

# isort: split
import jax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType

from livo_jax import methods, sharding
from livo_jax.runs import check, plan, restore
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


def trace_step(config, mesh):
    """The training step of a config, traced for shapes on the mesh."""
    check.check_config(config, mesh)
    sd, method, tx = plan.abstract_model(config), methods.make_method(config), make_optimizer(config)
    check.check_with_model(config, sd, judge=False)
    trained = nnx.eval_shape(lambda unet: method.make_module(methods.with_unet(sd, unet)), sd.unet)
    restore.compute_on(mesh, config, sd, trained)
    networks, params, frozen = split_models(sd, trained, with_vae=not config.data.cache)
    state = jax.eval_shape(functools.partial(init_state, tx=tx, ema_decay=config.train.ema_decay), params)

    def on(where, tree):
        return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, where)

    def everywhere(where, tree):
        return on(jax.tree.map(lambda _: where, tree), tree)

    state = on(sharding.by_rules(state, mesh, trained.RULES), state)
    if config.shard_frozen:
        frozen = {name: on(sharding.by_rules(part, mesh), part) for name, part in frozen.items()}
    else:
        frozen = everywhere(sharding.replicated(mesh), frozen)
    batch = everywhere(sharding.over_batch(mesh), plan.abstract_batch(sd, config, config.train.batch_size))
    step = make_train_step(networks, tx, config, method.make_loss(networks))
    return jit_step(step, state, frozen, mesh).trace(state, frozen, batch)


def kernel_rows(work: list[hlo.Work], jaxpr, chip: plan.Chip, unit: int) -> list[dict]:
    """Pallas kernels, like ones counted: FLOPs as they are and filled up, bytes, and the seconds that these set."""
    known, rows = arithmetic.kernels(jaxpr, "tpu"), {}
    for x in work:
        if x.kind != "kernel":
            continue
        given = " ".join(shape for _, shape in x.operands)
        equation = known[hlo.sizes(given), hlo.sizes(x.shape)]
        flops, filled = (arithmetic.flops_of(equation, "tpu", side) for side in (1, unit))
        moved = hlo.memory(given)[0] + x.bytes
        seconds = max(filled / chip.flops, moved / chip.bandwidth)
        row = {"kernel": x.name.rsplit(".", 1)[0], "of": str(hlo.sizes(x.shape)[0]), "count": 0}
        row |= {"gflop": flops / 1e9, "filled_gflop": filled / 1e9, "mb": moved / 1e6, "limit_ms": 1e3 * seconds}
        rows.setdefault(tuple(row.values()), row)["count"] += x.times
    return sorted(rows.values(), key=lambda row: -row["limit_ms"] * row["count"])


def main(_):
    logging.set_verbosity(logging.WARNING)
    config, target = CONFIG.value, TARGET.value
    chip, tpu, gib = plan.CHIPS[target], TPUS.get(target), 2**30
    devices = devices_of(target, TOPOLOGY.value)
    shape = sharding.mesh_shape(len(devices), **config.mesh)
    mesh = jax.make_mesh(
        shape, sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[: shape[0] * shape[1] * shape[2]]
    )
    traced, hits = trace_step(config, mesh), []
    jax.monitoring.register_event_listener(
        lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else 0
    )
    start = time.perf_counter()
    compiled = traced.lower().compile()
    seconds, memory, text = time.perf_counter() - start, compiled.memory_analysis(), compiled.as_text()
    if TEXT.value:
        with open(TEXT.value, "w") as file:
            file.write(text)
    work, jaxpr = hlo.read(text), traced.jaxpr.jaxpr
    platform = "tpu" if tpu else "cuda"
    flops = arithmetic.flops(jaxpr, platform) / mesh.size
    row = {
        "target": target,
        "chips": mesh.size,
        "weights_state_batch_gib": memory.argument_size_in_bytes / gib,
        "temporary_gib": memory.temp_size_in_bytes / gib,
        "compile_s": seconds,
        "from_cache": bool(hits),
        "tflop": flops / 1e12,
        "peak_ms": 1e3 * flops / chip.flops,
    }
    tables = {"collectives": hlo.collectives(work), "buffers": hlo.buffers(work, LEAST_MIB.value * 2**20)}
    if tpu:
        cycles = sum(x.cycles or 0 for x in work)
        tables["kernels"] = kernel_rows(work, jaxpr, chip, tpu.unit)
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
    else:
        counted = compiled.cost_analysis()
        row |= {"xla_tflop": counted["flops"] / 1e12, "xla_gb": counted["bytes accessed"] / 1e9}
        row["bytes_ms"] = 1e3 * counted["bytes accessed"] / chip.bandwidth
    settings = {"model": config.model, "dtype": config.dtype, "batch_size": config.train.batch_size}
    settings |= {"mesh": dict(mesh.shape), "topology": TOPOLOGY.value}
    settings |= {"cache": config.data.cache, "remat": config.train.remat, "source": "compiler's estimates, nothing ran"}
    common.report("absent", settings, [row], **tables)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=commands.parse)
