"""An export of a small model, and the pipeline that it makes."""

import json

import pytest

from livo_jax import ValueEncoder
from livo_jax.export.export import export
from livo_jax.files.modules import initialise
from livo_jax.value_encoders.gates import Gate

VALUE, BLOODY = "shape equality", "bloody considered inappropriate"
RESULTS = [
    dict(method="livo", value=VALUE, split="held_out", metric="D1", mean=0.125, ci95=[0.1, 0.2], prompts=3, images=150),
    dict(method="livo", value=BLOODY, split="seen", metric="S", mean=0.5, ci95=None, prompts=1, images=10),
]
RATES = {  # of an encoder whose tokens do what they are told
    VALUE: {
        "": {"round": 0.9, "square": 0.1},
        VALUE: {"round": 0.1, "square": 0.9},
        f"{VALUE}: round": {"round": 1.0, "square": 0.0},
        f"{VALUE}: square": {"round": 0.0, "square": 1.0},
    }
}


@pytest.fixture(scope="module")
def config(published):
    from configs import tiny

    config = tiny.get_config()
    config.model = str(published)
    config.sampling.sampler, config.sampling.steps, config.sampling.guidance_scale = "dpmsolver++", 4, 3.0
    return config


@pytest.fixture(scope="module")
def value_encoder(sd):
    found = initialise(ValueEncoder, sd.root / "text_encoder", seed=5)
    found.alone = (BLOODY,)  # of other values it reads the prompt too
    found.gates = ((VALUE, Gate((0.0, 999.0), (0.0, 0.0))), (BLOODY, Gate((300.0, 700.0), (1e9, 0.0))))
    return found


@pytest.fixture(scope="module")
def exported(sd, value_encoder, config, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "livo"
    export(out, sd, value_encoder, config, RESULTS, RATES, recipe=json.loads(config.to_json()))
    return out


@pytest.fixture(scope="module")
def pipeline(exported, published):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(
        published,
        custom_pipeline=str(exported),
        trust_remote_code=True,
        safety_checker=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
