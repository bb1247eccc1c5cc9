"""Images that an evaluation draws and what the judge reads in them, kept on disk: an interrupted one goes on."""

import hashlib
import json

import jax
import numpy as np
from PIL import Image

from livo_jax import sharding
from livo_jax.files.directories import ending_together

AT_ONCE = 4  # batches: so many are drawn again at most


def digest(tree) -> str:
    """Of a tree of arrays: the same where they are."""
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.ascontiguousarray(sharding.fetch(leaf) if isinstance(leaf, jax.Array) else leaf)
        hashed.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
    return hashed.hexdigest()


class Drawn:
    """The images of one method, [H, W, 3] uint8, and their readings, by request.

    `directory` has a folder for all that they depend on: settings.json, a PNG of each image, and read_*.json of each
    part, written when its images are there.

    Args:
        draw: draw(requests) -> [N, H, W, 3] uint8. judge: as judges.load makes it.
        settings: what images and readings depend on, for JSON.
        at_once: images that are drawn together.
    """

    def __init__(self, directory, draw, judge, settings: dict, at_once: int):
        text = json.dumps(settings, indent=2, sort_keys=True, default=str)
        self.folder = directory / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.draw_batch, self.judge, self.at_once, self.read = draw, judge, AT_ONCE * at_once, {}
        for file in self.folder.glob("read_*.json"):
            try:
                self.read |= json.loads(file.read_text())
            except ValueError:  # cut short: it is drawn again
                pass
        with ending_together():
            if jax.process_index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "settings.json").write_text(text + "\n")

    def draw(self, requests, progress):
        """Draws and judges those that are not there yet; `progress`: a tqdm bar."""
        new = [request for request in dict.fromkeys(requests) if _name(request) not in self.read]
        progress.update(len(requests) - len(new))
        # Requests of as many values are of one program, and only those of a strength pay for it.
        new.sort(key=lambda r: ([d.value for d in r.values], [d.strength not in (0, 1) for d in r.values]))
        for start in range(0, len(new), self.at_once):
            part = new[start : start + self.at_once]
            images = self.draw_batch(part)
            reading = self.judge(images)
            rows = {_name(r): {axis: column[i].item() for axis, column in reading.items()} for i, r in enumerate(part)}
            self.read |= rows
            with ending_together():  # and others read what process 0 has written
                if jax.process_index() == 0:
                    for request, image in zip(part, images):
                        with (self.folder / f"{_name(request)}.png").open("wb") as file:
                            Image.fromarray(image).save(file, "PNG")
                    (self.folder / f"read_{_name(part[0])}.json").write_text(json.dumps(rows))
            progress.update(len(part))

    def __getitem__(self, request) -> dict:
        """What the judge read in the image of a request, by axis."""
        return self.read[_name(request)]

    def __contains__(self, request) -> bool:
        return _name(request) in self.read

    def image(self, request) -> np.ndarray:
        """[H, W, 3] uint8."""
        with (self.folder / f"{_name(request)}.png").open("rb") as file:
            return np.asarray(Image.open(file))


def _name(request) -> str:
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:24]
