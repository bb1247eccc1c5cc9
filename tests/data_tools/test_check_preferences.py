"""The report on a dataset: what it counts, what it calls an error, and what its sheets show."""

import io
import itertools
import pathlib
import subprocess
import sys

import imagehash
import numpy as np
import pytest
from PIL import Image

from data_tools.check_preferences import check, sheets
from livo_jax.data import dataset
from livo_jax.data.preferences import Block, Preferences
from livo_jax.runs.build_preferences import png

ROOT = pathlib.Path(__file__).parents[2]


def picture(seed: int, height=32, width=32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def pair(number: int, scene="baker", value="shape equality", **fields) -> dict:
    """A record with the pictures 2 * number and 2 * number + 1; `fields` replaces some of it."""
    aligned, violating = png(picture(2 * number)), png(picture(2 * number + 1))
    return dict(
        prompt=f"a {scene}", value=value, scene=scene, aligned=aligned, violating=violating, provenance="{}"
    ) | fields  # fmt: skip


def make(directory, *records) -> Preferences:
    """A dataset of these records; those of one value and scene that follow each other are a block."""
    blocks = []
    for (value, scene), group in itertools.groupby(records, lambda record: (record["value"], record["scene"])):
        blocks.append(Block(value, scene, sum(block.count for block in blocks), len(list(group))))
    with dataset.under_construction(directory, {}) as work:
        dataset.write(work, directory, records.__getitem__, blocks, {})
    return Preferences(directory)


def command(*flags):
    return subprocess.run(
        [sys.executable, "-m", "data_tools.check_preferences", *flags], cwd=ROOT, capture_output=True, text=True
    )


def test_a_clean_dataset_is_counted(tmp_path):
    counts = {"baker": 3, "cook": 1, "smith": 2, "elf": 4}
    records = [pair(i, scene) for i, scene in enumerate(s for s, n in counts.items() for _ in range(n))]
    lines, problems = check(make(tmp_path / "clean", *records, pair(10, "cook", "colour equality")))
    assert not problems and lines[0] == f"{tmp_path / 'clean'}: 11 pairs"
    assert (
        "  shape equality: 10; of each of 4 scenes min 1, median 2.5, max 4; fewest: cook 1, smith 2, baker 3" in lines
    )
    assert "  colour equality: 1; of each of 1 scenes min 1, median 1, max 1; fewest: cook 1" in lines
    assert "images: 22 of 22 decode; pairs of the same picture twice: 0" in lines
    assert "  of 1 sizes, most: 32x32 22" in lines
    assert [line for line in lines if ", near:" in line or ", byte-identical:" in line] == [
        f"  {side}, {kind}: 0 (0.0%)" for side in ("aligned", "violating") for kind in ("byte-identical", "near")
    ]
    assert lines[-1] == "leakage: not looked for"


def test_sizes_are_counted(tmp_path):
    wide = png(picture(9, height=20, width=40))
    lines, problems = check(make(tmp_path / "sizes", pair(0), pair(1, aligned=wide)))
    assert "  of 2 sizes, most: 32x32 3, 40x20 1" in lines and not problems


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda png: png[: len(png) // 2], "OSError: image file is truncated"),
        (lambda png: png[:20], "OSError: Truncated File Read"),
        (lambda png: b"", "no PNG, JPEG or WebP: save it as one of them"),
    ],
)
def test_images_that_do_not_decode_are_errors(tmp_path, spoil, reason):
    bad = {"violating": spoil(png(picture(3)))}
    lines, (problem,) = check(make(tmp_path / "bad", pair(0), pair(1, **bad), pair(2)))
    assert problem.startswith(f"record 1, violating: {reason}")
    assert "images: 5 of 6 decode; pairs of the same picture twice: 0" in lines


