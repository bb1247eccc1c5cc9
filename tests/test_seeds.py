"""Every whole number from 0 to 2**63 - 1 is a seed of its own."""

import jax
import numpy as np
import pytest

from livo_jax import seeds
from livo_jax.sampling import generate
from livo_jax.sampling.requests import Request, requests_of

SEEDS = (0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**63 - 1)


def data(key) -> np.ndarray:
    return np.asarray(jax.random.key_data(key))


def test_seeds_have_streams_of_their_own():
    keys = {data(seeds.key(seed)).tobytes() for seed in SEEDS}
    assert len(keys) == len(SEEDS)
    for seed in SEEDS[:4]:
        assert np.array_equal(data(seeds.key(seed)), data(jax.random.key(seed))), "as it was before"
    traced = jax.jit(jax.vmap(seeds.key_of))
    words = np.array([seeds.words(seed) for seed in SEEDS], np.uint32)
    assert np.array_equal(data(traced(*words.T)), [data(seeds.key(seed)) for seed in SEEDS])


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "1", None, True], ids=repr)
def test_what_is_no_seed_is_refused_by_its_name(seed):
    with pytest.raises(ValueError, match="config.seed=.*: choose a whole number from 0 to 9223372036854775807"):
        seeds.check(seed, "config.seed")
    with pytest.raises(ValueError, match="^seed="):
        requests_of(["a"], seed=seed)


def test_numpys_integers_are_seeds():
    requests = requests_of(["a"] * 20, "x", keep_probability=0.5, seed=np.int64(3))
    assert requests == requests_of(["a"] * 20, "x", keep_probability=0.5, seed=3)


def test_large_seeds_draw_other_images(small):
    sd, *_ = small
    images = [generate.generate(sd, [Request("a baker")], seed=seed, steps=1) for seed in (0, 2**32, 2**32 + 1)]
    assert len({image.tobytes() for image in images}) == 3
