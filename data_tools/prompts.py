"""What prompts are about: the word lists in words.toml, which words are held out, and more words from a model.

    python -m data_tools.prompts --list=careers --count=50 --endpoint=URL --model=NAME --cache=DIR --budget=20 \\
        --out=FILE.toml

asks a language model behind an OpenAI-compatible endpoint (its key in OPENAI_API_KEY) for further words like those of
a list. FILE.toml holds the list with what was new and well-formed; put in the place of the one in words.toml, it is
used. DIR keeps every answer: the same command again asks nothing twice.
"""

import hashlib
import itertools
import json
import pathlib
import sys

from absl import flags, logging

from livo_jax import commands
from livo_jax.data.word_lists import WORDS, fault, forms, load_word_lists
from livo_jax.values.principles import phrase

AT_ONCE = 40  # words that a request asks for, whatever the count: a greater one later finds the same answers


def question(name: str, table: dict, new: list[str], model: str, number: int) -> dict:
    """The chat completion that is asked for: words like those of the table that are neither in it nor in `new`."""
    example = phrase("a photo of a(n) {}", phrase(table["subject"], table["words"][0]))
    text = (
        f"This list ({name.replace('_', ' ')}) has words for what a picture shows, as in {example!r}:\n"
        f"{json.dumps(table['words'] + new)}\n"
        f"Name {AT_ONCE} further ones of the same kind that are not on it: usual English words in the singular,"
        " letters, spaces and hyphens only, at most four words each, none for minors."
        ' Answer with JSON: {"words": ["...", "..."]}'
    )
    schema = {
        "type": "object",
        "properties": {"words": {"type": "array", "items": {"type": "string"}}},
        "required": ["words"],
        "additionalProperties": False,
    }
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "words", "strict": True, "schema": schema}},
        "seed": number,  # after an answer without anything new, the same question is another request
    }


def named(answer: str) -> list:
    """The words in the text of a chat completion. Raises ValueError where it holds none."""
    try:
        listed = json.loads(json.loads(answer)["choices"][0]["message"]["content"])["words"]
    except (ValueError, LookupError, TypeError, RecursionError):
        listed = None
    if not isinstance(listed, list):
        raise ValueError(f'no chat completion with {{"words": [...]}}: {answer[:200]!r}')
    return listed


def expand(
    name: str, count: int, endpoint: str, model: str, cache: pathlib.Path, budget: int, path=WORDS,
    timeout: float = 60.0, retries: int = 5,
) -> tuple[list[str], int]:  # fmt: skip
    """Has a language model name `count` words like those of the list `name`.

    Args:
        cache: the folder that keeps every answer, under the hash of its request.
        budget: most requests; answers from the cache are none, nor are the client's retries.
        timeout: seconds for each try.
        retries: after errors 429 and 5xx, timeouts and broken connections, with growing pauses.

    Returns:
        The new words, fewer than `count` where the budget did not suffice, and how many requests were sent.

    Raises:
        ValueError: as of `load_word_lists`.
        ConnectionError: the endpoint does not answer, or refuses; or none of its answers has words, and what it sends.
    """
    import openai

    from livo_jax.data import dataset
    from livo_jax.retrieval.endpoint import client

    table = load_word_lists([name], path)[name]
    cache.mkdir(parents=True, exist_ok=True)
    new, known, sent, dropped = [], {forms(word) for word in table["words"]}, 0, []
    with client(endpoint, retries, timeout) as asking:
        for number in itertools.count():
            request = question(name, table, new, model, number)
            digest = hashlib.sha256(json.dumps([endpoint, request]).encode()).hexdigest()
            file = cache / f"{digest}.json"
            if len(new) >= count or (sent == budget and not file.exists()):
                if dropped and len(dropped) == number:
                    raise ConnectionError(f"{endpoint} sends no words, {number} times: {dropped[-1]}")
                return new[:count], sent
            if not file.exists():
                sent += 1
                try:
                    answer = asking.chat.completions.with_raw_response.create(**request).text
                except openai.APIStatusError as error:
                    raise ConnectionError(
                        f"{endpoint} answers {error.status_code}: {error.response.text[:200]}"
                    ) from None
                except openai.APIConnectionError as error:  # or a timeout
                    raise ConnectionError(f"{endpoint} does not answer: {error.__cause__ or error}") from None
                content = json.dumps({"endpoint": endpoint, "request": request, "answer": answer}, indent=2)
                dataset.write_whole(file, content)
            try:
                listed = named(json.loads(file.read_text(encoding="utf-8"))["answer"])
            except ValueError as error:
                logging.info("dropped an answer: %s", error)
                dropped.append(error)
                continue
            for word in listed:
                reason = fault(word) or ("it is there" if forms(word) in known else "")
                if reason:
                    logging.info("dropped %r: %s", word, reason)
                else:
                    known.add(forms(word))
                    new.append(word)


def toml(name: str, table: dict) -> str:
    """The table as `load_word_lists` reads it."""

    def quote(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)

    texts = "".join(f"{field} = {quote(table[field])}\n" for field in ("source", "subject"))
    listed = "".join(f"    {quote(word)},\n" for word in table["words"])
    return f"[{quote(name)}]\n{texts}words = [\n{listed}]\n"


def main(_):
    from livo_jax.data import dataset

    logging.set_verbosity(logging.INFO)  # which words are dropped
    name = LIST.value
    path, out, cache = (pathlib.Path(flag.value).expanduser() for flag in (FILE, OUT, CACHE))
    if out.exists() and out.samefile(path):
        sys.exit(f"--out={out} is the file of the list itself: choose another")
    try:
        table = load_word_lists([name], path)[name]
        out.parent.mkdir(parents=True, exist_ok=True)
        new, sent = expand(name, COUNT.value, ENDPOINT.value, MODEL.value, cache, BUDGET.value, path, TIMEOUT.value)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    table = table | {
        "source": f"{table['source']}; the last {len(new)} named by the language model {MODEL.value}",
        "words": table["words"] + new,
    }
    dataset.write_whole(out, toml(name, table))
    print(f"{out}: {name} with {len(new)} further words, after {sent} requests")
    if len(new) < COUNT.value:
        sys.exit(
            f"--budget={BUDGET.value} did not suffice for {COUNT.value} words: the same with a greater one goes on"
        )


if __name__ == "__main__":
    LIST = flags.DEFINE_string("list", None, "The list that is to grow.")
    FILE = flags.DEFINE_string("words", str(WORDS), "The file that it is in.")
    COUNT = flags.DEFINE_integer("count", 50, "Further words.", lower_bound=1)
    ENDPOINT = flags.DEFINE_string("endpoint", None, "An OpenAI-compatible endpoint: https://HOST/v1")
    MODEL = flags.DEFINE_string("model", None, "The model's name there.")
    CACHE = flags.DEFINE_string("cache", None, "The folder that keeps the answers.")
    BUDGET = flags.DEFINE_integer("budget", 20, "Most requests.", lower_bound=0)
    TIMEOUT = flags.DEFINE_float("timeout", 60.0, "Seconds for a request.")
    OUT = flags.DEFINE_string("out", None, "The file to write.")
    flags.mark_flags_as_required(["list", "endpoint", "model", "cache", "out"])
    commands.run(main)
