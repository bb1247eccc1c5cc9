"""Preference datasets: what is read is what was written, in an order that can be repeated and resumed."""

import collections
import json
import shutil

import numpy as np
import pytest

from data_tools import dataset
from data_tools.build_preferences import png
from livo_jax import data, values
from livo_jax.values import text_hash

COUNTS = {"baker": 3, "cook": 5, "smith": 1}


def write(records, blocks, directory):
    with dataset.under_construction(directory, {}) as work:
        dataset.write(work, directory, records.__getitem__, blocks, {})


def make(directory, counts=COUNTS, values=("shape equality", "colour equality")):
    """A dataset whose images tell who they are: channels are (value and scene, number in the block, side)."""
    records, blocks = [], []
    for value in values:
        for scene, count in counts.items():
            blocks.append(data.Block(value, scene, len(records), count))
            for i in range(count):
                aligned, violating = (png(np.full((32, 32, 3), (len(blocks), i, side), np.uint8)) for side in (0, 255))
                records.append(
                    dict(prompt=f"a {scene}", value=value, scene=scene, aligned=aligned, violating=violating,
                         provenance="{}")
                )  # fmt: skip
    write(records, blocks, directory)
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data") / "preferences")


@pytest.fixture
def copy(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "preferences")


def tokenize(texts):
    return np.array([[text_hash(text) % 1000, len(text)] for text in texts], np.int32)


def iterate(directory, batch_size=3, seed=0, **settings):
    settings = dict(image_size=32, random_flip=False) | settings
    return data.batches(data.Preferences(directory), tokenize, batch_size=batch_size, seed=seed, **settings)


def names(batch, side):
    """Which images a batch holds: (block, number in the block)."""
    pixels = np.round((batch[side][:, 0, 0] + 1) * 127.5).astype(int)
    assert (pixels[:, 2] == (255 if side == "violating" else 0)).all()
    return [tuple(p[:2]) for p in pixels]


def test_an_epoch_walks_the_aligned_images_and_partners_share_their_scene(directory):
    batches, total = iterate(directory), 2 * sum(COUNTS.values())
    partners = collections.defaultdict(set)
    for epoch in range(20):
        walked = []
        for _ in range(total // 3):
            batch = next(batches)
            assert batch["aligned"].dtype == np.float32 and batch["prompt_ids"].dtype == np.int32
            aligned, violating = names(batch, "aligned"), names(batch, "violating")
            assert [block for block, _ in aligned] == [block for block, _ in violating]
            for a, v in zip(aligned, violating):
                partners[a].add(v)
            for (block, _), prompt, value_prompt in zip(aligned, batch["prompt_ids"], batch["value_prompt_ids"]):
                value, scene = ("shape equality", "colour equality")[(block - 1) // 3], list(COUNTS)[(block - 1) % 3]
                assert (prompt == tokenize([f"a {scene}"])).all()
                assert (value_prompt == tokenize([f"{value}, a {scene}"])).all()
            walked += aligned
        assert len(set(walked)) == total, f"epoch {epoch} leaves images out"
    assert len(partners[2, 0]) == 5 and len(partners[3, 0]) == 1, "partners are drawn from all of the scene"


def test_order_depends_on_the_seed_and_survives_a_restart(directory):
    take = lambda batches, n: [(names(b, "aligned"), names(b, "violating")) for b, _ in zip(batches, range(n))]
    whole = take(iterate(directory), 12)
    assert whole == take(iterate(directory), 12)
    assert whole != take(iterate(directory, seed=1), 12)
    first = iterate(directory)
    begun = take(first, 5)
    second = iterate(directory)
    second.set_state(first.get_state())
    # zip draws one batch more than it needs: begin the comparison from where the state stands
    assert take(second, 5) == take(iterate(directory), 12)[6:11] and begun == whole[:5]


def test_images_are_cropped_to_the_size_and_flipped_together(tmp_path):
    ramp = np.broadcast_to(np.arange(60, dtype=np.uint8)[None, :, None], (40, 60, 3))
    decoded = data.decode(png(ramp), 40)
    assert decoded.shape == (40, 40, 3)
    assert np.allclose((decoded[0, :, 0] + 1) * 127.5, np.arange(10, 50), atol=1e-4), "the centre is kept"
    assert np.array_equal(data.decode(png(ramp), 40, flip=True), decoded[:, ::-1])
    assert data.decode(png(ramp), 20).shape == (20, 20, 3)

    record = dict(prompt="a", value="shape equality", scene="a", aligned=png(ramp), violating=png(ramp), provenance="")
    write([record], [data.Block("shape equality", "a", 0, 1)], tmp_path / "ramp")
    batch = next(iterate(tmp_path / "ramp", batch_size=32, image_size=40, random_flip=True))
    assert np.array_equal(batch["aligned"], batch["violating"])
    rising = batch["aligned"][:, 0, -1, 0] > batch["aligned"][:, 0, 0, 0]
    assert 0 < rising.sum() < 32


def damage(path, keep: float):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def test_what_is_missing_or_half_written_is_said(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="no preference dataset.*build_preferences"):
        data.Preferences(tmp_path / "nowhere")
    (records,) = copy.glob("*.array_record*")
    damage(records, 0.7)
    with pytest.raises(ValueError, match="is damaged"):
        data.Preferences(copy)
    records.unlink()
    with pytest.raises(ValueError, match="half-written, without .*array_record"):
        data.Preferences(copy)


@pytest.mark.parametrize("splits", [[], [{"name": "train", "shardLengths": ["0"], "numBytes": "0"}]])
def test_an_empty_dataset_is_refused(copy, splits):
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps(info | {"splits": splits}))
    with pytest.raises(ValueError, match="is an empty dataset: make one with"):
        data.Preferences(copy)


def test_blocks_that_do_not_match_are_refused(copy):
    (copy / "metadata.json").write_text('{"blocks": [{"value": "a", "scene": "b", "start": 0, "count": 2}]}')
    with pytest.raises(ValueError, match="its blocks and its records differ"):
        data.Preferences(copy)


def test_values_must_be_the_configs(directory):
    preferences = data.Preferences(directory)
    preferences.check_values(values.load(("colour", "shape")))
    with pytest.raises(ValueError, match=r"\['colour equality', 'shape equality'\], the config lists \['bloody con"):
        preferences.check_values(values.load(("bloody",)))
