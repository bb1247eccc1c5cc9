"""Whether an image shows the objects that its prompt states: the rules of GenEval (Ghosh et al. 2023).

A prompt states what it should have, in the layout of their evaluation_metadata.jsonl:

    {"include": [{"class": "dog", "count": 1, "color": "red"},
                 {"class": "cat", "count": 1, "position": ["left of", 0]}],
     "exclude": [{"class": "dog", "count": 2}]}

here one red dog, a cat left of the first entry's objects, and fewer than two dogs. A judge that finds objects reads of
each image, on the axis OBJECTS, a JSON list of them, the surest first: dicts of class; box, (left, top, right, bottom)
in pixels; counted, whether it is sure enough to be counted; and colour, where the judge reads that.
"""

import json

import numpy as np

from livo_jax.judges import COLOURS

OBJECTS = "objects"
STATED = "stated "  # begins the metrics of `stated_shown`, shares of images
RELATIONS = ("left of", "right of", "above", "below")
MARGIN = 0.1  # of two boxes' widths or heights together: centres that are nearer are of no relation
LEAST = 0.5  # share of the distance of the centres that is along an axis
# GenEval's names of three of COCO's classes, which detectors call as COCO does.
OTHER_NAMES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
FIELDS = {"include": ("class", "count", "color", "position"), "exclude": ("class", "count")}


def stated_shown(stated: dict, reading: dict) -> dict[str, float]:
    """For each axis of what a prompt states, the share of its images in which the judge reads that.

    Args:
        stated: {axis: what is to be read}; on OBJECTS what the image should have, as the head of this file has it.
        reading: what the judge read, arrays [n] by axis.

    Raises:
        ValueError: axes that the judge does not read, and those that it does.
    """
    if unknown := [axis for axis in stated if axis not in reading]:
        raise ValueError(
            f"config.eval.compositions: the judge does not read {', '.join(unknown)}, but {', '.join(reading)}"
        )
    shown = {
        axis: [shows(wanted, read) for read in reading[axis].tolist()] if axis == OBJECTS else reading[axis] == wanted
        for axis, wanted in stated.items()
    }
    return {f"{STATED}{axis}": float(np.mean(of_axis)) for axis, of_axis in shown.items()}


def faults(stated) -> list[str]:
    """What is wrong with what a prompt states, whatever judge reads it."""
    if not isinstance(stated, dict) or not {"include"} <= stated.keys() <= FIELDS.keys():
        return [f"{stated!r} has not the fields include and, if need be, exclude"]
    found = []
    for part, entries in stated.items():
        if not isinstance(entries, list | tuple) or part == "include" and not entries:
            found.append(f"{part}={entries!r} is no list of objects")
            continue
        for k, entry in enumerate(entries):
            found += [f"{part}[{k}]: {fault}" for fault in _faults_of(entry, FIELDS[part], k)]
    return found


def _faults_of(entry, fields, k: int) -> list[str]:
    """Of the entry k. fields: that it may have."""
    if not isinstance(entry, dict) or not {"class", "count"} <= entry.keys() <= {*fields}:
        return [f"{entry!r} needs class and count, and may have {', '.join(fields)}"]
    found = []
    if not isinstance(entry["class"], str) or not entry["class"]:
        found.append(f"class={entry['class']!r} is no name")
    if type(entry["count"]) is not int or entry["count"] < 1:
        found.append(f"count={entry['count']!r} is no whole number from 1 on")
    if entry.get("color", COLOURS[0]) not in COLOURS:
        found.append(f"color={entry['color']!r}: choose from {', '.join(COLOURS)}")
    if "position" in entry:
        match entry["position"]:
            case [str(relation), int(target)] if relation in RELATIONS and 0 <= target < k:
                pass
            case position:
                found.append(
                    f"position={position!r} is no [relation, number of an entry above, from 0 on], the relation one of"
                    f" {', '.join(RELATIONS)}"
                )
    return found


