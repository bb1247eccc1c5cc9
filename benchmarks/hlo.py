"""Reads a compiled program's text (HLO): what a device runs, in its order, what each piece costs, and which line asks.

jaxlib's parser knows names, opcodes and operands. Shapes, costs and sources are in an instruction's text alone, so that
is read.
"""

import gzip
import hashlib
import importlib.metadata
import itertools
import json
import math
import pathlib
import re
import time
from collections.abc import Iterable
from typing import NamedTuple

COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%(?P<name>[\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%(?P<name>[\w.-]+) = (?P<shape>.*?) (?P<opcode>[a-z][\w-]*)\((?P<operands>[^)]*)\)(?P<rest>.*)"
)
CALLED = re.compile(r"(?:calls|to_apply|condition|body)=%([\w.-]+)|branch_computations=\{([^}]*)\}")
ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<sizes>[\d,]*)\](?:\{(?P<order>[\d,]*)(?P<layout>[^}]*)\})?")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
NOTHING = "parameter constant tuple get-tuple-element bitcast while conditional call after-all".split()


class Work(NamedTuple):
    """An instruction that a device runs, fusions whole.

    kind: "matrix product", "convolution", "kernel" (of Pallas), "collective" or "other".
    bytes: of its result, filled up to the tiles in which it lies; in memory: of that what is not in a core's own.
    cycles: what the compiler's model estimates, of all times together; None where it says nothing.
    op: the JAX primitive that it ends with; backward: whether it is of a backward pass. source: "FILE:LINE function".
    operands: (name, shape) of each.
    """

    name: str
    opcode: str
    kind: str
    shape: str
    bytes: int
    in_memory: int
    cycles: int | None
    times: int
    op: str
    backward: bool
    source: str
    operands: tuple[tuple[str, str], ...]


def read(text: str) -> list[Work]:
    """What a program (`compiled.as_text()`) has a device run, in order; a loop's body once, with its `times`.

    A branch that is chosen at run time counts as if all its sides ran. A loop whose length the text does not tell
    raises ValueError.
    """
    sources, computations, entry = _sources(text), {}, None
    for line in text.splitlines():
        if found := COMPUTATION.match(line):
            instructions = computations[found["name"]] = []
            entry = found["name"] if found["entry"] else entry
        elif found := INSTRUCTION.match(line):
            instructions.append(found)

    def within(fusion) -> Iterable:
        for name in _called(fusion):
            for found in computations[name]:
                yield found
                yield from within(found)

    def run(name: str, times: int) -> Iterable[Work]:
        shapes = {x["name"]: x["shape"] for x in computations[name]}
        for found in computations[name]:
            called = _called(found)
            if found["opcode"] == "while":
                yield from run(called[1], times * _trips(found, computations[called[0]]))
            elif found["opcode"] in ("conditional", "call"):
                for computation in called:
                    yield from run(computation, times)
            elif found["opcode"] not in NOTHING:
                inside = list(within(found))
                operands = tuple((x, shapes[x]) for x in re.findall(r"%([\w.-]+)", found["operands"]))
                yield _work(found, operands, inside, times, sources)

    return list(run(entry, 1))


def _called(found) -> list[str]:
    """The computations that an instruction names."""
    return [name for one, several in CALLED.findall(found["rest"]) for name in re.findall(r"[\w.-]+", one or several)]


def _trips(loop, condition) -> int:
    """How often a loop runs: by the text, or by the one number that its condition compares the count with."""
    if told := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop["rest"]):
        return int(told[1])
    limits = [found["operands"] for found in condition if found["opcode"] == "constant"]
    if len(limits) != 1 or not limits[0].isdigit():
        raise ValueError(f"the text does not tell how often {loop['name']} runs: its condition compares with {limits}")
    return int(limits[0])


