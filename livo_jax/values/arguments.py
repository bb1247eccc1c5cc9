"""What is wrong with the arguments of a call that draws with values.

Exports carry this file as it is, for their pipeline: it needs the standard library alone. livo_jax asks it of
strengths; of the rest values_by_prompt and generate tell.
"""

import math
import numbers


def is_number(x) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool) and math.isfinite(x)


def strength_problems(strength, rows) -> list[str]:
    """What is wrong with a strength, a number or a dict of statement -> number, of prompts' values.

    Args:
        rows: for each prompt its statements; ("auto",) may be any of those that a value encoder knows.
    """
    strengths = strength if isinstance(strength, dict) else {"all values": strength}
    problems = [f"strength={x!r} of {text} is no number" for text, x in strengths.items() if not is_number(x)]
    asked = {statement for row in rows for statement in row}
    unknown = [text for text in strengths if text not in asked] if isinstance(strength, dict) else []
    if unknown and asked and "auto" not in asked:
        there = ", ".join(map(repr, sorted(asked)))
        problems.append(f"strength of {', '.join(map(repr, unknown))}, which is no value of the call: there is {there}")
    twice = {statement for row in rows for statement in row if list(row).count(statement) > 1}
    problems += [f"value {statement!r} is there twice: a strength doses it" for statement in sorted(twice)]
    return problems


def values_problems(prompts, values, keep_probability, known) -> list[str]:
    """What is wrong with prompts and their values; `values` has an entry for each, `known` are Values of an export."""
    problems = [f"prompt {prompt!r} is no text" for prompt in prompts if not isinstance(prompt, str)]
    if len(values) != len(prompts) or not prompts:
        problems.append(
            f"{len(values)} values for {len(prompts)} prompts: give one for all, or a list with an entry for each"
            " prompt, which is None, a value or a list of values"
        )
    for entry in values:
        texts = entry if isinstance(entry, list | tuple) else [] if entry is None else [entry]
        problems += [f"value {text!r} is no text" for text in texts if not (isinstance(text, str) and text)]
        if entry != "auto" and "auto" in texts:
            problems.append(f"values={entry!r}: 'auto' stands alone, outside of lists")
    if "auto" in values and not (known and all(value.keywords for value in known)):
        problems.append(
            "values='auto' goes by keywords alone, and needs values that have some in the value encoder's config, as"
            " livo_jax exports it"
        )
    if not (keep_probability is None or is_number(keep_probability) and 0 <= keep_probability <= 1):
        problems.append(f"keep_probability={keep_probability!r} is not 0 to 1")
    return problems


def drawing_problems(
    prompts, negative, steps, guidance_scale, images, height, width, multiple: int, output_type
) -> list[str]:
    """What is wrong with how a pipeline is to draw prompts against a negative prompt, or one of each.

    multiple: of which the edges are, in pixels.
    """
    texts = negative if isinstance(negative, list | tuple) else [negative]
    problems = [f"negative_prompt {text!r} is no text" for text in texts if not isinstance(text, str | None)]
    if texts is negative and len(texts) != len(prompts):
        problems.append(f"{len(texts)} negative prompts for {len(prompts)} prompts: give one, or one of each")
    problems += [
        f"{name}={x!r}: choose a whole number of at least 1"
        for name, x in (("num_inference_steps", steps), ("num_images_per_prompt", images))
        if not (isinstance(x, int) and x >= 1)
    ]
    if not is_number(guidance_scale):
        problems.append(f"guidance_scale={guidance_scale!r}: choose a finite number; at most 1 is no guidance")
    for name, x in (("height", height), ("width", width)):
        if not (isinstance(x, int) and x >= multiple and x % multiple == 0):
            problems.append(f"{name}={x!r}: choose a multiple of {multiple}")
    if output_type not in ("pil", "np", "pt"):
        problems.append(f"output_type={output_type!r}: choose from pil, np, pt")
    return problems
