"""Counts the products of a traced program and of its Pallas kernels: as they are, and filled up to a matrix unit."""

import math
from collections.abc import Iterable

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def equations(jaxpr: Jaxpr, platform: str, times: int = 1) -> Iterable[tuple]:
    """The equations of a jaxpr that compute, and how often each runs on all devices together; a Pallas kernel is one.

    Of jax.lax.platform_dependent that of the platform. Of another choice all sides count; a while loop, whose length
    nobody knows, counts once.
    """
    chosen = {}
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "platform_index":
            names = params["platforms"]  # a tuple for each branch, None for the default
            branch = next((i for i, some in enumerate(names) if some and platform in some), None)
            chosen[equation.outvars[0]] = names.index(None) if branch is None else branch
            continue
        inner = [x for x in jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr) if _is_jaxpr(x)]
        if name == "pallas_call" or not inner:
            yield equation, times
            continue
        if name == "cond" and (index := chosen.get(equation.invars[0])) is not None:
            inner = [params["branches"][index]]
        for one in inner:
            repeats = {"scan": params.get("length"), "shard_map": getattr(params.get("mesh"), "size", 1)}.get(name, 1)
            yield from equations(getattr(one, "jaxpr", one), platform, times * repeats)


def _is_jaxpr(x) -> bool:
    return isinstance(x, ClosedJaxpr | Jaxpr)


def flops(jaxpr: Jaxpr, platform: str, unit: int = 1) -> int:
    """Of all matrix products and convolutions, those of kernels too, each side filled up to a multiple of `unit`."""
    return sum(times * flops_of(equation, platform, unit) for equation, times in equations(jaxpr, platform))


def flops_of(equation, platform: str, unit: int = 1) -> int:
    """Of one equation. A convolution is a product for each of its kernel's positions."""
    if equation.primitive.name == "pallas_call":
        grid = math.prod(equation.params["grid_mapping"].grid)
        return grid * flops(equation.params["jaxpr"], platform, unit)
    if equation.primitive.name not in ("dot_general", "conv_general_dilated"):
        return 0
    a, b = (x.aval.shape for x in equation.invars[:2])

    def filled(*sizes) -> int:
        size = math.prod(sizes)
        return -(-size // unit) * unit

    if equation.primitive.name == "dot_general":
        (contracted, contracted_b), (batch, batch_b) = equation.params["dimension_numbers"]
        rows = [n for axis, n in enumerate(a) if axis not in (*contracted, *batch)]
        columns = [n for axis, n in enumerate(b) if axis not in (*contracted_b, *batch_b)]
        if 1 in (math.prod(rows), math.prod(columns)):
            unit = 1  # of vectors, which other units multiply
        sides = filled(*rows) * filled(*columns) * filled(*(a[axis] for axis in contracted))
        return 2 * math.prod(a[axis] for axis in batch) * sides
    params = equation.params
    of_output, (out, into, *positions) = params["dimension_numbers"].out_spec, params["dimension_numbers"].rhs_spec
    made = [n for axis, n in enumerate(equation.outvars[0].aval.shape) if axis != of_output[1]]
    groups = params["feature_group_count"] * params["batch_group_count"]
    sides = filled(*made) * filled(b[out] // groups) * groups * filled(b[into])
    # Zeros that spread the input, in the gradient of a convolution with strides, are not multiplied.
    return 2 * sides * math.prod(b[axis] for axis in positions) // math.prod(params["lhs_dilation"])


def kernels(jaxpr: Jaxpr, platform: str) -> dict:
    """Shapes of a Pallas kernel's arguments and results, by which a program's text knows it -> its equation."""

    def shapes(variables):
        return tuple(x.aval.shape for x in variables)

    found = [equation for equation, _ in equations(jaxpr, platform) if equation.primitive.name == "pallas_call"]
    return {(shapes(equation.invars), shapes(equation.outvars)): equation for equation in found}
