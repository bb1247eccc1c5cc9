"""Target ratios: which attributes the images of a bias value should show, and which token each image gets for it.

An image's arm is what the value encoder reads before its prompt: "" (there is no token), the value's statement, or
"statement: attribute". What the arms show is measured (evaluate.py: eval/rates.json); `solve` mixes those whose shares
hold for each prompt, and `assign` deals them out to images.
"""

import json
import math
import os
import pathlib
import warnings
from collections.abc import Collection, Mapping

import numpy as np

from livo_jax.values.dealing import uniforms

FAR, NEAR = 0.1, 0.05  # total variation from the target from which a mix is refused, and warned of


def read(source) -> Mapping | str:
    """A ratio or rates: "equal" and a table are themselves; else a JSON object, or the path of a file of one.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(source, Mapping) or source == "equal":
        return source
    text = os.fspath(source)
    try:
        inline = text.lstrip().startswith("{")
        table = json.loads(text if inline else pathlib.Path(text).expanduser().read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{text!r} is neither 'equal' nor a JSON object, nor a file of one: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{text!r} holds {table!r}, not a JSON object")
    return table


def targets(ratio, rates: Mapping, statements: Collection[str]) -> dict[str, dict[str, float]]:
    """What is wanted of each value: {statement: {attribute: share}}, all of its attributes.

    Args:
        ratio: "equal", a table {attribute: share}, of one value or of several, as JSON too, or the path of a file of
            it. The shares of a value's attributes sum to 1; one that is not named has none.
        rates: {statement: {arm: {attribute: share}}} of the bias values, or the path of rates.json.
        statements: the values that are applied; the ratio is for those of them whose attributes it names.

    Raises:
        ValueError: attributes that no value has, shares below 0 or of another sum than 1; all are listed.
    """
    ratio, rates = read(ratio), read(rates)
    known = {statement: [*arms[""]] for statement, arms in rates.items()}
    if ratio == "equal":
        return {s: dict.fromkeys(known[s], 1 / len(known[s])) for s in statements if s in known}
    there = "; ".join(f"{statement} ({', '.join(names)})" for statement, names in known.items())
    attributes = {name for names in known.values() for name in names}
    problems = [f"{name!r} is no attribute of {there}" for name in ratio if name not in attributes]
    for name, x in ratio.items():
        if not (isinstance(x, int | float) and 0 <= x < math.inf):
            problems.append(f"{name}: {x!r} is no share, 0 or more")
    found, shares = {}, not problems
    for statement, names in known.items():
        if statement in statements and any(name in ratio for name in names):
            found[statement] = {name: ratio.get(name, 0.0) for name in names}
            if shares and not math.isclose(total := sum(found[statement].values()), 1, abs_tol=1e-6):
                problems.append(f"the shares of {statement} ({', '.join(names)}) sum to {total:g}, not to 1")
    if problems:
        raise ValueError(f"ratio={ratio!r} cannot be reached:\n  " + "\n  ".join(problems))
    return found


def solve(target: Mapping[str, float], arms: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mix {arm: share} of the arms nearest to the target; those without a share are left out.

    Nearest in total variation; of mixes that are equally near, that whose images vary the least, by a linear program.

    Args:
        target: {attribute: share}. arms: {arm: {attribute: share}}, what each shows.

    Raises:
        ValueError: the nearest mix is further than FAR. A warning says if it is further than NEAR.
    """
    from scipy.optimize import linprog

    t = np.array([*target.values()])
    P = np.array([[shares[attribute] for attribute in target] for shares in arms.values()])  # [A, K]
    A, K = P.shape
    variance = (P * (1 - P)).sum(1)  # of the counts, of one image
    solution = linprog(  # of the shares x [A] and of d [K], no less than the distances |x P - t|
        [*1e-3 * variance, *np.full(K, 0.5)],
        A_ub=np.block([[P.T, -np.eye(K)], [-P.T, -np.eye(K)]]), b_ub=[*t, *-t],
        A_eq=[[1.0] * A + [0.0] * K], b_eq=[1.0],
    )  # fmt: skip
    x = solution.x[:A]
    reached = dict(zip(target, x @ P))
    distance = 0.5 * np.abs(x @ P - t).sum()
    if distance > NEAR:
        wanted, nearest = (
            ", ".join(f"{attribute} {share:.2f}" for attribute, share in shares.items()) for shares in (target, reached)
        )
        message = f"{wanted}: the nearest that the tokens reach is {nearest}, {distance:.2f} away"
        if distance > FAR:
            raise ValueError(f"{message}: choose a ratio nearer to it, or train with config.data.attributes above 0")
        warnings.warn(message, stacklevel=2)
    return {arm: float(share) for arm, share in zip(arms, x) if share > 1e-6}


