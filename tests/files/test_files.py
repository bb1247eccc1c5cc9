"""Texts come out whole and the same of every format and encoding, images as viewers show them; or they are refused."""

import csv
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from livo_jax import files

PROMPTS = [
    "a photo of a baker", "a cook,\u2028in two\u2029kinds of lines", "next\x85line",
    "tab\x0bs and\x0cform\x1cs\x1dof\x1efeed", 'a "cat" on a mat', "Zwo\u0308lf Bäume", "Zwölf Bäume",
    "ﬁne № \U0001f600", "white\u00a0space", "mid\ufeffdle", "5' 3",
]  # fmt: skip


def written(prompts, suffix: str, end: str) -> str:
    if suffix == ".jsonl":
        return end.join(json.dumps({"prompt": prompt, "n": 1}, ensure_ascii=False) for prompt in prompts)
    if suffix == ".txt":
        return end.join(["", *prompts, " \t"])
    stream = io.StringIO(newline="")
    table = csv.writer(stream, delimiter=files.DELIMITERS[suffix], lineterminator=end, quoting=csv.QUOTE_ALL)
    table.writerows([("prompt", "n"), *((prompt, 1) for prompt in prompts)])
    return stream.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".jsonl"])
def test_the_same_texts_come_out_of_every_format_and_encoding(tmp_path, suffix, end, encoding):
    """White space around them is left off in each: it would make another noise."""
    path, problems = tmp_path / f"prompts{suffix}", []
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path.write_bytes((mark + written([f"  {prompt}\t" for prompt in PROMPTS], suffix, end)).encode(encoding))
    assert files.read_texts(path, ["prompt"], problems) == [(prompt,) for prompt in PROMPTS] and not problems


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_the_lines_of_a_text_are_kept_whatever_ends_them(tmp_path, suffix):
    texts, path = ["two\r\nlines", "two\rlines", "two\nlines", "a\n\r\nb\r\rc\r\n"], tmp_path / f"x{suffix}"
    path.write_bytes(written(texts, suffix, "\r\n").encode())
    assert files.read_texts(path, ["prompt"], []) == [("two\nlines",)] * 3 + [("a\n\nb\n\nc",)]


def test_fields_of_a_table_may_be_long(tmp_path):
    (tmp_path / "x.csv").write_bytes(written([long := "a " * 100_000 + "cat"], ".csv", "\n").encode())
    assert files.read_texts(tmp_path / "x.csv", ["prompt"], []) == [(long,)]


def test_rows_without_a_text_are_left_out_and_counted(tmp_path, caplog):
    (tmp_path / "x.csv").write_text('n,prompt,place\n1,a cat,x\n2,,x\n\n3, ,x\n4,a dog,""\n5,an owl,x\n')
    problems = []
    for _ in range(2):
        found = files.read_texts(tmp_path / "x.csv", ["prompt", "place"], problems)
        assert found == [("a cat", "x"), ("an owl", "x")] and not problems
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == f"{tmp_path / 'x.csv'}: 3 rows are left out, whose text is empty, as line 3"


def test_empty_rows_of_the_only_column_are_counted(tmp_path, caplog):
    (tmp_path / "x.csv").write_text('prompt\na cat\n""\n\n" "\na dog\n')
    assert files.read_texts(tmp_path / "x.csv", ["prompt"], []) == [("a cat",), ("a dog",)]
    assert caplog.messages == [f"{tmp_path / 'x.csv'}: 2 rows are left out, whose text is empty, as line 3"]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 12345\n"
UTF16 = "a\nb\ud800".encode("utf-16", "surrogatepass")