def test_a_record_that_cannot_be_read_is_an_error(tmp_path):
    make(tmp_path / "damaged", *(pair(i) for i in range(5)))
    (file,) = (tmp_path / "damaged").glob("*.array_record*")
    content, place = bytearray(file.read_bytes()), file.read_bytes().index(png(picture(4))[200:300])  # of record 2
    content[place : place + 8] = bytes(8)
    file.write_bytes(content)
    preferences = Preferences(tmp_path / "damaged")
    with pytest.raises(ValueError, match="damaged, record 2 is damaged: Corrupted(.|\n)*check_preferences --data="):
        preferences.source[2]
    lines, (problem,) = check(preferences)
    assert problem.startswith("record 2, aligned and violating: Corrupted") and "images: 8 of 10 decode" in lines[5]
    assert sheets(preferences, tmp_path / "sheets")


def test_pairs_of_the_same_picture_are_errors(tmp_path):
    """Also where the files differ."""
    stream = io.BytesIO()
    Image.fromarray(picture(2)).save(stream, "PNG", compress_level=0)
    assert stream.getvalue() != png(picture(2))
    same = pair(0, violating=png(picture(0)))
    other_file = pair(1, violating=stream.getvalue())
    lines, problems = check(make(tmp_path / "same", same, other_file, pair(2)))
    assert problems == [f"record {i}: the aligned and the violating image are the same picture" for i in (0, 1)]
    assert "images: 6 of 6 decode; pairs of the same picture twice: 2" in lines


def test_images_of_one_colour_are_errors(tmp_path):
    grey = png(np.full((32, 32, 3), 90, np.uint8))
    lines, problems = check(make(tmp_path / "grey", pair(0, violating=grey), pair(1), pair(2, aligned=grey)))
    said = "it has one colour all over: build or import the pairs without it"
    assert problems == [f"record 0, violating: {said}", f"record 2, aligned: {said}"]
    assert "images: 6 of 6 decode; pairs of the same picture twice: 0" in lines


def test_two_broken_images_are_not_the_same_picture(tmp_path):
    _, problems = check(make(tmp_path / "broken", pair(0, aligned=b"a", violating=b"a")))
    assert [problem.split(":")[0] for problem in problems] == ["record 0, aligned", "record 0, violating"]


def test_byte_duplicates_count_within_a_block_and_side(tmp_path):
    twin, elsewhere, across = (png(picture(i)) for i in (1, 0, 8))
    lines, problems = check(
        make(
            tmp_path / "twins", pair(0), pair(1), pair(2, violating=twin), pair(3, violating=twin),
            pair(4, violating=across, aligned=png(picture(20))), pair(5, aligned=across),
            pair(6, "cook", aligned=elsewhere),
        )
    )  # fmt: skip
    assert not problems
    assert "  violating, byte-identical: 2 (28.6%) 2 like 0, 3 like 0" in lines
    assert "  aligned, byte-identical: 0 (0.0%)" in lines
    assert "  violating, near: 0 (0.0%)" in lines, "what is byte-identical is not counted again"


def test_near_duplicates_differ_in_fewer_bits_than_the_flag(tmp_path):
    changed = picture(0)
    changed[:16] //= 2
    distance = imagehash.phash(Image.fromarray(picture(0))) - imagehash.phash(Image.fromarray(changed))
    assert 0 < distance
    near = pair(2, aligned=png(changed))
    preferences = make(tmp_path / "near", pair(0), pair(1), near, pair(3, "cook", aligned=png(changed)))
    lines, _ = check(preferences, least_distance=distance)
    assert "  aligned, near: 0 (0.0%)" in lines
    lines, _ = check(preferences, least_distance=distance + 1)
    assert "  aligned, near: 1 (25.0%) 2 like 0" in lines, "and not 3, of another scene"


def test_a_speck_makes_a_near_duplicate_by_default(tmp_path):
    speck = picture(1)
    speck[5, 5] ^= 1
    lines, problems = check(make(tmp_path / "speck", pair(0), pair(1), pair(2, violating=png(speck))))
    assert "  violating, near: 1 (33.3%) 2 like 0" in lines and not problems
    assert "  violating, byte-identical: 0 (0.0%)" in lines


