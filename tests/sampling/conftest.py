"""What the tests of drawing share."""

import pytest

from livo_jax import ValueEncoder, sharding
from livo_jax.sampling.requests import Dose

# One device and one image at once: what is compared here depends on neither, as one test shows.
SETTINGS = dict(steps=4, guidance_scale=3.0, batch_size=1, mesh=sharding.make_mesh(1))
VALUE, OTHER = "shape equality", "colour equality"
DOSE = (Dose(VALUE),)


@pytest.fixture(scope="module")
def value_encoder(published):
    return ValueEncoder.from_pretrained(published / "text_encoder")
