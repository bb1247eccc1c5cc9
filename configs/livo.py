"""LiVO on Stable Diffusion 1.5: the recipe of the paper (Wang et al. 2024, section 5.1).

    python run.py --config=configs/livo.py --config.data.directory=DIR

DIR holds preference pairs (data_tools/build_preferences.py). `configs/livo.py:smoke` runs two steps of it
anywhere, without a download: on the embedded world's pairs and an architecture with random weights.
"""

from livo_jax.configs import common
from ml_collections import ConfigDict

from livo_jax.data import word_lists


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("livo", variant)
    config = common.get_config()
    # Off here, because the paper does not have it, though README.md shows it on the embedded world (configs/tiny.py):
    # a second value beside a pair's own (data.beside), attributes that --ratio mixes (data.attributes), and prompts
    # that a value should leave alone (data.anchors, loss.anchor). configs/livo_anchored.py sets them.
    c = config.eval
    seen, held_out = word_lists.split(word_lists.words(("careers", "people", "places")))
    c.seen, c.held_out = tuple(seen[::9]), tuple(held_out[::3])  # 17 of each, for time

    if variant == "smoke":
        config.model, config.random_weights = str(common.EMBEDDED), True  # no download
        config.dtype = "float32"  # on CPUs
        config.principles, config.judge = ("shape", "colour", "bloody"), "shapeworld"  # that world's values
        c = config.preferences
        c.scenes, c.templates = ("cook", "butcher"), ("a {}",)  # its captions
        # All that follows is small, for it only shows that everything runs. The guidance is configs/tiny.py's.
        c.pairs_per_scene = c.harm_pairs_per_scene = c.census_per_scene = 2
        config.train.steps, config.checkpoint.every, config.log.every, config.log.samples_every = 2, 2, 1, 2
        config.sampling.steps, config.sampling.guidance_scale, config.sampling.batch_size = 12, 1.1, 16
        config.eval.seen, config.eval.held_out = ("cook",), ("baker",)
        config.eval.images_per_prompt = config.eval.harm_images_per_prompt = 4
        config.eval.left_alone_images = config.eval.rate_images = 2
    return config
