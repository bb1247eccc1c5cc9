"""What a forward pass keeps for the backward pass, as a compiler does that fuses operations."""

import jax
import numpy as np
from jax.extend.core import Literal
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

# No fusion makes these a second time; nor sums, and functions that hold a loop or a choice of kernels.
MADE_ONCE = {"dot_general", "conv_general_dilated", "gather", "scatter", "scatter-add", "sort", "argmax", "random_bits",
             "pallas_call", "remat2", "cond", "while", "scan", "shard_map", "custom_vjp_call"}  # fmt: skip
UNIT = 1024  # bytes: flows are of 32 bits
ENDLESS = 2**30


def kept_for_backward(loss, params, *given) -> int:
    """Bytes of what the forward pass keeps, weights and what is given not counted.

    The backward pass asks for many results that are cheap to make again from others, as all elementwise ones. The
    fewest bytes from which it can have them all are a minimal cut between these and what is made once (He & Yu 2023,
    "Transcending Runtime-Memory Tradeoffs in Checkpointing by Being Fusion Aware").

    Args:
        loss: loss(params, *given) -> (loss, metrics). params, given: trees of arrays or their shapes.
    """

    def forward(params, *given):
        return jax.vjp(lambda params: loss(params, *given), params, has_aux=True)[1]

    jaxpr = jax.make_jaxpr(forward)(params, *given).jaxpr
    sizes, made_from, made_once = [], set(), []  # of results: UNITs; pairs of one and what is made of it; numbers

    def trace(jaxpr, inputs):
        """The numbers of a jaxpr's results, None for what is there anyway."""
        number = dict(zip(jaxpr.invars, inputs)) | dict.fromkeys(jaxpr.constvars)

        def read(variables):
            return [None if isinstance(v, Literal) else number[v] for v in variables]

        for equation in jaxpr.eqns:
            name, operands = equation.primitive.name, read(equation.invars)
            if name == "jit":
                results = trace(equation.params["jaxpr"].jaxpr, operands)
            else:
                results = range(len(sizes), len(sizes) + len(equation.outvars))
                sizes.extend(-(-v.aval.size * v.aval.dtype.itemsize // UNIT) for v in equation.outvars)
                if name in MADE_ONCE or (name.startswith("reduce_") and name != "reduce_precision"):
                    made_once.extend(results)
                else:
                    made_from.update((x, result) for result in results for x in operands if x is not None)
            number.update(zip(equation.outvars, results))
        return read(jaxpr.outvars)

    asked = set(trace(jaxpr, [None] * len(jaxpr.invars))) - {None}
    # Each result is two nodes, and as wide as its bytes between them.
    source, sink = 2 * len(sizes), 2 * len(sizes) + 1
    edges = [(2 * i, 2 * i + 1, size) for i, size in enumerate(sizes)]
    edges += [(2 * x + 1, 2 * result, ENDLESS) for x, result in made_from]
    edges += [(source, 2 * i, ENDLESS) for i in made_once] + [(2 * i + 1, sink, ENDLESS) for i in asked]
    start, end, width = np.array(edges, np.int32).T
    graph = csr_array((width, (start, end)), shape=(sink + 1, sink + 1))
    return int(maximum_flow(graph, source, sink).flow_value) * UNIT
