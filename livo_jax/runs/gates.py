"""What opens a value's gate: how far its token moves predictions of its pairs, and of its anchors."""

import jax
import numpy as np

from livo_jax import seeds, sharding
from livo_jax.data.batches import batches
from livo_jax.training.effects import make_effects
from livo_jax.training.objective import Networks
from livo_jax.value_encoders.gates import Gate

ROWS = 128  # of a value, half of them anchors


def read_rows(value, preferences, tokenize, cache, **reading):
    """The batches of a value's pairs, half of them anchors where these can be made, which gates are measured on."""
    rows = batches(preferences, tokenize, cache, only=value.statement, anchors=0.5, **reading)
    return (next(rows) for _ in range(-(-ROWS // reading["batch_size"])))


def check_anchors(preferences, tokenize, cache, **reading):
    """Raises ValueError with the values of whose pairs no anchor can be made. Arguments as `measure` has them."""
    given = preferences, tokenize, cache
    without = [
        repr(value.statement)
        for value in reading["principles"]
        if not any(batch.anchor.any() for batch in read_rows(value, *given, **reading))
    ]
    if without:
        raise ValueError(
            f"config.sampling.gated=True: no anchor can be made of the pairs of {', '.join(without)}, which do not tell"
            " what they show (provenance): set it to False, or build pairs here"
        )


def measure(networks: Networks, params, frozen, mesh, preferences, tokenize, cache, **reading):
    """(statement, Gate) of each value.

    At each timestep the least effect is half way, by logarithms, from what 95% of its anchors stay below to what 95% of
    its pairs are above: where these overlap, it errs on both sides alike.

    Args:
        networks, params, frozen: as objective.make_loss has them, on the mesh.
        preferences, tokenize, cache, reading: as data.batches has them; the values are its `principles`.

    Raises:
        ValueError: values that move their pairs no further than their anchors at most timesteps; all are listed.
    """
    effects_of, gates, problems = jax.jit(make_effects(networks)), [], []
    for value in reading["principles"]:
        anchors, found = [], []
        for n, batch in enumerate(read_rows(value, preferences, tokenize, cache, **reading)):
            batch = sharding.global_batch(mesh, batch)
            with jax.set_mesh(mesh):  # which the attention kernels ask for
                told, effects = effects_of(params, frozen, batch, jax.random.fold_in(seeds.key(reading["seed"]), n))
            anchors.append(sharding.fetch(batch.anchor))
            found.append(sharding.fetch(effects))
        anchor, effects, told = np.concatenate(anchors), np.concatenate(found, axis=1), sharding.fetch(told)
        own, left_alone = effects[:, ~anchor], effects[:, anchor]
        if np.mean(np.median(own, axis=1) > np.median(left_alone, axis=1)) < 0.5:
            problems.append(repr(value.statement))
        least = np.sqrt(np.quantile(own, 0.05, axis=1) * np.quantile(left_alone, 0.95, axis=1))
        gates.append((value.statement, Gate(tuple(told.tolist()), tuple(least.tolist()))))
    if problems:
        raise ValueError(
            f"values that move their pairs no further than their anchors: {', '.join(problems)}. A gate would choose at"
            " random: set config.sampling.gated=False, or train longer"
        )
    return tuple(gates)