def _work(found, operands, inside, times: int, sources: dict) -> Work:
    opcode, rest = found["opcode"], found["rest"]
    op = _op(rest)
    products = [x for x in (found, *inside) if x["opcode"] in ("dot", "convolution")]
    if 'custom_call_target="tpu_custom_call"' in rest:
        kind = "kernel"
    elif opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
        kind = "collective"
    elif products or "__cublas$" in rest or "__cudnn$conv" in rest:
        # A TPU's compiler makes convolutions of all products.
        convolves = "__cudnn$conv" in rest or any("conv" in _op(x["rest"]) for x in products)
        kind = "convolution" if convolves else "matrix product"
    else:
        kind = "other"
    told = re.search(r'"estimated_cycles":"(\d+)"', rest)
    # A fusion that says nothing of its own origin has that of what it ends with.
    origin = next((x["rest"] for x in (found, *reversed(inside)) if "op_name=" in x["rest"]), "")
    frame = re.search(r"stack_frame_id=(\d+)", origin)
    total, outside = memory(found["shape"])
    return Work(
        name=found["name"],
        opcode=opcode,
        kind=kind,
        shape=found["shape"],
        bytes=total,
        in_memory=outside,
        cycles=int(told[1]) * times if told else None,
        times=times,
        op=op or _op(origin) or opcode,
        backward="transpose(" in origin,
        source=sources.get(int(frame[1]), "") if frame else "",
        operands=operands,
    )


def _op(attributes: str) -> str:
    """The primitive in an instruction's op_name: its last part."""
    name = re.search(r'op_name="([^"]*)"', attributes)
    return name[1].split("/")[-1] if name else ""