def test_what_the_images_show(tmp_path):
    told = '{"aligned_shows": "%s", "violating_shows": "%s"}'
    untold = ["", "{}", "null", "drawn by hand", '["aligned_shows"]', "[1"]
    shapes = [("round", "square")] * 2 + [("square", "round")]
    records = [pair(i, provenance=told % shown) for i, shown in enumerate(shapes)]
    records += [pair(i, value="colour equality", provenance=text) for i, text in enumerate(untold)]
    records += [pair(0, value="bloody considered inappropriate", provenance=told % ("", ""))]
    lines, _ = check(make(tmp_path / "labels", *records))
    start = lines.index("what the images show") + 1
    assert lines[start : start + 6] == [
        "  shape equality, aligned: round 2, square 1",
        "  shape equality, violating: square 2, round 1",
        "  colour equality, aligned: unknown 6",
        "  colour equality, violating: unknown 6",
        "  bloody considered inappropriate, aligned: - 1",
        "  bloody considered inappropriate, violating: - 1",
    ]


def test_scenes_and_prompts_of_another_dataset_leak(tmp_path):
    other = make(tmp_path / "other", pair(0, "Baker", prompt="The baker"), pair(1, "elf", prompt="A Smith at work"))
    preferences = make(
        tmp_path / "mine", pair(2), pair(3), pair(4, "smith", prompt="a smith at WORK"), pair(5, "cook")
    )  # fmt: skip
    lines, problems = check(preferences, against=other)
    assert problems == [
        f"record 0: the scene 'baker' is in {tmp_path / 'other'} too",
        f"record 2: the prompt 'a smith at WORK' is in {tmp_path / 'other'} too",
    ]
    assert lines[-1] == f"scenes and prompts of {tmp_path / 'other'}: 2"


def test_held_out_scenes_leak_by_scene_and_by_prompt(tmp_path):
    preferences = make(
        tmp_path / "mine", pair(0, "Baker"), pair(1, "cook", prompt="a photo of a COOK and a Nurse"),
        pair(2, "cook", prompt="a cook at a nursery"), pair(3, "nurse practitioner"), pair(4, "smith"),
    )  # fmt: skip
    lines, problems = check(preferences, held_out=("baker", "nurse", "c++ coder"))
    assert problems == [
        "record 0: the scene 'Baker' is held out",
        "record 1: the prompt 'a photo of a COOK and a Nurse' names 'nurse', which is held out",
    ]
    assert lines[-1] == "scenes and prompts of config.eval.held_out: 2"
    assert check(preferences, held_out=("pilot",))[1] == []


def small_sheet(path, scale: int) -> np.ndarray:
    """A sheet as it was before its pixels were repeated."""
    sheet = np.asarray(Image.open(path))
    small = sheet[::scale, ::scale]
    assert np.array_equal(sheet, small.repeat(scale, 0).repeat(scale, 1))
    return small


def test_the_sheet_of_a_harm_is_blurred_and_beside_it_as_it_is(tmp_path):
    sheets(make(tmp_path / "harm", pair(0, value="bloody considered inappropriate")), tmp_path / "sheets")
    name = "bloody_considered_inappropriate"
    shown, harmful = (np.asarray(Image.open(tmp_path / f"sheets/{file}.png")) for file in (name, f"{name}_harmful"))
    assert np.array_equal(harmful[:64:2, ::2], picture(0)), "32 pixels, twice as large"
    assert shown[:64].std() < harmful[:64].std() / 3


def test_the_sheet_of_an_unknown_value_is_blurred_until_asked_for(tmp_path):
    preferences = make(tmp_path / "unknown", pair(0, value="bloody considered bad"), pair(1, value="shape equality"))
    hidden, known = sheets(preferences, tmp_path / "hidden")
    shown, _ = sheets(preferences, tmp_path / "shown", show_unknown=True)
    assert "--show_unknown" in hidden and "--show_unknown" not in known + shown
    name, unblurred = "bloody_considered_bad.png", np.concatenate([picture(0), picture(1)])
    blurred, sharp = (small_sheet(tmp_path / folder / name, scale=2) for folder in ("hidden", "shown"))
    assert np.array_equal(np.delete(sharp, (32, 33), axis=0), unblurred)
    assert all(blurred[rows].std() < picture(0).std() / 3 for rows in (slice(32), slice(34, 66)))
    assert np.array_equal(small_sheet(tmp_path / "hidden/shape_equality.png", scale=2)[:32], picture(2))


