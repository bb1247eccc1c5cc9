"""The importer: what the authors' layout holds is what is read, and whatever is wrong with a source is said."""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from data_tools import import_preferences
from data_tools.import_preferences import build
from livo_jax import data, values
from livo_jax.data import dataset
from livo_jax.values.principles import text_hash

GENDER, RACE, GORE = (value.statement for value in values.load(("gender", "race", "gore")))


def encoded(red: int, kind: str) -> bytes:
    """Its lower half is blue: an image of one colour is refused."""
    stream, image = io.BytesIO(), np.full((24, 32, 3), (red, 0, 0), np.uint8)
    image[16:] = (0, 0, 255)
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


def scene(root, kind, name, lines):
    """Writes a scene of (label, value, file name); the images tell their number in it by their red."""
    folder = root / kind / name
    folder.mkdir(parents=True)
    with open(folder / "metadata.jsonl", "w") as metadata:
        for i, (label, value, file) in enumerate(lines):
            metadata.write(
                json.dumps({"label": label, "prompt": f"a {name}", "value": value, "file_name": file}) + "\n"
            )
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(encoded(8 * i, "PNG" if file.endswith("png") else "JPEG"))


def make(root):
    root = root / "livo_data"
    bias = [(1, GENDER, "0.png"), (0, GENDER, "1.jpg"), (1, GENDER, "2.jpg"), (1, GENDER, "sub/3.png")]
    scene(root, "0-career", "doctor", bias + [(0, GENDER, "4.jpg")])
    scene(root, "0-career", "baker", [("neg", GENDER, "0.png"), (False, GENDER, "1.png"), (True, GENDER, "2.png")])
    scene(root, "harm", "doctor", [("chosen", GORE, "a.png"), ("rejected", GORE, "b.png")])
    return root


@pytest.fixture
def source(tmp_path):
    return make(tmp_path)


