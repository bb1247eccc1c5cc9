"""Compiles a training step for an accelerator that is not here, and tells the memory that it would take there.

    JAX_PLATFORMS=cpu python -m benchmarks.absent --config=configs/livo.py --config.model=benchmarks/sd15 \
        --config.data.cache=True --target=H200

Needs `jax[cuda13]` for the H200 and `libtpu` for TPUs, as those machines have them; no weights are made.
"""

import functools
import os
import time

from absl import app, flags, logging
from ml_collections import config_flags

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # nor a cloud to ask
os.environ["XLA_FLAGS"] = "--xla_gpu_enable_triton_gemm=false"  # nor a GPU to try tiles on: cuBLAS for all products

from benchmarks import common  # sets what jax reads when it is imported
from livo_jax import commands

# isort: split
import jax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType

from livo_jax import sharding, value_encoders
from livo_jax.runs import plan
from livo_jax.training.objective import make_loss, split_models
from livo_jax.training.optimizer import make_optimizer
from livo_jax.training.step import init_state, jit_step, make_train_step

# What XLA's compiler asks of a GPU.
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 } core_count: 132 fpus_per_core: 128 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 l2_cache_size: 52428800
  memory_bandwidth: 4800000000000 device_memory_size: 150000000000
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 2 } device_description_str: "NVIDIA H200"
"""
TARGETS = {
    "H200": dict(platform="cuda", topology_name="h200", target_config=H200, topology="1x1x1"),
    "TPU v5e": dict(platform="tpu", topology_name="v5e:2x2"),
    "TPU v5p": dict(platform="tpu", topology_name="v5p:2x2x1"),
}
CONFIG = config_flags.DEFINE_config_file("config", None, "The config whose step is compiled.")
TARGET = flags.DEFINE_enum("target", "H200", list(TARGETS), "What for; one device of it.")


def main(_):
    logging.set_verbosity(logging.WARNING)
    config = CONFIG.value
    jax.devices()  # the plug-ins are found
    device = topologies.get_topology_desc(**TARGETS[TARGET.value]).devices[0]
    mesh = jax.make_mesh((1, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=[device])

    def shapes_on(where, tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    sd, tx = plan.abstract_model(config), make_optimizer(config)
    untrained = nnx.eval_shape(lambda: value_encoders.make(config, sd))
    networks, params, frozen = split_models(sd, untrained, with_vae=not config.data.cache)
    state = jax.eval_shape(functools.partial(init_state, tx=tx, ema_decay=config.train.ema_decay), params)
    step = make_train_step(networks, tx, config, make_loss(networks, config))
    state, frozen = shapes_on(sharding.replicated(mesh), (state, frozen))
    batch = shapes_on(sharding.over_batch(mesh), plan.abstract_batch(sd, config, config.train.batch_size))
    start = time.perf_counter()
    compiled = jit_step(step, state, frozen, mesh).lower(state, frozen, batch).compile()
    seconds, memory, gib = time.perf_counter() - start, compiled.memory_analysis(), 2**30
    row = {
        "target": TARGET.value,
        "weights_state_batch_gib": memory.argument_size_in_bytes / gib,
        "temporary_gib": memory.temp_size_in_bytes / gib,
        "compile_s": seconds,
    }
    settings = {"model": config.model, "dtype": config.dtype, "batch_size": config.train.batch_size}
    common.report("absent", settings | {"cache": config.data.cache, "remat": config.train.remat}, [row])


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=commands.parse)