def assign(mix: Mapping[str, float], groups: list, statement: str, seed: int) -> list[str]:
    """Deals the arms of a mix out to images: the arm of each.

    Of each group's images and of all of them, an arm gets its share, rounded up or down, but for the rounding of the
    arms before it. Which images of a group get it is drawn.

    Args:
        groups: of the images, hashable; groups that follow each other in sorting share their rounding.
        seed: of the draw, with the statement.
    """
    rank = {group: i for i, group in enumerate(sorted(set(groups)))}
    draws = uniforms(len(groups) + len(mix), "ratio", seed, statement, *map(str, rank))
    order = sorted(range(len(groups)), key=lambda i: (rank[groups[i]], draws[i]))
    dealt, left = [""] * len(groups), np.array(order)
    shares, starts = np.array([*mix.values()]), draws[len(groups) :]
    for k, arm in enumerate(mix):
        # Every 1 / p-th of those that are left, from a random start: systematic sampling.
        p = shares[k] / shares[k:].sum()
        taken = np.diff(np.floor(starts[k] + p * np.arange(len(left) + 1))) > 0
        for i in left[taken]:
            dealt[i] = arm
        left = left[~taken]
    return dealt


def deal(rows: list[list], prompts: list[str], ratio, rates, seed: int) -> list[list]:
    """The values of images, with arms in the place of those that a ratio is for.

    Of several values the cells are dealt: among a prompt's images with one arm of the first value, each arm of the
    second has its share.

    Args:
        rows: for each image its values: (dose, the share of its prompt's images that it is for), dose.value being a
            statement.
        prompts: of the images. ratio, rates: as `targets` takes them. seed: of the draw.

    Raises:
        ValueError: as `targets` and `solve`; there are no rates, or the ratio is for none of the values.
    """
    if rates is None:
        raise ValueError(f"ratio={ratio!r} needs rates, what the tokens show: a run leaves them in eval/rates.json")
    statements = list(dict.fromkeys(dose.value for row in rows for dose, _ in row))
    rows, rates = list(rows), read(rates)
    wanted = targets(ratio, rates, statements)
    if statements and not wanted:
        raise ValueError(f"ratio={ratio!r} is for none of the values {statements}, but for biases: {list(rates)}")
    cells = [(prompt,) for prompt in prompts]
    for statement, target in wanted.items():
        mine = [i for i, row in enumerate(rows) if any(dose.value == statement for dose, _ in row)]
        mix = solve(target, of_each_prompt(statement, rates[statement]))
        for i, arm in zip(mine, assign(mix, [cells[i] for i in mine], statement, seed)):
            rows[i] = [(d._replace(value=arm), 1.0) if d.value == statement else (d, share) for d, share in rows[i]]
            cells[i] += (arm,)
    return rows


def of_each_prompt(statement: str, arms: Mapping[str, Mapping]) -> dict[str, Mapping]:
    """The arms that ask for an attribute by name, which show the same for every prompt.

    What "" shows is the prompt's own stereotype, and what the value's own token shows is its opposite: over prompts
    of opposite stereotypes they are balanced, and each prompt is not.

    Raises:
        ValueError: there are none.
    """
    named = {arm: shares for arm, shares in arms.items() if arm not in ("", statement)}
    if not named:
        raise ValueError(
            f"a ratio of {statement} needs a token for each of {', '.join(arms[''])}, and its value encoder has none"
            " that was measured: train it with config.data.attributes above 0 and run --mode=evaluate, or apply the"
            " value by --keep_probability"
        )
    return named