@pytest.mark.parametrize("name, data, said", [
    ("x.txt", "a\r\nété\n".encode("latin-1"), "2: not UTF-8 (invalid continuation byte): convert the file"),
    ("x.csv", b"prompt\r\xff\n", "2: not UTF-8"),
    ("x.txt", POINTER, "1: a pointer of Git LFS, not the file itself: fetch it with git lfs pull"),
    ("x.txt", UTF16, "2: not UTF-16 (unexpected end of data)"),
    ("x.txt", "a\n".encode("utf-16") + b"\n", "2: not UTF-16 (truncated data)"),
    ("x.txt", "a\nb".encode("utf-16-le"), "1: a NUL character"),
    ("x.txt", "a\nb".encode("utf-32"), "1: UTF-32: convert"),
    ("x.jsonl", b'{"prompt": "a\0"}', "1: a NUL character"),
    ("x.txt", "\ufeffa\n\ufeffb".encode(), "2: a byte order mark within the file"),
    ("x.jsonl", b'{"prompt": "a\\u0000"}', "1: prompt is 'a\\x00', which is no Unicode text"),
    ("x.jsonl", b'\n{"prompt": "\\ud800"}', "2: prompt is '\\ud800', which is no Unicode text"),
    ("x.jsonl", b'{"prompt": "a", "n": NaN}', "1: not JSON: NaN is no JSON"),
    ("x.jsonl", b'{"prompt": "a", "prompt": "b"}', "1: not JSON: 'prompt' is there twice"),
    ("x.jsonl", b'{"prompt": 3}', "1: prompt is 3, not a text"),
    ("x.jsonl", b'{"prompt": null}', "1: prompt is None, not a text"),
    ("x.jsonl", b'["a"]', "1: not a JSON object"),
    ("x.json", b'[\n{"prompt": "a"}\n]', "1: one JSON document, not an object on each line"),
    ("x.json", b'[{"prompt": "a"}]', "1: one JSON document"),
    ("x.json", b'{\n "prompt": "a"\n}', "1: one JSON document"),
    ("x.csv", b"PK\x03\x04\0", "1: a zip archive, as .xlsx is: save the sheet as CSV"),
    ("x.txt", b"\x1f\x8b\x08", "1: compressed by gzip"),
    ("x.txt", b"{\\rtf1\\ansi a baker}", "1: a document of a word processor"),
    ("x.parquet", b"PAR1\x15", "1: Parquet: write it as CSV"),
    ("x.csv", b"prompt;seed\na;1\n", " its header has no column prompt; there are prompt;seed: columns of a .csv"),
    ("x.csv", b"sep=,\nprompt,seed\na,1\n", " its header has no column prompt; there are sep=, : columns of a .csv"),
    ("x.jsonl", b'{"text": "a", "n": 1}', "1: no column prompt; there are text, n"),
    ("x.csv", b"a cat\na dog\n", " its header has no column prompt; there are a cat"),
    ("x.csv", b"n,prompt\n1,a cat, on a mat\n", "2: 3 fields, and 2 in the header"),
    ("x.csv", b"n,prompt\n1\n", "2: prompt is None, not a text"),
    ("x.csv", b"prompt,prompt\na,b\n", "1: two columns are called prompt"),
    ("x.csv", b'prompt,n\n"a cat,1\na dog,2\n', "3: no CSV: unexpected end of data"),
    ("x.csv", b'prompt,n\n"a "cat"",1\n', "2: no CSV: ',' expected after '\"'"),
])  # fmt: skip
def test_what_would_come_out_otherwise_is_refused_by_line(tmp_path, name, data, said):
    problems = []
    (tmp_path / name).write_bytes(data)
    files.read_texts(tmp_path / name, ["prompt"], problems)
    assert any(problem.startswith(f"{tmp_path / name}:{said}") for problem in problems), problems


def test_names_in_other_spellings_are_told():
    there = files.by_spelling(["cafe\u0301.png", "img/a.png", "b.png"])
    told = files.spelled_otherwise("caf\u00e9.png", there)
    assert told == r": it is 'cafe\u0301.png' there and 'caf\xe9.png' here, rename one"
    assert "'img/a.png' there" in files.spelled_otherwise("img\\a.png", there)
    assert "'b.png' there" in files.spelled_otherwise("./b.png", there)
    assert files.spelled_otherwise("c.png", there) == ""


def test_hidden_names():
    hidden = [".ipynb_checkpoints", ".DS_Store", "._1.png", "__MACOSX"]
    assert [name for name in [*hidden, "doctor", "a.b", "_"] if files.is_hidden(name)] == hidden


# ---------------------------------------------------------------------------- images

CORNERS = np.zeros((16, 24, 3), np.uint8)  # each corner has a colour of its own
CORNERS[:8, :12], CORNERS[:8, 12:], CORNERS[8:, :12], CORNERS[8:, 12:] = (
    (200, 40, 40), (40, 200, 40), (40, 40, 200), (250, 250, 250)
)  # fmt: skip


def encoded(image, kind="PNG", **options) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


