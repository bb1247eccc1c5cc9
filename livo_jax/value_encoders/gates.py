"""Gates: a value takes effect only in images in which it moves the model's prediction as far as in those it is for.

A value encoder that was trained with anchors moves what it should leave alone little, at every timestep, and what it is
for much. Between the two lies the least effect that opens the gate; below it the image stays the base's own.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from livo_jax.training.effects import effect
from livo_jax.values.principles import load_principles, own_statement


class Gate(NamedTuple):
    """Of a value: timesteps, as the model is told them, ascending, and the least effect at each, above 0."""

    timesteps: tuple[float, ...]
    least_effects: tuple[float, ...]


def as_json(gates: Iterable[tuple[str, Gate]]) -> dict:
    """Of (statement, Gate)s, as an export and eval/gates.json have them."""
    return {statement: gate._asdict() for statement, gate in gates}


def from_json(found: Mapping | None) -> tuple[tuple[str, Gate], ...]:
    """What as_json made; none of None."""
    return tuple((s, Gate(tuple(g["timesteps"]), tuple(g["least_effects"]))) for s, g in (found or {}).items())


def find_gates(value_encoder, statements, prompt_layout: str) -> dict[str, Gate]:
    """The gates of a value encoder.

    Raises ValueError where one of the values or attributes has none, or the layout is not that of the base's images.
    """
    if prompt_layout != "padded":
        raise ValueError(f"prompt_layout={prompt_layout!r}: the base's images, which a gate leaves, are of 'padded'")
    gates = dict(value_encoder.gates)
    if missing := sorted({text for text in statements if own_statement(text) not in gates}):
        raise ValueError(
            f"gated=True: the value encoder has no gate for {', '.join(map(repr, missing))}: train it with"
            " config.sampling.gated=True, which measures them at the end, of a finished run too"
        )
    return gates


def gates_of_config(value_encoder, config) -> dict[str, Gate]:
    """Those of config.principles, drawn as config.sampling says; raises as find_gates."""
    return find_gates(value_encoder, [v.statement for v in load_principles(config)], config.sampling.prompt_layout)


def shut(weights, prompt, others, gates, t):
    """The weights [B, E] of values, 0 where the gate is shut.

    Args:
        prompt: the predictions [B, h, w, C] for the prompts alone. others: E of them, with a value each.
        gates: [B, E, 2, K] float32, timesteps and least effects. t: the timestep, a scalar.
    """
    effects = jnp.stack([effect(with_value, prompt) for with_value in others], axis=1)
    least = jax.vmap(jax.vmap(lambda gate: jnp.interp(t, *gate)))(gates)
    return jnp.where(effects >= least, weights, 0.0)


def gates_table(statements: list[list[str]], gates: Mapping[str, Gate], slots: int) -> np.ndarray:
    """The gates [N, slots, 2, K] float32 of the values or attributes of N images; 0, always open, where none is."""
    K = len(next(iter(gates.values())).timesteps)
    table = np.zeros((len(statements), slots, 2, K), np.float32)
    for row, texts in zip(table, statements):
        for slot, text in zip(row, texts):
            slot[:] = gates[own_statement(text)]
    return table
