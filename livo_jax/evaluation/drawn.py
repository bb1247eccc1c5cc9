"""Images that an evaluation draws and what the judge reads in them, kept on disk: an interrupted one goes on."""

import hashlib
import json

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from livo_jax.files.directories import replacing
from livo_jax.processes import ending_together
from livo_jax.sampling.requests import has_own_row, without_values

AT_ONCE = 4  # batches: so many are drawn again at most


class Drawn:
    """The images of one method, [H, W, 3] uint8, and their readings, by request.

    `directory` has a folder for all that images depend on: settings.json and a PNG of each. In it is a folder for all
    that readings depend on too: settings.json and read_*.json. So another judge reads the images that are there.

    Args:
        draw: draw(requests) -> [N, H, W, 3] uint8. judge: as judges.load makes it.
        settings: what images depend on, for JSON; reading: what readings depend on beside them.
        at_once: images that are drawn together.
    """

    def __init__(self, directory, draw, judge, settings: dict, reading: dict, at_once: int):
        self.folder = directory / _key(settings)
        self.readings = self.folder / f"readings_{_key(reading)}"
        self.draw_batch, self.judge, self.at_once, self.read = draw, judge, AT_ONCE * at_once, {}
        self.settings = settings
        for file in self.readings.glob("read_*.json"):
            try:
                self.read |= json.loads(file.read_text(encoding="utf-8"))
            except ValueError:  # cut short: its images are read again
                pass
        self.there = {file.stem for file in self.folder.glob("*.png")}  # of every process the same: none draws yet
        with ending_together():
            if jax.process_index() == 0:
                self.readings.mkdir(parents=True, exist_ok=True)
                for folder, what in (self.folder, settings), (self.readings, reading):
                    (folder / "settings.json").write_text(_text(what) + "\n", encoding="utf-8")

    def read_by(self, judge, reading: dict) -> "Drawn":
        """The same images, read by another judge. Arguments as those of the class."""
        return Drawn(self.folder.parent, self.draw_batch, judge, self.settings, reading, self.at_once // AT_ONCE)

    def draw(self, requests, progress):
        """Draws those that are not there yet, and judges those that are not read yet; `progress`: a tqdm bar."""
        new = [request for request in dict.fromkeys(requests) if _name(request) not in self.read]
        progress.update(len(requests) - len(new))
        # Requests of as many values are of one program, and only those of a strength pay for it.
        new.sort(key=lambda r: ([d.value for d in r.values], [has_own_row(d, gated=False) for d in r.values]))
        new.sort(key=lambda r: _name(r) in self.there)  # stable
        of_sizes = {}  # images that are drawn, and read, together are of one size
        for request in new:
            of_sizes.setdefault(request.size, []).append(request)
        parts = (of[i : i + self.at_once] for of in of_sizes.values() for i in range(0, len(of), self.at_once))
        for part in parts:
            missing = [request for request in part if _name(request) not in self.there]
            images = dict(zip(missing, self.draw_batch(missing))) if missing else {}
            with ending_together():  # and others read what process 0 has written
                for request in missing if jax.process_index() == 0 else ():
                    with replacing(self.folder / f"{_name(request)}.png") as scratch, scratch.open("wb") as file:
                        Image.fromarray(images[request]).save(file, "PNG")
            self.there |= {_name(request) for request in missing}
            reading = self.judge(np.stack([images[r] if r in images else self.image(r) for r in part]))
            rows = {_name(r): {axis: column[i].item() for axis, column in reading.items()} for i, r in enumerate(part)}
            self.read |= rows
            with ending_together():
                if jax.process_index() == 0:
                    (self.readings / f"read_{_name(part[0])}.json").write_text(json.dumps(rows), encoding="utf-8")
            progress.update(len(part))

    def __getitem__(self, request) -> dict:
        """What the judge read in the image of a request, by axis."""
        return self.read[_name(request)]

    def __contains__(self, request) -> bool:
        return _name(request) in self.read

    def keep(self, name: str, depends_on: dict, make):
        """What make() gives, for JSON, beside the images of the model that it was made of: there already it is read.

        Args:
            depends_on: on what it depends beside what images do.
        """
        file = self.folder / f"{name}_{_key(depends_on)}.json"
        with ending_together():  # of every process the same: none writes yet
            there = file.exists()
        if not there:
            made = make()
            with ending_together():  # and others read what process 0 has made: of a language model it differs
                if jax.process_index() == 0:
                    with replacing(file) as scratch:
                        scratch.write_text(json.dumps(made), encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))

    def image(self, request) -> np.ndarray:
        """[H, W, 3] uint8. Raises ValueError for a file that is damaged."""
        path = self.folder / f"{_name(request)}.png"
        try:
            with path.open("rb") as file:
                return np.asarray(Image.open(file))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{path} is damaged: remove it, and it is drawn again: {error}") from error


class Sides:
    """The images of a method beside the base's: of requests with values the method's, of others the base's."""

    def __init__(self, base: Drawn, ours: Drawn):
        self.base, self.ours = base, ours

    def of(self, request) -> Drawn:
        return self.ours if request.values else self.base

    def draw(self, requests):
        """Draws and judges what is not there yet."""
        requests = list(dict.fromkeys(requests))
        with tqdm(total=len(requests), desc="evaluate", unit="image", disable=jax.process_index() > 0) as progress:
            for side in (self.base, self.ours):
                side.draw([request for request in requests if self.of(request) is side], progress)

    def reading(self, requests) -> dict[str, np.ndarray]:
        """What the judge read, [N] by axis."""
        rows = [self.of(request)[request] for request in requests]
        return {axis: np.array([row[axis] for row in rows]) for axis in rows[0]}

    def shares(self, value, requests) -> dict[str, float]:
        """Of the images that show an attribute of a bias, the share of each."""
        read = self.reading(requests)[value.axis]
        counts = {attribute: int(np.sum(read == attribute)) for attribute in value.attributes}
        return {attribute: n / max(1, sum(counts.values())) for attribute, n in counts.items()}

    def distance(self, requests, plain=None) -> float:
        """The mean difference, 0 to 1, of the pixels of images and the base's of `plain`: the same without values."""
        pairs = zip(requests, plain or without_values(requests))
        differences = [np.abs(self.of(r).image(r).astype(int) - self.base.image(own)).mean() for r, own in pairs]
        return float(np.mean(differences) / 255)


def _text(settings: dict) -> str:
    return json.dumps(settings, indent=2, sort_keys=True, default=str)


def _key(settings: dict) -> str:
    return hashlib.sha256(_text(settings).encode()).hexdigest()[:16]


def _name(request) -> str:
    *fields, seed, guidance_scale, size = request
    own = {"seed": seed, "guidance_scale": guidance_scale, "size": size}
    if own := {name: x for name, x in own.items() if x is not None}:
        fields.append(own)  # else the name is that of images of before requests had their own
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:24]