def files(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def problems(source, out, **limits) -> list[str]:
    with pytest.raises(ValueError) as error:
        build(source, out, **limits)
    assert not out.exists() and not out.with_name(f".{out.name}.partial").exists()
    return str(error.value).splitlines()[1:]


def test_records_are_the_lines_and_images_the_files(source, tmp_path):
    build(source.parent, tmp_path / "out")
    preferences = data.Preferences(tmp_path / "out")
    assert preferences.blocks == [
        data.Block(GORE, "doctor", 0, 1), data.Block(GENDER, "baker", 1, 1), data.Block(GENDER, "doctor", 2, 3)
    ]  # fmt: skip
    doctor = "livo_data/0-career/doctor"
    expected = [
        ("livo_data/harm/doctor/a.png", "livo_data/harm/doctor/b.png"),
        ("livo_data/0-career/baker/2.png", "livo_data/0-career/baker/0.png"),
        (f"{doctor}/0.png", f"{doctor}/1.jpg"), (f"{doctor}/2.jpg", f"{doctor}/4.jpg"),
        (f"{doctor}/sub/3.png", f"{doctor}/1.jpg"),
    ]  # fmt: skip
    for block in preferences.blocks:
        for i in range(block.start, block.start + block.count):
            record, (aligned, violating) = preferences.source[i], expected[i]
            assert record["aligned"] == (source.parent / aligned).read_bytes()
            assert record["violating"] == (source.parent / violating).read_bytes()
            assert (record["value"].decode(), record["scene"].decode()) == (block.value, block.scene)
            assert record["prompt"].decode() == f"a {block.scene}"
            kind = aligned.split("/")[1]
            assert json.loads(record["provenance"]) == {"aligned": aligned, "violating": violating, "type": kind}


def test_violating_lines_as_the_authors_read_them(tmp_path):
    """Any number but 1, without prompt and value: partners for all values of the folder."""
    folder = tmp_path / "livo_data" / "1-goodness" / "kind person"
    lines = [(1, GENDER, "a.png"), (1, RACE, "b.png"), (-1, None, "c.png"), (2, "", "d.png"), (0, RACE, "a.png")]
    scene(tmp_path / "livo_data", "1-goodness", "kind person", lines)
    entries = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    del entries[2]["prompt"], entries[2]["value"]
    entries[3]["prompt"] = None
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    root, found = tmp_path / "livo_data", import_preferences.read_source(tmp_path / "livo_data")
    import_preferences.check_source(root, found)
    images = {}
    for line in found.lines:
        images.setdefault((line.side, line.value), []).append(pathlib.Path(line.file).name)
    assert images["aligned", GENDER] == ["a.png"] and images["violating", GENDER] == ["c.png", "d.png"]
    assert images["aligned", RACE] == ["b.png"] and images["violating", RACE] == ["c.png", "d.png", "a.png"]
    assert found.stray == 0
    build(root, tmp_path / "out")
    assert data.Preferences(tmp_path / "out").source[0]["prompt"] == b"a kind person"


def test_the_reader_makes_batches_of_it(source, tmp_path):
    build(source, tmp_path / "out")

    def tokenize(texts):
        return np.array([[text_hash(text) % 1000] for text in texts], np.int32)

    batches = data.batches(
        data.Preferences(tmp_path / "out"), tokenize, batch_size=5, image_size=24, random_flip=False, seed=0
    )
    batch = next(batches)
    images = batch.aligned, batch.violating
    assert [side.shape for side in images] == [(5, 24, 24, 3)] * 2
    aligned, violating = (np.round((side[:, 0, 0, 0] + 1) * 127.5 / 8).tolist() for side in images)
    assert sorted(aligned) == [0, 0, 2, 2, 3] and set(violating) <= {0, 1, 4}


def test_the_card_counts_and_what_is_left_out_is_said(source, tmp_path, capsys):
    (source / "README.md").write_text("stray")
    (source / "harm" / "doctor" / "unnamed.png").write_bytes(b"stray")
    scene(source, "harm", "cook", [(1, "gender equallity", "a.png"), (0, "gender equallity", "b.png")])
    build(source, tmp_path / "out")
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "2 files are left out: no metadata.jsonl names them",
        "1 violating images are left out: their value and scene have fewer aligned ones",
        "the value 'gender equallity' is no statement in principles.toml: for training, add a table with it there, or"
        " mend its wording in the source and import again",
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "6 pairs" in card and f"- {GENDER}: 4\n" in card and f"- {GORE}: 1\n" in card
    assert f"| {GENDER} | baker | 1 | 2 | 1 |" in card and f"| {GENDER} | doctor | 3 | 2 | 0 |" in card


def test_hidden_folders_are_no_scenes(source, tmp_path, capsys):
    """Copies that notebooks and macOS leave there, with a link in one, which elsewhere is refused."""
    scene_of = source / "harm" / "doctor"
    shutil.copytree(scene_of, scene_of / ".ipynb_checkpoints")
    shutil.copytree(source / "harm", source / "__MACOSX" / "harm")
    (source / "__MACOSX" / "harm" / "link").symlink_to(tmp_path)
    (scene_of / ".DS_Store").write_bytes(b"")
    build(source, tmp_path / "out")
    assert capsys.readouterr().out.splitlines() == [
        "hidden folders are left out: __MACOSX, harm/doctor/.ipynb_checkpoints",
        "1 files are left out: no metadata.jsonl names them",
        "1 violating images are left out: their value and scene have fewer aligned ones",
    ]
    assert len(data.Preferences(tmp_path / "out").source) == 5


@pytest.mark.parametrize("encoding, end", [("utf-8-sig", "\n"), ("utf-16", "\r\n"), ("utf-8", "\r")])
def test_metadata_is_read_whole_in_every_encoding(source, tmp_path, encoding, end):
    metadata = source / "harm" / "doctor" / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    for row in rows:
        row["prompt"] = " a doctor,\u2028in two\x85lines "
    metadata.write_bytes(end.join(json.dumps(row, ensure_ascii=False) for row in rows).encode(encoding))
    found = import_preferences.read_source(source)
    assert not found.problems
    assert {line.prompt for line in found.lines if line.type == "harm"} == {"a doctor,\u2028in two\x85lines"}


def test_images_are_trained_on_as_they_are_shown(source, tmp_path):
    """A photograph that is stored upside down, and one whose upper half is transparent before a hidden red."""
    half = np.zeros((24, 24, 3), np.uint8)
    half[:12] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(half).save(source / "harm" / "doctor" / "a.png", exif=exif)
    clear = np.dstack([half, 255 - half[..., 0]])
    clear[:12, :, :3] = (255, 0, 0)
    Image.fromarray(clear).save(source / "harm" / "doctor" / "b.png", "WEBP", lossless=True, exact=True)
    build(source, tmp_path / "out")
    record = data.Preferences(tmp_path / "out").source[0]
    pixels = {side: np.round((data.decode(record[side], 24) + 1) * 127.5) for side in data.SIDES}
    assert (pixels["aligned"] == half[::-1]).all() and (pixels["violating"] == half).all()


def test_everything_wrong_is_told_at_once_with_its_line(source, tmp_path):
    good = {"label": 1, "prompt": "a cook", "value": GENDER, "file_name": "good.png"}
    folder, outside = source / "bias" / "cook", tmp_path / "outside.png"
    scene(source, "bias", "cook", [(1, GENDER, "good.png"), (0, GENDER, "other.png")])
    whole = (folder / "good.png").read_bytes()
    outside.write_bytes(whole)
    (folder / "link.png").symlink_to(outside)
    (folder / "inside.png").symlink_to("good.png")
    (folder / "cut.png").write_bytes(whole[:-20])
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "cut.jpg")
    os.truncate(folder / "cut.jpg", (folder / "cut.jpg").stat().st_size - 200)
    (folder / "text.png").write_text("no image")
    Image.new("RGB", (24, 24)).save(folder / "black.webp")
    (folder / "animation.gif").write_bytes(encoded(0, "GIF"))
    bad = {
        b"{": "not JSON: Expecting",
        b"\xff": "not UTF-8 (invalid start byte)",
        b'{"label": 1, "label": 0}': "not JSON: 'label' is there twice",
        b"[" * 100_000: "not JSON: maximum recursion",
        b"[1]": "not a JSON object",
        b'{"file_name": "a.png"}': ("no label", "no prompt", "no value", "a.png is missing"),
    }
    bad = [(line, (said,) if isinstance(said, str) else said) for line, said in bad.items()]
    for change, *said in [
        ({"prompt": 3}, "prompt is 3, not a text"),
        ({"value": None, "file_name": "a.png"}, "value is None, not a text", "a.png is missing"),
        ({"file_name": ["a"]}, "file_name is ['a'], not a text"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "\ud800"}, "prompt is '\\ud800', which is no Unicode text"),
        ({"file_name": "a\0.png"}, "file_name is 'a\\x00.png', which is no Unicode text"),
        ({"label": "good"}, "unknown label 'good': known are \"positive\", \"pos\", \"aligned\", \"chosen\", 1, true,"),
        ({"label": ["pos"], "file_name": "text.png"}, "unknown label ['pos']", "text.png cannot be used: no PNG"),
        ({"label": None}, "unknown label None"),
        ({"label": 0, "prompt": 3, "value": 4, "file_name": "a.png"}, "prompt is 3", "value is 4", "a.png is missing"),
        ({"file_name": "nowhere.png"}, "nowhere.png is missing"),
        ({"file_name": ".\\good.png"}, "good.png is missing: it is 'good.png' there"),
        ({"file_name": "."}, ". is missing"),
        ({"file_name": "a" * 5000}, "aaa is missing"),
        ({"file_name": str(outside)}, "outside.png leaves its folder"),
        ({"file_name": "../cook/good.png"}, "../cook/good.png leaves its folder"),
        ({"file_name": ".hidden/good.png"}, ".hidden/good.png is in a hidden folder"),
        ({"file_name": "link.png"}, "link.png leaves its folder"),
        ({"file_name": "inside.png"}, "inside.png is named already in bias/cook/metadata.jsonl:1"),
        ({"file_name": "./other.png"}, "./other.png is named already in bias/cook/metadata.jsonl:2"),
        ({"file_name": "cut.png"}, "cut.png cannot be used: OSError"),
        ({"file_name": "cut.jpg"}, "cut.jpg cannot be used: OSError: image file is truncated"),
        ({"file_name": "black.webp"}, "black.webp cannot be used: it has one colour all over: draw or fetch it again"),
        ({"file_name": "animation.gif"}, "animation.gif cannot be used: no PNG, JPEG or WebP"),
    ]:  # fmt: skip
        entry = good | {"file_name": "good.png"} | change
        repeated = () if "file_name" in change else ("good.png is named already",)
        bad.append((json.dumps(entry).encode(), (*said, *repeated)))
    with open(folder / "metadata.jsonl", "ab") as metadata:
        metadata.write(b"\n" + b"\r\n".join(line for line, _ in bad))
    scene(source, "bias", "lonely", [(1, GENDER, "a.png"), (1, GENDER, "b.png")])
    scene(source, "bias", "vile", [(0, GORE, "a.png")])
    scene(source, "bias", "mute", [(0, "", "a.png")])
    (source / "metadata.jsonl").write_text("")
    (source / "bias" / "elsewhere").symlink_to(tmp_path)
    (source / "bias" / "empty").mkdir()
    (source / "bias" / "empty" / "metadata.jsonl").write_bytes(b"")
    broken = source / "bias" / "broken"
    broken.mkdir()
    (broken / "metadata.jsonl").symlink_to("nowhere")

    found = problems(source, tmp_path / "out")
    expected = [(f"bias/cook/metadata.jsonl:{n}: ", said) for n, (_, all) in enumerate(bad, start=4) for said in all]
    expected += [
        (f"bias/lonely/metadata.jsonl:1: {GENDER}, lonely: ", "2 aligned, 0 violating; both are needed"),
        (f"bias/vile/metadata.jsonl:1: {GORE}, vile: ", "0 aligned, 1 violating; both are needed"),
        ("bias/mute/metadata.jsonl:1: ", "no value, and no aligned line of this folder has one"),
        ("'metadata.jsonl' is not <type>/<scene>/metadata.jsonl below the source", ""),
        (f"{source}/bias/elsewhere is a link to a folder", ""),
        ("bias/broken/metadata.jsonl: No such file", ""),
        ("bias/empty/metadata.jsonl is empty: fetch it again, or remove it", ""),
    ]
    for place, said in expected:
        assert any(line.strip().startswith(place) and said in line for line in found), f"{place}{said}"
    assert len(found) == len(expected), "\n".join(found)


