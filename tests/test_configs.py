"""configs/common.py has every field."""

import importlib

import pytest

from configs import common
from livo_jax.files.settings import flatten


@pytest.mark.parametrize("name", ["livo", "sdxl", "tiny"])
@pytest.mark.parametrize("variant", ["", "smoke"])
def test_a_config_sets_fields_that_there_are(name, variant):
    """A ConfigDict takes a misspelt field without a word."""
    config = importlib.import_module(f"configs.{name}").get_config(variant)
    assert flatten(config.to_dict()).keys() == flatten(common.get_config().to_dict()).keys()