def memory(shape: str) -> tuple[int, int]:
    """Bytes of an HLO shape, of a tuple the sum, filled up to tiles: all, and what is not in a core's own memory.

    bf16[8,40]{1,0:T(8,128)(2,1)} is laid out as [8, 128]. S(1) and above are a core's own.
    """
    total = outside = 0
    for found in ARRAY.finditer(shape):
        sizes = [int(n) for n in found["sizes"].split(",") if n]
        order, layout = found["order"] or "", found["layout"] or ""
        if order and (tile := re.search(r"T\(([\d,]+)\)", layout)):
            tile = [int(n) for n in tile[1].split(",")]
            sizes = [sizes[int(axis)] for axis in reversed(order.split(","))]  # as they lie, the densest last
            for axis, side in zip(range(-1, -len(sizes) - 1, -1), reversed(tile)):
                sizes[axis] = -(-sizes[axis] // side) * side
        number = math.prod(sizes) * width(found["dtype"])
        total += number
        outside += 0 if re.search(r"S\([1-9]", layout) else number
    return int(total), int(outside)


def width(dtype: str) -> float:
    """Bytes of an element: 2 of bf16, 1 of pred and f8e4m3fn, 0 of a token."""
    bits = {"pred": 8, "token": 0, "opaque": 0}
    return (bits[dtype] if dtype in bits else int(re.search(r"\d+", dtype)[0])) / 8


def sizes(shape: str) -> tuple[tuple[int, ...], ...]:
    """The sizes of the arrays of an HLO shape: ((8, 40), ()) of (bf16[8,40], f32[])."""
    return tuple(tuple(int(n) for n in found["sizes"].split(",") if n) for found in ARRAY.finditer(shape))


def _sources(text: str) -> dict[int, str]:
    """Of each stack frame "FILE:LINE function": the innermost line that is no installed library's."""

    def table(title: str, row: str) -> dict[int, tuple]:
        block = re.search(rf"^{title}\n(.*?)\n\n", text, re.M | re.S)
        return {int(number): rest for number, *rest in re.findall(row, block[1])} if block else {}

    files = table("FileNames", r'(\d+) "(.*)"')
    functions = table("FunctionNames", r'(\d+) "(.*)"')
    lines = table("FileLocations", r"(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)")
    frames = table("StackFrames", r"(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)")
    # The first has no parent: XLA writes 0, or counts parents from 1.
    none = int(frames[1][1]) if frames else 0

    def describe(frame: int) -> str:
        told = []
        while frame:
            location, parent = map(int, frames[frame])
            file, function, line = map(int, lines[location])
            told.append((files[file][0], line, functions[function][0]))
            frame = parent - none
        file, line, function = next((x for x in told if "site-packages" not in x[0]), told[0])
        where = pathlib.Path(file)
        return f"{'/'.join(where.parts[-2:])}:{line} {function.replace('.<locals>', '')}"

    return {frame: describe(frame) for frame in frames}


def collectives(work: list[Work]) -> list[dict]:
    """Collectives by kind: how many, the bytes that one device's results hold, how many of them run beside other work,
    and the cycles that the compiler put between their start and end.
    """
    rows = {}
    starts = {x.name: at for at, x in enumerate(work) if x.kind == "collective" and x.opcode.endswith("-start")}
    for at, x in enumerate(work):
        if x.kind != "collective" or x.opcode.endswith("-start"):
            continue
        began = next((starts[name] for name, _ in x.operands if name in starts), at)
        hidden = sum(between.cycles or 0 for between in work[began:at])
        kind = x.opcode.removesuffix("-done")
        row = rows.setdefault(kind, {"collective": kind, "count": 0, "bytes": 0, "asynchronous": 0, "cycles_beside": 0})
        row["count"] += x.times
        row["bytes"] += x.bytes * x.times
        row["asynchronous"] += x.times * (hidden > 0)
        row["cycles_beside"] += hidden
    return list(rows.values())


def dearest(work: list[Work]) -> list[dict]:
    """Work with cycles, that of one kind, primitive and line added up, dearest first."""

    def key(x):
        return x.kind, x.op, x.backward, x.source

    rows = []
    for (kind, op, backward, source), same in itertools.groupby(sorted(work, key=key), key):
        same = [x for x in same if x.cycles is not None]
        if same:
            row = {"cycles": sum(x.cycles for x in same), "count": sum(x.times for x in same), "kind": kind, "op": op}
            rows.append(row | {"pass": "backward" if backward else "forward", "source": source})
    return sorted(rows, key=lambda row: -row["cycles"])


def buffers(work: list[Work], least: int) -> list[dict]:
    """Results that are written to the device's memory with so many bytes at least, like ones counted, largest first."""

    def key(x):
        return -x.in_memory, re.sub(r"\{[^}]*\}", "", x.shape), x.op, x.backward, x.source

    large = [x for x in work if x.in_memory >= least and not x.opcode.endswith("-start")]  # which names what is copied
    rows = []
    for (size, shape, op, backward, source), same in itertools.groupby(sorted(large, key=key), key):
        row = {"bytes": -size, "count": sum(x.times for x in same), "shape": shape, "op": op}
        rows.append(row | {"pass": "backward" if backward else "forward", "source": source})
    return rows


def bundles(text: str) -> int | None:
    """The instruction bundles that a TPU runs of a program, as libtpu writes it; None where a loop's end is no number.

    A core issues a bundle in a cycle. Those of branches are counted as if taken each time; waiting for memory is not.
    """
    counts, trips = [0], [1]  # of the loops that a line is in, the outermost first
    for begins, nested, bundle in re.findall(r"^ *(?:0x[0-9a-f]+|0) +(LB)?\w*: (>*) (.*)", text, re.M):
        # One that is empty, or waits for the branch at a loop's end, may not say what it is in.
        depth = len(counts) - 1 if bundle.startswith("{}") else min(len(nested) - bool(begins), len(counts) - 1)
        while len(counts) > depth + 1:
            count, times = counts.pop(), trips.pop()
            if times is None:
                return None
            counts[-1] += count * times
        if begins:
            counts.append(0)
            trips.append(None)
        counts[-1] += 1
        if end := re.search(r"scmp\.ge[^;}]*, (\d+) /\* loop exit test", bundle):
            trips[-1] = int(end[1])
    return counts[0]


def read_bundles(directory) -> dict[str, int | None]:
    """The bundles of each program that libtpu left in a directory, by the name of its instruction."""
    files = pathlib.Path(directory).glob("*-final_bundles.txt")
    texts = {re.fullmatch(r"\d+-(.+)-\d+-final_bundles", x.stem)[1]: x.read_text(encoding="utf-8") for x in files}
    return {name: bundles(text) for name, text in texts.items()}


def compile_once(lowered, target: str, directory, written) -> tuple[dict, bool]:
    """What is told of a lowered program once it is compiled for a target, and whether the directory had that.

    text; seconds of compiling; arguments, temporary: bytes of a device's memory; flops, bytes: as XLA counts them, None
    where it does not; bundles: of read_bundles, of the directory `written`.
    """
    versions = [
        (d.name, d.version) for d in importlib.metadata.distributions() if d.name in ("jax", "jaxlib", "libtpu")
    ]
    key = hashlib.sha256(f"{lowered.as_text()} {target} {sorted(versions)} bundles".encode()).hexdigest()
    file = pathlib.Path(directory) / f"{key}.json.gz"
    if file.exists():
        return json.loads(gzip.decompress(file.read_bytes())), True
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds, memory, counted = time.perf_counter() - start, compiled.memory_analysis(), compiled.cost_analysis() or {}
    told = {
        "text": compiled.as_text(),
        "seconds": seconds,
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "flops": counted.get("flops"),
        "bytes": counted.get("bytes accessed"),
        "bundles": read_bundles(written),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(json.dumps(told).encode()))
    return told, False