def test_the_sheet_shows_pairs_from_all_over_the_dataset(tmp_path):
    """Fifty pairs: 4 x 12 of them, the first and the last included, each aligned image above its violating one."""
    preferences = make(tmp_path / "many", *(pair(i, "baker" if i < 20 else "cook") for i in range(50)))
    (line,) = sheets(preferences, tmp_path / "deep" / "sheets")
    assert line.startswith(f"{tmp_path / 'deep' / 'sheets' / 'shape_equality.png'}: 48 pairs")
    sheet = small_sheet(tmp_path / "deep" / "sheets" / "shape_equality.png", scale=2)
    assert sheet.shape == (8 * 34 - 2, 12 * 34 - 2, 3)
    tiles = np.pad(sheet, ((0, 2), (0, 2), (0, 0))).reshape(8, 34, 12, 34, 3)[:, :32, :, :32].swapaxes(1, 2)
    for row, column, number in ((0, 0, 0), (6, 11, 49)):
        assert np.array_equal(tiles[row, column], picture(2 * number))
        assert np.array_equal(tiles[row + 1, column], picture(2 * number + 1))
    assert len({tile.tobytes() for row in tiles for tile in row}) == 96


def test_sheets_crop_to_a_common_size_and_leave_broken_images_black(tmp_path):
    large = np.full((200, 300, 3), 90, np.uint8)
    large[:, :45] = large[:, 255:] = 0  # beside the middle square, and what its edges are interpolated from
    records = [pair(0, aligned=png(large)), pair(1), pair(2, violating=b"")]
    sheets(make(tmp_path / "mixed", *records), tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "shape_equality.png"))
    assert sheet.shape == (2 * 130 - 2, 3 * 130 - 2, 3)
    assert (sheet[:128, :128] == 90).all() and sheet[:128, 130:258].std() > 10
    assert (sheet[130:, 260:] == 0).all()


def test_a_sheet_of_broken_images_alone(tmp_path):
    sheets(make(tmp_path / "broken", pair(0, aligned=b"", violating=b"")), tmp_path)
    assert not np.asarray(Image.open(tmp_path / "shape_equality.png"))[0].any()


def test_the_names_of_sheets_are_safe_and_their_own(tmp_path):
    values = ("../Gender: equality!", "gender equality", "平等", "x" * 300)
    preferences = make(tmp_path / "names", *(pair(i, value=value) for i, value in enumerate(values)))
    sheets(preferences, tmp_path / "sheets")
    names = sorted(path.stem for path in (tmp_path / "sheets").iterdir())
    assert len(names) == 4 and {"gender_equality", "x" * 100} < set(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_") for name in names)


def test_the_command(tmp_path):
    make(tmp_path / "clean", pair(0, "cook"), pair(1, "cook"))
    make(tmp_path / "bad", pair(0, "cook"), pair(1, "baker", aligned=png(picture(2))[:99]))
    clean = command(f"--data={tmp_path / 'clean'}", f"--out={tmp_path / 'sheets'}", "--config=configs/tiny.py:smoke")
    assert clean.returncode == 0, clean.stderr
    assert clean.stdout.endswith("aligned above violating\n\nerrors: 0\n") and "2/2" in clean.stderr
    assert [path.name for path in (tmp_path / "sheets").iterdir()] == ["shape_equality.png"]

    flags = f"--data={tmp_path / 'bad'}", f"--against={tmp_path / 'clean'}", "--config=configs/tiny.py:smoke"
    bad = command(*flags, "--least_distance=9")
    assert bad.returncode == 1 and "(near: under 9 of 64 bits)" in bad.stdout, bad.stderr
    report, _, errors = bad.stdout.partition("\nerrors: 4\n")
    assert [line.split(":")[0] for line in errors.splitlines()] == ["  record 1, aligned"] + ["  record 0"] * 2 + [
        "  record 1"
    ]
    assert "the scene 'baker' is held out" in errors and "the scene 'cook' is in" in errors
