"""configs/common.py has every field."""

import importlib

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import baselines, benchmark, common, livo, tiny, trainings_tiny
from livo_jax.evaluation import objects
from livo_jax.files.settings import flatten
from livo_jax.judges import Judge, detector, shapeworld
from livo_jax.runs import further, plan

MAPS = ("eval.harmful_wordings", "eval.left_alone_wordings", "eval.compositions")  # whose keys are a config's own


def fields(config) -> set[str]:
    return {name for name in flatten(config.to_dict()) if not name.startswith(MAPS)}


@pytest.mark.parametrize("name", ["flow_tiny", "livo", "livo_anchored", "sd35", "sdxl", "tiny"])
@pytest.mark.parametrize("variant", ["", "smoke"])
def test_a_config_sets_fields_that_there_are(name, variant):
    config = importlib.import_module(f"configs.{name}").get_config(variant)
    assert fields(config) == fields(common.get_config())
    assert all(isinstance(config.eval[name.partition(".")[2]], ConfigDict) for name in MAPS)
    with pytest.raises(AttributeError, match='Did you mean "model" instead of "modle"'):
        config.modle = "mine"
    config.eval.harmful_wordings.mine = ("red {subject}",)  # a config's own


def test_a_methods_own_section_is_as_strict_and_leaves_the_rest_as_it_was():
    config = baselines.start("tiny", "mine", weight=1.0)
    config.mine.weight = 2.0
    for section, field in ((config, "modle"), (config.mine, "wieght"), (config.eval, "sed")):
        with pytest.raises(AttributeError):
            setattr(section, field, 1)
    config.train.learning_rates.mine = 1e-3  # a map, whose keys are a config's own


@pytest.mark.parametrize("variant", ["", "smoke"])
def test_several_trainings_are_of_the_recipe_of_tiny(variant):
    config, recipe = trainings_tiny.get_config(variant), tiny.get_config(variant)
    (own,) = config.methods.values()
    assert config.trainings == 3 and own.train == recipe.train and own.loss == recipe.loss and own.data == recipe.data
    stated = {name for composition in own.eval.compositions.values() for name in composition} - {"wording"}
    assert stated <= shapeworld.judge(np.zeros((1, 32, 32, 3), np.uint8)).keys(), "what the judge reads"


@pytest.mark.parametrize("variant", ["", "smoke"])
def test_a_board_measures_every_method_alike(variant):
    config = benchmark.get_config(variant)
    livo = config.methods.livo
    assert all(own.eval == livo.eval and own.judge == livo.judge for own in config.methods.values())
    assert {*config.quality} == {"inception", "reference", "clip"} and livo.eval.left_alone_images
    for entry in config.judges.values():
        followed = [text.partition("=")[0] for text in entry.reads]
        assert {*followed} <= {*livo.principles} and entry.judging.keys() == livo.judging.keys()
        states = entry.get("states").to_dict()
        assert not further.problems_of_states(states, livo)
        found = Judge(None, objects=detector.COCO, colours=detector.COLOURS)
        assert not objects.unread([stated["objects"] for stated in states.values() if stated], found)
    assert variant or {*livo.eval.compositions} < {*states}, "of all of them, and of a set"


@pytest.mark.parametrize("name", ["sd15", "sd35_large", "sd35_medium", "sd35_small", "sdxl", "sdxl_small"])
def test_the_architectures_here_are_of_parts_that_belong_together(name):
    """Plans, the configs' smoke and the benchmarks open them; their tokenizer is the embedded world's."""
    config = livo.get_config()
    config.model = f"benchmarks/{name}"
    sd = plan.abstract_model(config)
    ids = sd.tokenize(["a photo of a baker"])
    assert ids.max() < min(tower.vocab_size for tower in sd.text_encoder.config.towers)
