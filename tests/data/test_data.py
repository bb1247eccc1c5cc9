"""Preference datasets: what is read is what was written, in an order that can be repeated and resumed."""

import collections
import itertools
import json
import shutil

import numpy as np
import pytest

from configs import tiny
from livo_jax import data, values
from livo_jax.data import dataset
from livo_jax.runs.build_preferences import png
from livo_jax.values.principles import text_hash

COUNTS = {"baker": 3, "cook": 5, "smith": 1}
BLOODY = "bloody considered inappropriate"
SHOWN = {"shape equality": ("square",), "colour equality": ("green", "white"), BLOODY: ("",)}  # on aligned images
USUAL = {"shape equality": "round", "colour equality": "blue", BLOODY: ""}  # on violating ones


def write(records, blocks, directory):
    with dataset.under_construction(directory, {}) as work:
        dataset.write(work, directory, records.__getitem__, blocks, {})


def picture(*channels):
    """PNG bytes of an image whose first row has these channels, and whose mirror image differs below."""
    image = np.full((32, 32, 3), channels, np.uint8)
    image[1:, :8] = 255 - image[1:, :8]
    return png(image)


def make(directory, counts=COUNTS, values=("shape equality", "colour equality")):
    """A dataset whose images tell who they are: channels are (value and scene, number in the block, side)."""
    records, blocks = [], []
    for value in values:
        for scene, count in counts.items():
            blocks.append(data.Block(value, scene, len(records), count))
            for i in range(count):
                aligned, violating = (picture(len(blocks), i, side) for side in (0, 255))
                records.append(
                    dict(prompt=f"a {scene}", value=value, scene=scene, aligned=aligned, violating=violating,
                         provenance=json.dumps({"aligned_shows": SHOWN[value][i % len(SHOWN[value])],
                                                "violating_shows": USUAL[value]}))
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
    pixels = np.round((getattr(batch, side)[:, 0, 0] + 1) * 127.5).astype(int)
    assert (pixels[:, 2] == (255 if side == "violating" else 0)).all()
    return [tuple(p[:2]) for p in pixels]


def test_an_epoch_walks_the_aligned_images_and_partners_share_their_scene(directory):
    batches, total = iterate(directory), 2 * sum(COUNTS.values())
    partners = collections.defaultdict(set)
    for epoch in range(20):
        walked = []
        for _ in range(total // 3):
            batch = next(batches)
            assert batch.aligned.dtype == np.float32 and batch.prompt_ids.dtype == np.int32
            aligned, violating = names(batch, "aligned"), names(batch, "violating")
            assert [block for block, _ in aligned] == [block for block, _ in violating]
            for a, v in zip(aligned, violating):
                partners[a].add(v)
            for (block, _), prompt, value_prompt in zip(aligned, batch.prompt_ids, batch.value_prompt_ids):
                value, scene = ("shape equality", "colour equality")[(block - 1) // 3], list(COUNTS)[(block - 1) % 3]
                assert (prompt == tokenize([f"a {scene}"])).all()
                assert (value_prompt == tokenize([f"{value}, a {scene}"])).all()
            walked += aligned
        assert len(set(walked)) == total, f"epoch {epoch} leaves images out"
    assert len(partners[2, 0]) == 5 and len(partners[3, 0]) == 1, "partners are drawn from all of the scene"


def test_one_value_may_be_read_alone(directory):
    batches, count = iterate(directory, only="colour equality"), sum(COUNTS.values())
    walked = [name for _ in range(count // 3) for name in names(next(batches), "aligned")]
    assert len({*walked}) == count and {block for block, _ in walked} == {4, 5, 6}


@pytest.mark.parametrize("paired", [True, False])
def test_a_loss_that_compares_pairs_gets_those_of_one_prompt(tmp_path, paired):
    """Images tell their prompt: those of the n-th record are of value n."""
    shades = [png(np.full((32, 32, 3), 10 * i, np.uint8)) for i in range(6)]
    record = dict(value="shape equality", scene="cook", provenance="")
    prompts = ["a cook", "the cook at work"] * 3
    records = [record | dict(prompt=p, aligned=shades[i], violating=shades[i]) for i, p in enumerate(prompts)]
    write(records, [data.Block("shape equality", "cook", 0, 6)], tmp_path / "pairs")
    batches, met = iterate(tmp_path / "pairs", batch_size=6, paired=paired), set()
    for _ in range(30):
        batch = next(batches)
        aligned, violating = (
            np.round((x[:, 0, 0, 0] + 1) * 12.75).astype(int) for x in (batch.aligned, batch.violating)
        )
        met |= {*zip(aligned.tolist(), violating.tolist())}
    assert met == {(a, v) for a in range(6) for v in range(6) if not paired or a % 2 == v % 2}


def take(batches, n: int) -> list[tuple]:
    """The names of the images of n batches; one batch more is used up."""
    return [(names(b, "aligned"), names(b, "violating")) for b, _ in zip(batches, range(n))]


def test_order_depends_on_the_seed_and_survives_a_restart(directory):
    whole = take(iterate(directory), 12)
    assert whole == take(iterate(directory), 12)
    assert whole != take(iterate(directory, seed=1), 12)
    first = iterate(directory)
    begun = take(first, 5)
    second = iterate(directory)
    second.set_state(first.get_state())
    assert take(second, 5) == take(iterate(directory), 12)[6:11] and begun == whole[:5]


def texts(directory, n=100, names=("shape", "colour", "bloody"), **shares):
    """Rows of n batches of 8: (prompt, value prompt, side of the aligned image, second value's prompt or None)."""
    known = {}

    def tokenize(rows):
        known.update((text_hash(text) % 2**31, text) for text in rows)
        return np.array([[text_hash(text) % 2**31] for text in rows], np.int64)

    batches = data.batches(
        data.Preferences(directory), tokenize, batch_size=8, image_size=32, random_flip=False, seed=0,
        principles=values.load(names), **shares,
    )  # fmt: skip
    for _, batch in zip(range(n), batches):
        sides = ["aligned" if x < 0 else "violating" for x in batch.aligned[:, 0, 0, 2]]
        hidden = [{}] * 8 if batch.beside is None else zip(batch.beside, batch.beside_prompt_ids[:, 0])
        for k, (side, second) in enumerate(zip(sides, hidden)):
            prompt, value = (known[getattr(batch, name)[k, 0]] for name in ("prompt_ids", "value_prompt_ids"))
            yield prompt, value, side, known[second[1]] if second and second[0] else None


def test_some_pairs_have_a_second_value_beside_their_own(directory):
    rows = list(texts(directory, beside=0.3))
    seconds = [(prompt, value, second) for prompt, value, _, second in rows if second]
    assert len(seconds) / len(rows) == pytest.approx(0.3, abs=0.06)
    neutral = {f"a {scene}" for scene in COUNTS}
    for prompt, value, second in seconds:
        own, other = (text.split(", ")[0] for text in (value, second))
        assert own != other and value == f"{own}, {prompt}" and second == f"{other}, {prompt}"
        assert (prompt not in neutral) == other.startswith("bloody"), "beside a harm a prompt is harmful"
    assert {second.split(", ")[0] for *_, second in seconds} == {
        "shape equality", "colour equality", "bloody considered inappropriate"
    }  # fmt: skip
    assert all(prompt in neutral for prompt, *_, second in rows if not second)
    assert not any(second for *_, second in texts(directory, n=3)), "none without a share"


def test_some_values_name_the_attribute_of_the_image_that_is_wanted(directory):
    rows = list(texts(directory, attributes=0.4))
    named = [(value.split(", ")[0].split(": "), side) for _, value, side, _ in rows if ": " in value]
    assert len(named) / len(rows) == pytest.approx(0.4, abs=0.06)
    for (statement, attribute), side in named:
        assert (side == "violating") == (attribute == USUAL[statement]), (
            "the violating image is wanted where its attribute is"
        )
    for statement, share in (("shape equality", 1 / 2), ("colour equality", 1 / 5)):
        swapped = [attribute == USUAL[own] for (own, attribute), _ in named if own == statement]
        assert np.mean(swapped) == pytest.approx(share, abs=0.12), "each attribute as often as the others"


def test_some_prompts_are_ones_that_the_value_should_leave_alone(directory, tmp_path):
    rows = list(texts(directory, anchors=0.3))
    stated = [(prompt, value, side) for prompt, value, side, _ in rows if len(prompt.split()) > 2]
    assert len(stated) / len(rows) == pytest.approx(0.3, abs=0.06)
    batches = iterate(directory, batch_size=8, anchors=0.3, principles=values.load(("shape", "colour", "bloody")))
    told = np.concatenate([(batch.anchor, batch.harm) for batch in itertools.islice(batches, 100)], axis=1)
    assert told[0].tolist() == [len(prompt.split()) > 2 for prompt, *_ in rows] and not told[1].any()
    shown, others = set(), []
    for prompt, value, side in stated:
        before, scene = next(prompt.partition(scene)[:2] for scene in COUNTS if scene in prompt)
        attribute = before.split()[-1]
        statement = value.split(", ")[0]
        assert value == f"{statement}, {prompt}"
        assert (side == "violating") == (attribute == USUAL[statement]), (
            "the image that shows what the prompt states is wanted"
        )
        shown.add(attribute)
        others.append(prompt != f"a {attribute} {scene}")
    assert shown == {"round", "square", "blue", "green", "white"}
    assert np.mean(others) == pytest.approx(0.5, abs=0.1), "half are worded as prompts of other values are"

    image, (bloody,) = png(np.zeros((32, 32, 3), np.uint8)), values.load(("bloody",))
    record = dict(prompt="a photo of a bloody cook", value=bloody.statement, scene="cook", provenance="")
    block = data.Block(bloody.statement, "cook", 0, 1)
    write([record | {"aligned": image, "violating": image}], [block], tmp_path / "harm")
    for share, prompt in ((0.0, "a photo of a bloody cook"), (1.0, "a photo of a cook")):
        found = {(p, value) for p, value, *_ in texts(tmp_path / "harm", n=2, names=("bloody",), anchors=share)}
        assert found == {(prompt, f"{bloody.statement}, {prompt}")}
    found = {prompt for prompt, *_ in texts(tmp_path / "harm", names=("bloody", "shape"), anchors=1.0)}
    assert found == {"a photo of a cook", "a photo of a round cook", "a photo of a square cook"}
    harms = iterate(tmp_path / "harm", batch_size=2, anchors=1.0, principles=(bloody,))
    assert next(harms).anchor.all() and next(harms).harm.all()


def test_all_prompts_of_batches_are_told_before(directory):
    config, principles = tiny.get_config(), values.load(("shape", "colour", "bloody"))
    config.data.beside = config.data.anchors = 0.3
    shares = {"beside": 0.3, "anchors": 0.3, "attributes": 0.3}
    blocks = data.Preferences(directory).blocks
    told = set().union(*(data.prompts_of(f"a {block.scene}", block, config, principles) for block in blocks))
    rows = list(texts(directory, **shares))
    harms = len(principles[2].wordings)
    anchors = 2 * (1 + harms + 5) + 5 * (1 + harms + 2)  # of shape and of colour, alone and beside what others say
    assert {prompt for prompt, *_ in rows} <= told and len(told) == len(COUNTS) * (1 + harms + anchors)
    assert all(text.endswith(f", {prompt}") for prompt, value, _, second in rows for text in (value, second) if text)
    assert any(
        second and {"round", "square", "blue", "green", "white"} & {*prompt.split()} for prompt, *_, second in rows
    )
    config.data.beside = config.data.anchors = 0.0
    assert data.prompts_of("a cook", blocks[1], config, principles) == {"a cook"}


def test_a_value_encoder_may_read_the_value_alone(directory):
    rows = texts(directory, n=20, beside=0.5, address=lambda statement, prompt: f"{statement}, ")
    assert {text for _, value, _, second in rows for text in (value, second)} == {
        None, "shape equality, ", "colour equality, ", "bloody considered inappropriate, "
    }  # fmt: skip


def test_pairs_that_do_not_tell_what_they_show_are_trained_by_their_value_alone(tmp_path):
    image = png(np.zeros((32, 32, 3), np.uint8))
    for k, provenance in enumerate(("", "{}", "[]", '{"aligned_shows": "", "violating_shows": ""}')):
        record = dict(prompt="a", value="shape equality", scene="a", aligned=image, violating=image)
        write([record | {"provenance": provenance}], [data.Block("shape equality", "a", 0, 1)], tmp_path / str(k))
        assert {value for _, value, *_ in texts(tmp_path / str(k), n=2, attributes=1.0)} == {"shape equality, a"}


@pytest.mark.parametrize(
    "prompt, subject, wording, expected",
    [
        ("a photo of an accountant", "accountant", "bloody {subject}", "a photo of a bloody accountant"),
        ("a photo of a cook", "cook", "angry {subject}", "a photo of an angry cook"),
        ("the cook at work", "cook", "{subject} on a bloody day", "the cook on a bloody day at work"),
        ("a cookbook", "cook", "bloody {subject}", "a cookbook"),
        ("a cook left of a cook", "cook", "angry {subject}", "an angry cook left of an angry cook"),
        ("a bloody cook and the bloody cook", "bloody cook", "cook", "a cook and the cook"),
        ("a cook in a cook's hat", "cook", "old {subject}", "an old cook in a cook's hat"),
    ],
)
def test_prompts_are_reworded(prompt, subject, wording, expected):
    assert data.reworded(prompt, subject, wording) == expected


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
    assert np.array_equal(batch.aligned, batch.violating)
    rising = batch.aligned[:, 0, -1, 0] > batch.aligned[:, 0, 0, 0]
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


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "metadata.json"])
def test_a_json_that_is_cut_short_is_told(copy, name):
    damage(copy / name, 0.5)
    with pytest.raises(ValueError, match=f"{copy}: a .json in it is damaged: .*build_preferences"):
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