def unread(stated: list[dict], judge) -> list[str]:
    """What a judge cannot read of what prompts state, which has no faults.

    Args:
        judge: a Judge; its `objects` and `colours` are what it tells apart.
    """
    entries = [entry for one in stated for part in FIELDS for entry in one.get(part, ())]
    if not judge.objects and entries:
        return [f"{judge.pinned.get('name', 'the judge')} finds no objects"]
    found, classes = [], dict.fromkeys(entry["class"] for entry in entries)
    if unknown := [name for name in classes if _name(name, judge.objects) not in judge.objects]:
        found.append(f"there is no class {', '.join(map(repr, unknown))}, choose from {', '.join(judge.objects)}")
    colours = dict.fromkeys(entry["color"] for entry in entries if "color" in entry)
    if unknown := [colour for colour in colours if colour not in judge.colours]:
        remedy = f"choose from {', '.join(judge.colours)}" if judge.colours else "set config.judging.colours, a CLIP"
        found.append(f"it reads no colour {', '.join(map(repr, unknown))}: {remedy}")
    return found


def _name(stated: str, known) -> str:
    """What a class that is stated is called among the known ones."""
    return stated if stated in known else OTHER_NAMES.get(stated, stated)


def shows(stated: dict, read: str) -> bool:
    """Whether an image has all that is included and nothing that is excluded.

    Of each entry the `count` surest objects of its class are looked at: they must be there, as many must be of its
    colour, and each must be in its relation to each of those of the entry that it names. A prompt that excludes states
    a number: there only objects that are `counted` are objects. In GenEval's file those of the task "counting" do.

    Args:
        stated: as the head of this file has it, without faults. read: what the judge reads on OBJECTS; "" is an image
            that cannot be read, which shows nothing.
    """
    found = [one for one in json.loads(read or "[]") if one["counted"] or not stated.get("exclude")]
    of_entries, known = [], {one["class"] for one in found}

    def of_class(entry):
        return [one for one in found if one["class"] == _name(entry["class"], known)]

    for entry in stated["include"]:
        surest = of_class(entry)[: entry["count"]]
        if len(surest) < entry["count"]:
            return False
        if "color" in entry and any(one.get("colour") != entry["color"] for one in surest):
            return False
        if "position" in entry:
            relation, target = entry["position"]
            if any(relation not in relations(a["box"], b["box"]) for a in surest for b in of_entries[target]):
                return False
        of_entries.append(surest)
    return not any(len(of_class(entry)) >= entry["count"] for entry in stated.get("exclude", ()))


def relations(a, b) -> set[str]:
    """Those of RELATIONS in which a box stands to another; two where it is as far beside as it is above or below.

    With o the offset of the centres, b's to a's, and s the sum of the widths and of the heights, the direction is
    sign(o) max(|o| - MARGIN s, 0) / |o|, and a relation is where it is more than LEAST along an axis (Ghosh et al.
    2023, and their code).

    Args:
        a, b: (left, top, right, bottom), y downwards.
    """
    a, b = (np.asarray(box, float).reshape(2, 2) for box in (a, b))
    offset = a.mean(0) - b.mean(0)
    beyond = np.maximum(np.abs(offset) - MARGIN * (np.ptp(a, axis=0) + np.ptp(b, axis=0)), 0) * np.sign(offset)
    if not beyond.any():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    shown = x < -LEAST, x > LEAST, y < -LEAST, y > LEAST
    return {relation for relation, is_so in zip(RELATIONS, shown) if is_so}


def parse(part: str, text: str) -> list[dict]:
    """The include or the exclude of a file's row, as JSON; [] of an empty exclude. Raises ValueError."""
    try:
        entries = json.loads(text or "[]")
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from None
    stated = {"include": [{"class": "any", "count": 1}], part: entries}
    if found := faults(stated):
        raise ValueError("; ".join(found))
    return entries
