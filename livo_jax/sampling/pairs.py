"""Images with values beside those without, written to a directory."""

import itertools
import json
import pathlib

from livo_jax import sharding
from livo_jax.sampling.generate import generate
from livo_jax.sampling.requests import Request, requests_of


def write_pairs(
    directory,
    sd,
    value_encoder,
    prompts,
    values,
    num_images: int,
    *,
    seed: int,
    batch_size: int,
    mesh=None,
    options: dict,
    **settings,
):
    """Writes images of each prompt, the base's and the aligned one of the same noise side by side.

    Files are {prompt number}_{image number}.png in `directory`, each written when it is drawn, with its
    settings as PNG text.

    Args:
        values, options: what is applied to the images, as `requests_of` takes it: "auto" or a list of values for all;
            None or [] for the base's images alone.
        settings: of generate.
    """
    from tqdm import tqdm

    directory = pathlib.Path(directory)
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)  # before minutes of work: it may not be possible
    if made:
        directory.rmdir()  # nothing is there before something is drawn
    each = [prompt for prompt in prompts for _ in range(num_images)]
    sides = [requests_of(each)]
    if values:
        sides.append(requests_of(each, values if values == "auto" else [values] * len(each), seed, **options))
    rows, mesh = list(zip(*sides)), mesh or sharding.make_mesh()
    at_once = batch_size * sharding.batch_parts(mesh) // len(sides) or 1
    with tqdm(total=len(rows), desc="generate", unit="image") as progress:
        for start in range(0, len(rows), at_once):
            chunk = rows[start : start + at_once]
            requests = list(itertools.chain(*zip(*chunk)))
            images = generate(sd, requests, value_encoder, seed=seed, batch_size=batch_size, mesh=mesh, **settings)
            directory.mkdir(parents=True, exist_ok=True)  # not before something can be drawn
            for k, (*_, request) in enumerate(chunk):
                p, i = divmod(start + k, num_images)
                write_pair(directory / f"{p:03d}_{i:03d}.png", images[k :: len(chunk)], request, seed, settings)
            progress.update(len(chunk))


def write_pair(file, images, request: Request, seed: int, settings: dict):
    """Writes the images [H, W, 3] of one noise side by side as a PNG, whose text has the request and its settings."""
    from PIL.PngImagePlugin import PngInfo

    from livo_jax.files.directories import replacing
    from livo_jax.files.images import sheet

    info = PngInfo()
    text = {**request._asdict(), "seed": seed, **settings}
    text["values"] = json.dumps([dose._asdict() for dose in request.values])
    for name, setting in text.items():
        info.add_itxt(name, str(setting))
    with replacing(file) as scratch:
        sheet([images]).save(scratch, "PNG", pnginfo=info)