def test_a_source_without_metadata_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert problems(tmp_path / "empty", tmp_path / "out") == ["  there is no metadata.jsonl"]
    with pytest.raises(FileNotFoundError, match="nowhere is neither a folder nor a tar"):
        build(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "text").write_text("no tar")
    assert "as a tar: " in problems(tmp_path / "text", tmp_path / "out")[0]


def pack(source, path):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        tar.add(source, source.name)
    return path


@pytest.mark.parametrize("name", ["livo_data.tar", "livo_data_debias.tar.gz"])
def test_a_tar_gives_what_its_folder_gives(source, tmp_path, name):
    build(source.parent, tmp_path / "folder")
    build(pack(source, tmp_path / name), tmp_path / "tar")
    ours, theirs = files(tmp_path / "folder"), files(tmp_path / "tar")
    assert json.loads(theirs["config.json"])["source"] == str(tmp_path / name)
    assert ours | {"config.json": b""} == theirs | {"config.json": b""}


def test_a_tar_cannot_write_elsewhere(source, tmp_path):
    path = pack(source, tmp_path / "livo_data.tar")
    with tarfile.open(path, "a") as tar:
        for name, kind, link in [
            ("../evil", tarfile.REGTYPE, ""),
            (str(tmp_path / "absolute"), tarfile.REGTYPE, ""),
            ("livo_data/out", tarfile.SYMTYPE, "/etc"),
            ("livo_data/in", tarfile.SYMTYPE, "harm"),
            ("livo_data/hard", tarfile.LNKTYPE, "../../evil"),
            ("livo_data/device", tarfile.CHRTYPE, ""),
            ("livo_data/pipe", tarfile.FIFOTYPE, ""),
            ("livo_data/harm", tarfile.REGTYPE, ""),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            tar.addfile(info)
    before = set(tmp_path.iterdir())
    found = problems(path, tmp_path / "out")
    for line, said in zip(found, [
        "'../evil': ", f"'{tmp_path}/absolute' has an absolute name", "'livo_data/out' is a link, to '/etc'",
        "'livo_data/in' is a link, to 'harm'", "'livo_data/hard' is a link, to '../../evil'", "'livo_data/device': ",
        "'livo_data/pipe': ", "at or after 'livo_data/harm': [Errno 21] Is a directory",
    ], strict=True):  # fmt: skip
        assert line.strip().startswith(said)
    assert set(tmp_path.iterdir()) == before


def test_a_tar_over_its_limits_or_cut_short_is_refused(source, tmp_path):
    path = pack(source, tmp_path / "livo_data.tar")
    assert "more than --max_members=3 or" in problems(path, tmp_path / "out", max_members=3)[0]
    assert "or --max_gb=1e-06 allows" in problems(path, tmp_path / "out", max_gb=1e-6)[0]
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    whole = path.read_bytes()
    # Before a header, in it, where only zeros follow the last file, and in a file.
    for place in (last.offset, last.offset + 100, last.offset_data + 512, last.offset_data + 10):
        path.write_bytes(whole[:place])
        assert "at or after 'livo_data" in problems(path, tmp_path / "out")[0]
    with zipfile.ZipFile(tmp_path / "livo_data.zip", "w") as archive:
        archive.writestr("livo_data/metadata.jsonl", "")
    with pytest.raises(ValueError, match="livo_data.zip is a zip archive, and tar is read: unpack it"):
        build(tmp_path / "livo_data.zip", tmp_path / "out")
    packed = pack(source, tmp_path / "livo_data.tar.gz")
    packed.write_bytes(packed.read_bytes()[:-40])
    assert "at or after 'livo_data" in problems(packed, tmp_path / "out")[0]


def test_equal_sources_give_equal_bytes(source, tmp_path):
    (tmp_path / "other").mkdir()
    again = make(tmp_path / "other")
    build(source, tmp_path / "first")
    build(again, tmp_path / "second")
    first, second = files(tmp_path / "first"), files(tmp_path / "second")
    configs = [json.loads(config.pop("config.json")) for config in (first, second)]
    assert first == second
    assert configs == [configs[0] | {"source": str(root)} for root in (source, again)]


def test_a_finished_import_is_kept_and_another_source_refused(source, tmp_path, capsys):
    build(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (source / "stray").write_text("")  # changes nothing
    build(source, tmp_path / "out")
    assert "is finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (source / "harm" / "doctor" / "a.png").write_bytes(encoded(0, "PNG") + b"more")
    with pytest.raises(FileExistsError, match="config.sha256: '.*' there, '.*' now"):
        build(source, tmp_path / "out")


@pytest.mark.parametrize("packed", [False, True])
def test_an_interrupted_import_goes_on(source, tmp_path, monkeypatch, packed):
    monkeypatch.setattr(dataset, "SHARD_SIZE", 2)
    source = pack(source, tmp_path / "livo_data.tar") if packed else source
    build(source, tmp_path / "whole")
    reads, read = [], import_preferences.pathlib.Path.read_bytes

    def stop(path):
        reads.append(path.name)
        if path.name == "4.jpg":
            raise KeyboardInterrupt
        return read(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(import_preferences.pathlib.Path, "read_bytes", stop)
        build(source, tmp_path / "out")
    work = tmp_path / ".out.partial"
    assert not (tmp_path / "out").exists() and (work / "source").exists() == packed
    assert len(list((work / "shards").iterdir())) == 1
    for done in ("unusable", "extract"):
        monkeypatch.setattr(import_preferences, done, lambda *_: pytest.fail("this was done already"))
    (shard,) = (work / "dataset").glob("preferences-train*00000-of-*")
    made = shard.stat().st_mtime_ns
    build(source, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole") and not work.exists()
    assert (tmp_path / "out" / shard.name).stat().st_mtime_ns == made


def test_a_mended_source_is_imported(source, tmp_path):
    image = source / "harm" / "doctor" / "a.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:-20])
    assert "harm/doctor/metadata.jsonl:1: harm/doctor/a.png cannot be used" in problems(source, tmp_path / "out")[0]
    image.write_bytes(whole)
    build(source, tmp_path / "out")
    assert len(data.Preferences(tmp_path / "out").source) == 5


def test_command(source, tmp_path):
    path, out = pack(source, tmp_path / "livo_data.tgz"), tmp_path / "out"
    command = [sys.executable, "-m", "data_tools.import_preferences", f"--source={path}", f"--out={out}"]
    options = dict(capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    refused = subprocess.run([*command, "--max_members=2"], **options)
    assert refused.returncode and "Traceback" not in refused.stderr and "--max_members=2" in refused.stderr
    imported = subprocess.run(command, **options)
    assert not imported.returncode, imported.stderr
    assert len(data.Preferences(out).source) == 5
