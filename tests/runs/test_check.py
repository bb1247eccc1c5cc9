"""What is wrong with a config is told at once, and before anything is loaded."""

import pytest

from configs import tiny
from livo_jax import sharding
from livo_jax.runs import restore
from livo_jax.runs.train import train_and_evaluate


def test_what_shows_without_a_model_is_told_before_one_is_looked_for(tmp_path):
    config = tiny.get_config("smoke")
    config.model, config.data.directory = "no/such-model", str(tmp_path)
    config.train.batch_size, config.train.ema_decay, config.loss.form = 0, 2.0, "liwo"
    config.judge, config.sampling.guidance_scale, config.quantised = "nojudge", float("nan"), "int4"
    config.checkpoint.keep, config.eval.images_per_prompt, config.eval.keep_probabilities = 0, 0, (0.5, 1.5)
    config.eval.seen, config.eval.held_out, config.eval.template = (), (), "a photo"
    config.train.grad_clip, config.train.learning_rate, config.train.weight_decay = 0.0, -1e-4, float("nan")
    config.train.b2, config.loss.beta, config.eval.left_alone_images = 1.0, -5.0, -1
    config.eval.strengths, config.loss.timesteps = (float("nan"),), (0.0, 500)
    config.preferences.scenes, config.eval.ratios = ("cook,baker",), ("equals", '{"round": 2}', "equal")
    config.preferences.images_per_file, config.preferences.templates = 0, ("a {}", "{subject}")
    with pytest.raises(ValueError, match="the config cannot work") as error:
        train_and_evaluate(config, tmp_path / "run")
    for told in (
        "config.train.batch_size=0: ", "config.train.ema_decay=2.0: choose", "config.loss.form='liwo': choose",
        "config.judge='nojudge': choose from ", "config.sampling.guidance_scale=nan: choose a finite number",
        "config.quantised='int4': choose from int8, fp8, or '' for none", "config.checkpoint.keep=0: choose at least 1",
        "config.eval.images_per_prompt=0: choose", "config.eval.keep_probabilities has 1.5: ",
        "held_out and prompts are empty: there is nothing to draw",
        "config.eval.template='a photo': it needs {} for the subject",
        "config.preferences.images_per_file=0: choose at least 1",
        "config.preferences.templates='{subject}': it needs {} for the subject, and no other",
        "config.train.grad_clip=0.0: choose above 0, inf for no clipping", "config.train.learning_rate=-0.0001: choose",
        "config.train.weight_decay=nan: choose 0 or more", "config.train.b2=1.0: choose 0 to below 1",
        "config.loss.beta=-5.0: choose 0 or more", "config.eval.left_alone_images=-1: choose", "strengths has nan: ",
        "config.loss.timesteps=(0.0, 500): choose two", "config.preferences.scenes=('cook,baker',): each is a text",
        "config.eval.ratios: 'equals' is neither 'equal'", "(round, square) sum to 2, not to 1",
    ):  # fmt: skip
        assert told in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_loss_of_ratios_has_a_slope(tmp_path):
    config = tiny.get_config("smoke")
    config.method, config.loss.form, config.loss.beta, config.data.directory = "ipo", "ipo", 0.0, str(tmp_path)
    with pytest.raises(ValueError, match="config.loss.beta=0.0: ipo wants it above 0"):
        train_and_evaluate(config, tmp_path / "run")


def test_a_model_that_is_made_for_no_guidance_is_known_as_such(published):
    config = tiny.get_config()
    config.model = str(published)
    for distilled in (False, True):
        config.guidance_distilled = distilled
        assert restore.load_base(config, sharding.make_mesh(1)).guidance_distilled is distilled
