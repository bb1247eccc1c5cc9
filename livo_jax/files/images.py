"""Images that users give, read in one way; and how images are shown.

They are PNG, JPEG and WebP: other formats are rarer, and some are programs.
"""

import base64
import io
import os
import pathlib

import numpy as np
from PIL import Image, ImageCms, ImageFilter, ImageOps, UnidentifiedImageError

from livo_jax.files.directories import is_hidden
from livo_jax.files.repositories import POINTER

FETCH = "a pointer of Git LFS, not the file itself: fetch it with git lfs pull"

FORMATS = ("PNG", "JPEG", "WEBP")  # as Pillow calls them
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

BIT_DEPTH = 24  # where a PNG has its bits for each channel

# sRGB as a PNG's gAMA says it, and its cHRM: x and y of white, red, green and blue.
SRGB = (1 / 2.2, 0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)

CICP, CICP_SRGB = b"\0\0\0\4cICP", b"\1\x0d\0\1"  # the chunk that goes before all others, as it begins and as it is


def image_files(folder: str | os.PathLike) -> list[pathlib.Path]:
    """The images of a folder by their suffixes, of SUFFIXES, in order; none that is hidden."""
    there = sorted(pathlib.Path(folder).expanduser().glob("*"))
    return [p for p in there if p.suffix.lower() in SUFFIXES and not is_hidden(p.name) and p.is_file()]


def read_image(source: bytes | str | os.PathLike) -> Image.Image:
    """An image as a viewer shows it, in mode RGB; what its pixels are is decided here alone.

    Turned as its EXIF tag says; transparency stands before white; 16 bits are scaled to 8; a colour profile is
    converted to sRGB. `info` of what is returned has the texts of a PNG and nothing else.

    Args:
        source: an image file, or what is in it.

    Raises:
        OSError: there is no such file.
        ValueError: it is no PNG, JPEG or WebP, is cut short or damaged, an animation, or larger than
            Image.MAX_IMAGE_PIXELS; or it is a PNG of 16 bits with a transparent colour, or of other colours than sRGB's
            without a profile of them; or has a colour profile that is damaged or of another kind than its pixels.
    """
    data = source
    if not isinstance(source, bytes):
        with open(source, "rb") as file:
            data = file.read()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            # A photo with a second picture beside it (MPO), for depth or a preview, is no animation.
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"an animation of {image.n_frames} frames: save the one that is meant")
            if image.format == "PNG" and image.mode != "P" and "transparency" in image.info:
                if data[BIT_DEPTH] == 16:  # Pillow compares 8 bits with 16
                    raise ValueError("a PNG of 16 bits with a transparent colour: save it with an alpha channel")
                if data[BIT_DEPTH] in (2, 4):  # Pillow scales the pixels alone
                    image.info["transparency"] *= 255 // (2 ** data[BIT_DEPTH] - 1)
            if image.format == "PNG":
                _check_colours(image.info, data[: data.find(b"IDAT")])
            upright = ImageOps.exif_transpose(image)
            texts = getattr(image, "text", {})
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.verify()  # of a PNG all checksums, to its end
        shown = _before_white(upright)
    except UnidentifiedImageError:
        if data.startswith(POINTER):
            raise ValueError(FETCH) from None
        raise ValueError("no PNG, JPEG or WebP: save it as one of them") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels are refused"
        raise ValueError(f"{error}; {limit}: make the image smaller") from error
    except ValueError:
        raise
    except Exception as error:  # OSError, SyntaxError, struct.error, and whatever else Pillow's plugins raise
        raise ValueError(f"{type(error).__name__}: {error}: fetch or save it again") from error
    shown.info = dict(texts)
    return shown


def _check_colours(info: dict, chunks: bytes):
    """Raises ValueError where a PNG has other colours than sRGB's and says so by numbers: browsers heed these.

    cICP goes before a profile and sRGB, these before gAMA and cHRM (Portable Network Graphics, third edition, 4.3).
    """
    cicp = chunks.partition(CICP)[2]
    told = bool(cicp) or "icc_profile" in info or "srgb" in info
    numbers = (info.get("gamma") or SRGB[0], *info.get("chromaticity", SRGB[1:]))  # a gamma of 0 says nothing
    far = any(abs(number - of_srgb) > 0.01 for number, of_srgb in zip(numbers, SRGB))
    if (cicp and not cicp.startswith(CICP_SRGB)) or (far and not told):
        raise ValueError("its chunk cICP, gAMA or cHRM asks for other colours than sRGB's: save it in sRGB")


def _before_white(image: Image.Image) -> Image.Image:
    """An image of any mode that FORMATS have, in RGB, what is transparent before white."""
    if image.mode == "I;16":
        image = image.point(lambda v: v / 257 + 0.5).convert("L")  # convert alone clips at 255
    if not image.has_transparency_data:
        return _in_srgb(image)
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(_in_srgb(image), mask=image.getchannel("A"))
    return white


def _in_srgb(image: Image.Image) -> Image.Image:
    """The colours of an image by its profile, in RGB; without one they are sRGB."""
    if not image.info.get("icc_profile"):
        return image.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        if profile.profile.xcolor_space == "RGB ":
            image = image.convert("RGB")
        elif image.mode == "1":
            image = image.convert("L")
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (OSError, ImageCms.PyCMSError) as error:
        raise ValueError(f"its colour profile cannot be used ({error}): save it in sRGB") from error


GAP = 2  # pixels between the images of a sheet


def blurred(images) -> list[np.ndarray]:
    """Images [H, W, 3] uint8 in which no harm can be made out."""
    blur = ImageFilter.GaussianBlur(images[0].shape[0] / 6)
    return [np.asarray(Image.fromarray(image).filter(blur)) for image in images]


def sheet(rows, scale: int = 1) -> Image.Image:
    """Rows of images (lists of [H, W, 3] uint8, None leaves a gap) as one image."""
    H, W, _ = next(image for row in rows for image in row if image is not None).shape
    columns = max(map(len, rows))
    canvas = np.full((len(rows) * (H + GAP) - GAP, columns * (W + GAP) - GAP, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            if image is not None:
                canvas[r * (H + GAP) : r * (H + GAP) + H, c * (W + GAP) : c * (W + GAP) + W] = image
    picture = Image.fromarray(canvas)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png_uri(picture) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return data_uri("image/png", stream.getvalue())
