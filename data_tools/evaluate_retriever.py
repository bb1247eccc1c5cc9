"""Measures the retriever's backends on the labelled prompts of livo_jax/retrieval/retriever_prompts.toml.

    python -m data_tools.evaluate_retriever [--model=DIR_OR_HUB_ID] [--endpoint=URL --llm=NAME [--cache=DIR]]

measures the keywords (the default), BM25, and the two together; with --model also the text encoder of that Stable
Diffusion, with --endpoint a language model behind it (its key in OPENAI_API_KEY; --cache keeps its answers).
"""

import sys
import time
import warnings

from absl import app, flags, logging

from livo_jax import values
from livo_jax.retrieval.retriever import PAPERS, Retriever, labelled


def score(rows: list[tuple[set, set]]) -> dict[str, float]:
    """What a retriever's answers are worth.

    Args:
        rows: of each prompt, the statements of the values that it is for, and of those that were found.

    Returns:
        precision, recall: over all values found, and to be found. macro_f1: the mean over the values of their F1.
        over_trigger: the share of the prompts for no value for which one was found. nan where there is nothing of it.
    """
    share = lambda part, whole: part / whole if whole else float("nan")
    known = set().union(*(wanted for wanted, _ in rows))
    f1 = []
    for value in known:
        right = sum(value in wanted and value in found for wanted, found in rows)
        f1.append(2 * right / sum((value in wanted) + (value in found) for wanted, found in rows))
    right = sum(len(wanted & found) for wanted, found in rows)
    benign = [bool(found) for wanted, found in rows if not wanted]
    return {
        "precision": share(right, sum(len(found) for _, found in rows)),
        "recall": share(right, sum(len(wanted) for wanted, _ in rows)),
        "macro_f1": share(sum(f1), len(f1)),
        "over_trigger": share(sum(benign), len(benign)),
    }


def main(_):
    logging.set_verbosity(logging.WARNING)
    warnings.filterwarnings("ignore", ".* is longer than")  # prompts, than what a text encoder reads
    backends, settings = [("keywords",), ("bm25",), ("keywords", "bm25")], {}
    try:
        if MODEL.value:
            from livo_jax import StableDiffusion

            settings["sd"] = StableDiffusion.from_pretrained(MODEL.value)
            backends += [("dense",), ("keywords", "dense")]
        if ENDPOINT.value or LLM.value:
            settings |= {"endpoint": ENDPOINT.value or "", "model": LLM.value or "", "cache": CACHE.value}
            backends += [("llm",), ("keywords", "llm")]
        retrievers = {" + ".join(names): Retriever(values.load(PAPERS), names, **settings) for names in backends}
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    categories = labelled(PART.value)
    print("| backends | prompts | number | precision | recall | macro-F1 | over-trigger |")
    print("|---|---|---|---|---|---|---|")
    for name, retriever in retrievers.items():
        answers, start = {category: [] for category in categories}, time.monotonic()
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", ".* language model")
            warnings.filterwarnings("error", ".* (does not answer|refuses): ")  # nothing would be measured
            for category, prompts in categories.items():
                for prompt, wanted in prompts.items():
                    try:
                        found = {value.statement for value in retriever(prompt)}
                    except UserWarning as warning:
                        sys.exit(str(warning))
                    answers[category].append((wanted, found))
                    for value in wanted ^ found if MISTAKES.value else ():
                        mistake = "not found" if value in wanted else "found"
                        print(f"{name}: {value} {mistake} in {prompt!r}", file=sys.stderr)
        spent = time.monotonic() - start
        answers = {"all": sum(answers.values(), []), **answers}
        for category, rows in answers.items():
            cells = " | ".join("–" if x != x else f"{x:.3f}" for x in score(rows).values())
            print(f"| {name} | {category.replace('_', ' ')} | {len(rows)} | {cells} |")
        each = 1000 * spent / len(answers["all"])
        print(f"{name}: {each:.1f} ms a prompt; the language model failed {len(caught)} times", file=sys.stderr)


if __name__ == "__main__":
    MODEL = flags.DEFINE_string("model", None, "A Stable Diffusion, directory or hub id: measures dense.")
    ENDPOINT = flags.DEFINE_string("endpoint", None, "An OpenAI-compatible endpoint, https://HOST/v1: measures llm.")
    LLM = flags.DEFINE_string("llm", None, "The language model's name there.")
    CACHE = flags.DEFINE_string("cache", "", "The directory that keeps its answers.")
    PART = flags.DEFINE_enum("part", "test", ["calibration", "test"], "Of the prompts.")
    MISTAKES = flags.DEFINE_bool("mistakes", False, "Names them.")
    app.run(main)
