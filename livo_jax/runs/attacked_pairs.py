"""What attacks found as prompts of pairs: config.preferences.attacks names files that --mode=attack left."""

import json
import pathlib
import re
from collections import defaultdict

from absl import logging

FIELDS = {"search": str, "value": str, "method": str, "subject": str, "prompt": str, "tokens": list}
MADE = "make it with --mode=attack"


def read_found(config) -> list[dict]:
    """The rows of the files, as runs/attack.py writes them.

    Raises:
        ValueError: what is wrong with the files; all is listed.
    """
    rows, problems = [], []
    for file in config.preferences.attacks:
        where = f"config.preferences.attacks: {file}"
        try:
            found = json.loads(pathlib.Path(file).expanduser().read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            problems.append(f"{where} cannot be read ({error}): {MADE}")
            continue
        if not isinstance(found, list) or not found:
            problems.append(f"{where} has no list of what an attack found: {MADE}, by a search that finds words")
            continue
        wrong = [i for i, row in enumerate(found) if not is_row(row)]
        problems += [f"{where}: row {i} is not of an attack, which has {', '.join(FIELDS)}: {MADE}" for i in wrong[:5]]
        rows += found
    if problems:
        raise ValueError("\n  ".join(problems))
    return rows


def is_row(row) -> bool:
    """Whether it is one of attacks_found.json."""
    typed = isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in FIELDS.items())
    return typed and bool(row["tokens"]) and all(type(token) is int and token >= 0 for token in row["tokens"])


def attacked_prompt(row: dict, tokenizer) -> str:
    """The text of a row: the words before its prompt, or a paraphrase of it.

    Raises:
        ValueError: ids that the tokenizer has not.
    """
    if (last := max(row["tokens"])) >= len(tokenizer):
        raise ValueError(f"config.preferences.attacks has the token {last}: it is of another model, attack this one")
    text = tokenizer.decode(row["tokens"])
    return text if row["search"] == "paraphrases" else f"{text} {row['prompt']}"


def attacked_prompts(rows: list[dict], there: set, config, tokenizer) -> dict[tuple, list[tuple[str, str]]]:
    """The prompts that are fit for pairs: of subjects of the pairs, in words that name none that is held out.

    Args:
        rows: of read_found. there: the (statement, scene) of the harms' pairs.

    Returns:
        (statement, scene) -> (neutral prompt, attacked prompt), each once, in the order of the rows.

    Raises:
        ValueError: none is fit, or ids of another model.
    """
    found, left_out = defaultdict(dict), 0
    held_out = (
        re.compile(rf"\b({'|'.join(map(re.escape, config.eval.held_out))})\b", re.IGNORECASE)
        if config.eval.held_out
        else None
    )
    for row in rows:
        prompt, place = attacked_prompt(row, tokenizer), (row["value"], row["subject"])
        if place in there and not (held_out and held_out.search(prompt)):
            found[place][row["prompt"], prompt] = None
        else:
            left_out += 1
    told = "of no harm of config.principles, of no subject of the pairs, or name one that is held out"
    if rows and not found:
        raise ValueError(
            f"config.preferences.attacks: all {len(rows)} prompts are {told}: attack subjects of the pairs, as by"
            " --config.attack.splits=\"('seen',)\""
        )
    if left_out:
        logging.warning("config.preferences.attacks: %d of %d prompts are left out: %s", left_out, len(rows), told)
    return {place: [*prompts] for place, prompts in found.items()}