def shown(data: bytes) -> np.ndarray:
    image = files.read_image(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def near(image, expected, far=3):
    """Whether pixels are the same, but for what JPEG and rounding change, in the middle of each corner."""
    expected = np.asarray(expected)
    assert image.shape == expected.shape
    H, W, _ = image.shape
    return all(
        np.abs(image[y, x] - expected[y, x].astype(int)).max() <= far for y in (3, H - 4) for x in (3, W - 4)
    )  # fmt: skip


TURNED = {  # by the EXIF tag, what a viewer makes of what is stored
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", TURNED)
def test_images_are_turned_as_a_viewer_does(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}[kind]
    assert near(shown(encoded(CORNERS, kind, exif=exif, **options)), TURNED[orientation](CORNERS), far=8)


def png(depth: int, colour_type: int, samples, **chunks: bytes) -> bytes:
    """A PNG of samples [H, W, C], 0 to 2^depth - 1, as Pillow cannot write all of them."""
    samples = np.asarray(samples, ">u2")
    bits = np.unpackbits(samples[..., None].view(np.uint8), axis=-1)[..., 16 - depth :]
    rows = np.packbits(bits.reshape(len(samples), -1), axis=1)
    header = struct.pack(">IIBBBBB", samples.shape[1], len(samples), depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = {"IHDR": header, **chunks, "IDAT": pixels, "IEND": b""}
    whole = b"\x89PNG\r\n\x1a\n"
    for name, data in parts.items():
        part = name.encode() + data
        whole += struct.pack(">I", len(data)) + part + struct.pack(">I", zlib.crc32(part))
    return whole


def before_white(colours, alpha):
    """Expected pixels of colours [H, W, 3] and alpha [H, W], 0 to 1."""
    return 255 + (np.asarray(colours) - 255) * np.asarray(alpha)[..., None]


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_greys_of_every_depth_are_scaled(depth):
    most = 2**depth - 1
    samples = np.array([[[0], [most // 2], [most - 1], [most]]])
    grey = np.repeat(samples * 255 / most, 3, axis=2)
    assert np.abs(shown(png(depth, 0, samples)) - grey).max() <= 1
    of_colour = png(depth, 0, samples, tRNS=struct.pack(">H", most))
    if depth == 16:
        with pytest.raises(ValueError, match="16 bits with a transparent colour: save it with an alpha channel"):
            files.read_image(of_colour)
    else:
        assert np.abs(shown(of_colour) - before_white(grey, samples[..., 0] != most)).max() <= 1
    of_black = png(depth, 0, samples, tRNS=struct.pack(">H", 0))
    if depth < 16:
        assert np.abs(shown(of_black) - before_white(grey, samples[..., 0] != 0)).max() <= 1


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palettes_of_every_depth(depth):
    palette = np.array([[200, 40, 40], [40, 40, 200]])
    samples = np.array([[[0], [1], [1], [0], [1]]])
    colours, entries = palette[samples[..., 0]], bytes(palette.ravel().tolist())
    assert np.abs(shown(png(depth, 3, samples, PLTE=entries)) - colours).max() == 0
    for alpha in ([51, 255], [51], [0], [255, 0]):  # those that are not given are opaque
        data = png(depth, 3, samples, PLTE=entries, tRNS=bytes(alpha))
        share = np.array([*alpha, 255])[samples[..., 0]] / 255
        assert np.abs(shown(data) - before_white(colours, share)).max() <= 1


@pytest.mark.parametrize("depth", [8, 16])
def test_colours_and_alpha_of_every_depth(depth):
    unit = (2**depth - 1) // 255
    colours = np.array([[[200, 40, 40], [0, 0, 0], [40, 40, 200]]])
    assert np.abs(shown(png(depth, 2, colours * unit)) - colours).max() == 0
    alpha = np.array([[0, 51, 255]])
    rgba = png(depth, 6, np.dstack([colours, alpha]) * unit)
    assert np.abs(shown(rgba) - before_white(colours, alpha / 255)).max() <= 1
    grey = png(depth, 4, np.dstack([colours[..., :1], alpha]) * unit)
    assert np.abs(shown(grey) - before_white(colours[..., :1].repeat(3, 2), alpha / 255)).max() <= 1
    key = png(depth, 2, colours * unit, tRNS=struct.pack(">HHH", 200 * unit, 40 * unit, 40 * unit))
    if depth == 8:
        assert np.abs(shown(key) - before_white(colours, [[0, 1, 1]])).max() == 0
    else:
        with pytest.raises(ValueError, match="16 bits with a transparent colour"):
            files.read_image(key)


def test_jpeg_and_webp_in_every_mode():
    options = {"quality": 95, "subsampling": 0}
    assert near(shown(encoded(CORNERS, "JPEG", **options)), CORNERS, far=8)
    assert near(shown(encoded(Image.fromarray(CORNERS).convert("CMYK"), "JPEG", **options)), CORNERS, far=8)
    grey = Image.fromarray(CORNERS).convert("L")
    assert near(shown(encoded(grey, "JPEG", quality=95)), np.repeat(np.asarray(grey)[..., None], 3, 2), far=8)
    clear = np.dstack([CORNERS, np.where(CORNERS[..., 0] == 40, 0, 255).astype(np.uint8)])
    expected = np.where(CORNERS[..., :1] == 40, 255, CORNERS)
    assert near(shown(encoded(clear, "WEBP", lossless=True, exact=True)), expected)


def test_colour_profiles_are_converted():
    """Of one whose red and green are exchanged, and of sRGB itself, which changes nothing that is seen."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exchanged = srgb.replace(b"rXYZ", b"?XYZ", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"?XYZ", b"gXYZ", 1)
    for kind in ("PNG", "JPEG", "WEBP"):
        options = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}[kind]
        assert near(shown(encoded(CORNERS, kind, icc_profile=srgb, **options)), CORNERS, far=8)
        found = shown(encoded(CORNERS, kind, icc_profile=exchanged, **options))
        assert near(found, CORNERS[..., [1, 0, 2]], far=8)
    grey = Image.fromarray(CORNERS).convert("L")
    assert np.abs(shown(encoded(grey, icc_profile=srgb)) - np.asarray(grey)[..., None]).max() <= 1
    with pytest.raises(ValueError, match="its colour profile cannot be used .cannot open profile.*: save it in sRGB"):
        files.read_image(encoded(CORNERS, icc_profile=b"damaged" * 30))


GAMMA, CHROMATICITY = 45455, (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)  # as nearly every PNG has them
ADOBE = (31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)  # of Adobe RGB, whose green is another


@pytest.mark.parametrize("said, plain", [
    ({"gAMA": GAMMA, "cHRM": CHROMATICITY}, True),
    ({"gAMA": 45000}, True),
    ({"gAMA": 100_000}, False),
    ({"gAMA": GAMMA, "cHRM": ADOBE}, False),
    ({"sRGB": b"\0", "gAMA": 100_000}, True),
    ({"cICP": b"\1\x0d\0\1", "gAMA": 100_000}, True),
    ({"cICP": b"\x09\x10\0\1", "sRGB": b"\0"}, False),
])  # fmt: skip
def test_a_png_in_other_colours_is_refused_as_browsers_would_convert_them(said, plain):
    """Linear light, another gamut, and PQ, that of films; what goes before them says that they do not matter."""
    chunks = {name: x if isinstance(x, bytes) else np.array(x, ">u4").tobytes() for name, x in said.items()}
    data = png(8, 2, np.full((8, 8, 3), 60), **chunks)
    if plain:
        assert (shown(data) == 60).all()
    else:
        with pytest.raises(ValueError, match="asks for other colours than sRGB's: save it in sRGB"):
            files.read_image(data)


def animation(kind):
    return encoded(CORNERS, kind, save_all=True, append_images=[Image.fromarray(CORNERS[::-1])])


JPEG = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "JPEG")


@pytest.mark.parametrize("data, said", [
    (b"", "no PNG, JPEG or WebP: save it as one of them"),
    (POINTER, "a pointer of Git LFS, not the file itself: fetch it with git lfs pull"),
    (encoded(CORNERS, "GIF"), "no PNG, JPEG or WebP"),
    (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "no PNG, JPEG or WebP"),
    (animation("PNG"), "an animation of 2 frames: save the one that is meant"),
    (animation("WEBP"), "an animation of 2 frames"),
    (encoded(CORNERS)[:-6], "broken PNG file"),
    (encoded(CORNERS)[:-12], "truncated PNG file"),
    (encoded(CORNERS)[: len(encoded(CORNERS)) // 2], "runcated"),
    (JPEG[:-200], "image file is truncated"),
    (encoded(CORNERS, "WEBP")[:-40], "decoder|identify|no PNG"),
])  # fmt: skip
def test_images_that_cannot_be_shown_are_refused(data, said):
    with pytest.raises(ValueError, match=said):
        files.read_image(data)


def test_too_large_an_image_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 24)
    assert files.read_image(encoded(CORNERS)).size == (24, 16)
    for limit in (16 * 24 - 1, 10):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=f"more than {limit} pixels are refused: make the image smaller"):
            files.read_image(encoded(CORNERS))


def test_a_photo_with_a_second_picture_is_its_first():
    photo = encoded(CORNERS, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))], quality=95)
    assert near(shown(photo), CORNERS, far=20)


def test_the_texts_of_a_png_are_kept(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("prompt", "Zwölf Bäume")
    (tmp_path / "x.png").write_bytes(encoded(CORNERS, pnginfo=info))
    assert files.read_image(tmp_path / "x.png").info == {"prompt": "Zwölf Bäume"}
    with pytest.raises(FileNotFoundError):
        files.read_image(tmp_path / "y.png")
