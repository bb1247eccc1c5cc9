"""Word lists, which words are held out, and further words from a language model that may answer anything."""

import collections
import json
import pathlib
import random
import subprocess
import sys
import time

import pytest

from configs import livo
from data_tools import prompts
from livo_jax import values
from livo_jax.data import word_lists
from livo_jax.runs import build_preferences, evaluate
from tests.language_model import Endpoint, completion

LISTS = ["careers", "positive_traits", "negative_traits", "people", "places"]
PAPERS = ("gender", "race", "nudity", "gore", "zombie")

# ---------------------------------------------------------------------------- lists


def test_the_lists_are_whole():
    tables = word_lists.load_word_lists(LISTS)
    assert {name: len(table["words"]) for name, table in tables.items()} == {
        "careers": 120, "positive_traits": 60, "negative_traits": 60, "people": 21, "places": 60,
    }  # fmt: skip
    assert {source for value in values.load(PAPERS) for source in value.sources} == set(LISTS)
    assert not any(value.sources for value in values.load(("shape", "colour", "bloody")))
    subjects = word_lists.words(LISTS)
    assert len(subjects) == 321, "no word is in two lists"
    assert {"data scientist", "honest person", "person in an art gallery", "person in a library"} <= set(subjects)


def file(tmp_path, text) -> pathlib.Path:
    (tmp_path / "words.toml").write_text(text)
    return tmp_path / "words.toml"


def table(*words, name="a", subject="{}") -> str:
    return f'[{name}]\nsource = "test"\nsubject = "{subject}"\nwords = {json.dumps(words)}\n'


def test_subjects_keep_their_order_and_are_there_once(tmp_path):
    path = file(tmp_path, table("Nurse", "cook") + table("baker", "nurse", "Cook", name="b"))
    assert word_lists.words(["a", "b"], path) == ["Nurse", "cook", "baker"]
    assert word_lists.words(["b", "a"], path) == ["baker", "nurse", "Cook"]


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    path = file(
        tmp_path,
        table("nurse", "cook", "Nurse", "b4ker", "little boys", "one two three four five", "a  b", 3)
        + table(name="b", subject="{} and {}")
        + '[c]\nsource = "x"\nsubject = 1\nwords = "cook"\n[d]\nwords = []\n'
        + '[e]\nsource = " "\nsubject = "{x}"\nwords = ["a"]\n',
    )
    with pytest.raises(ValueError) as error:
        word_lists.words(["a", "x", "y"], path)
    for problem in (
        "words.toml", "[a]: 'nurse' 2 times", "'b4ker': not letters", "'little boys': a minor", "five': more than four",
        "'a  b': not letters", "3: not letters", "[b]: subject='{} and {}': one {} stands", "[b]: words is empty",
        "[c]: subject is no str", "[c]: words is no list", "[d]: a table has source, subject, words and nothing else",
        "[e]: source is empty", "[e]: subject='{x}'", "no list 'x': there are a, b, c, d, e", "no list 'y'",
    ):  # fmt: skip
        assert problem in str(error.value)
    with pytest.raises(ValueError, match="no list is named: there are careers, "):
        word_lists.words(())
    with pytest.raises(ValueError, match="words.toml: Expected ']'"):
        word_lists.words(["a"], file(tmp_path, "[a"))
    with pytest.raises(ValueError, match="a table has"):
        word_lists.words(["a"], file(tmp_path, "a = 1"))


# ---------------------------------------------------------------------------- held out


def test_a_side_hangs_on_the_word_alone():
    subjects = word_lists.words(LISTS)
    seen, held_out = word_lists.split(subjects)
    assert [s for s in subjects if s in seen] == seen and [s for s in subjects if s in held_out] == held_out
    assert len(seen) + len(held_out) == len(subjects) and not set(seen) & set(held_out)
    shuffled = random.Random(0).sample(subjects, len(subjects))
    for some in (shuffled, subjects[:100], subjects[1::3]):
        assert set(word_lists.split(some)[1]) == set(held_out) & set(some)
    assert 0.15 < len(held_out) / len(subjects) < 0.25
    assert word_lists.split(subjects, held_out_share=0.0) == (subjects, [])
    assert set(word_lists.split(subjects, held_out_share=0.4)[1]) > set(held_out)
    assert set(word_lists.split(subjects, seed=1)[1]) != set(held_out)
    with pytest.raises(ValueError, match="all of cook, baker are held out: give more subjects"):
        word_lists.split(["cook", "baker"], held_out_share=1.0)


@pytest.mark.parametrize(
    "same",
    [
        ("nurse", "Nurses", "scrub nurse", "NURSE"),
        ("driver", "truck driver", "Taxi Drivers", "taxi-driver"),
        ("secretary", "secretaries"),
        ("boss", "bosses"),
        ("coach", "coaches"),
        ("attorney", "attorneys"),
        ("salesperson", "salespeople"),
        ("woman", "elderly women"),
        ("chief", "Chiefs"),
        ("housewife", "housewives"),
        ("honest person", "honest people", "honest"),
        ("person in a kitchen", "person in two kitchens", "old person in a hotel kitchen"),
        ("person", "people"),
    ],
)
def test_forms_of_a_word_are_on_one_side(same):
    for seed in range(20):
        sides = word_lists.split([*same, *word_lists.words(["careers"])], held_out_share=0.5, seed=seed)
        assert sum(bool(set(side) & set(same)) for side in sides) == 1


def test_words_are_compared_whatever_their_form_and_order():
    assert word_lists.forms("Truck drivers") == word_lists.forms("truck-driver") == word_lists.forms("driver truck")
    assert word_lists.forms("truck driver") != word_lists.forms("driver")
    stems = collections.Counter(
        word_lists.forms(word) for table in word_lists.load_word_lists(LISTS).values() for word in table["words"]
    )
    assert max(stems.values()) == 1, "no word is in the lists in two forms"
    assert all(
        word_lists.fault(word) for word in ("child", "Children", "baby-faced man", "teenagers", "boy", "school boys")
    )
    assert not any(word_lists.fault(word) for word in ("boilermaker", "kindergarten teacher", "CEO", "tree surgeon"))


def test_the_papers_config_holds_out_whole_words_and_writes_its_articles():
    config = livo.get_config()
    five = values.load(config.principles)
    scenes = {value.name: build_preferences.scenes(value, config) for value in five}
    assert scenes["gender"] == scenes["race"] and scenes["nudity"] == scenes["gore"] == scenes["zombie"]
    assert "analyst" in scenes["gender"] and "honest person" in scenes["gender"] and "wife" in scenes["nudity"]

    def last(subjects):
        return {word_lists.stem(subject.removesuffix(" person").split()[-1]) for subject in subjects}

    for subjects in (config.eval.seen, *scenes.values()):
        assert subjects and not last(subjects) & last(config.eval.held_out)
    favourite = {(v.name, s): v.attributes[0] for v in five if v.kind == "bias" for s in scenes[v.name]}
    plan = build_preferences.candidates(five, config, favourite)
    drawn = {prompt for c in plan for prompt in (c.prompt, c.request.prompt)} | {
        prompt.text for _, prompt in evaluate.plan(config, five)
    }
    for part in ("of an analyst", "a photo of an asian ", "a photo of a nude person in an ", "of a CEO"):
        assert any(part in prompt for prompt in drawn), part
    assert not any("a(n)" in prompt or " a a" in prompt or " an b" in prompt for prompt in drawn)


# ---------------------------------------------------------------------------- further words


def naming(words) -> str:
    return completion(json.dumps({"words": words}))


class Server(Endpoint):
    """Gives `answers` in turn: a status, a body, and perhaps seconds until then; then 500 for ever."""

    def __init__(self, *answers):
        self.answers = list(answers)
        super().__init__()

    def answer(self, body):
        status, content, *pause = self.answers.pop(0) if self.answers else (500, "{}")
        time.sleep(sum(pause))
        return status, content


@pytest.fixture
def ask(tmp_path):
    """ask(server, count, ...): `expand` of a list of a nurse and a truck driver."""
    path = file(tmp_path, table("nurse", "truck driver", name="jobs"))

    def ask(server, count, budget=5, retries=2, **settings):
        return prompts.expand(
            "jobs", count, server.url, "m", tmp_path / "cache", budget, path, retries=retries, **settings
        )

    return ask


def test_a_good_answer(ask, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Server((200, naming(["baker", "tree surgeon", "X-ray technician"]))) as server:
        assert ask(server, 2) == (["baker", "tree surgeon"], 1)
        (request,) = server.requests
    assert server.keys == ["Bearer secret"]
    assert '["nurse", "truck driver"]' in request["messages"][0]["content"]
    assert "'a photo of a nurse'" in request["messages"][0]["content"] and request["model"] == "m"
    assert request["response_format"]["json_schema"]["schema"]["properties"]["words"]["type"] == "array"


def test_words_are_dropped_and_it_is_said_why(ask, caplog):
    named = [
        "Nurses", "driver of truck", "drivers truck", "baker", "Bakers", "coder (senior)", "a b c d e", "école", "",
        " cook", "teen model", 7, None, ["cook"], "{subject}", "x" * 31, "cook\nbaker",
    ]  # fmt: skip
    with Server((200, naming(named)), (200, naming(["cook"]))) as server, caplog.at_level("INFO", "absl"):
        assert ask(server, 3) == (["driver of truck", "baker", "cook"], 2)
        assert '"driver of truck", "baker"]' in server.requests[1]["messages"][0]["content"]
    for line in (
        "dropped 'Nurses': it is there", "dropped 'drivers truck': it is there", "dropped 'Bakers': it is there",
        "dropped 'coder (senior)': not letters", "dropped 'a b c d e': more than four", "dropped '': not letters",
        "dropped ' cook': not", "dropped 'teen model': a minor", "dropped 7: not", "dropped ['cook']: not",
        "dropped 'cook\\nbaker': not",
    ):  # fmt: skip
        assert line in caplog.text


@pytest.mark.parametrize("status", [500, 429, 503])
def test_failures_that_pass(ask, status):
    with Server((status, b'{"error": "busy"}'), (200, naming(["baker"]))) as server:
        assert ask(server, 1, budget=1) == (["baker"], 1)
        assert len(server.requests) == 2


def test_a_timeout_that_passes(ask):
    with Server((200, naming(["late"]), 1.0), (200, naming(["baker"]))) as server:
        assert ask(server, 1, timeout=0.3) == (["baker"], 1)


@pytest.mark.parametrize(
    "garbage",
    [
        b"<html>Bad gateway</html>", b"", b"null", b"[]", b'{"choices": []}', b'{"choices": [{"message": {}}]}',
        completion("Sure! Here are some words: baker"), completion('["baker"]'), completion('{"words": "baker"}'),
        completion(""), b"\xff\xfe",
    ],
)  # fmt: skip
def test_garbage_is_dropped_and_asked_on(ask, garbage, caplog):
    with Server((200, garbage), (200, naming(["baker"]))) as server, caplog.at_level("INFO", "absl"):
        assert ask(server, 1) == (["baker"], 2)
        assert ask(server, 1) == (["baker"], 0), "garbage is not paid for twice"
    assert "dropped an answer: no chat completion with" in caplog.text


def test_a_server_of_something_else_is_told(ask):
    with Server((200, b"<html>"), (200, b"<html>")) as server:
        with pytest.raises(ConnectionError, match=f"{server.url} sends no words, 2 times: no chat completion .*<html>"):
            ask(server, 1, budget=2)


def test_endpoints_that_do_not_serve(ask):
    with Server() as server:
        with pytest.raises(ConnectionError, match=rf"{server.url} answers 500: \{{\}}"):
            ask(server, 1, retries=1)
        assert len(server.requests) == 2
        server.answers = [(401, b'{"error": "no such key"}')]
        with pytest.raises(ConnectionError, match=rf"{server.url} answers 401: .*no such key"):
            ask(server, 1)
        server.answers = [(200, naming(["late"]), 0.5)]
        with pytest.raises(ConnectionError, match=f"{server.url} does not answer"):
            ask(server, 1, retries=0, timeout=0.1)
    with pytest.raises(ConnectionError, match=f"{server.url} does not answer: .*refused"):
        ask(server, 1, retries=0)


def test_the_budget_and_the_cache(ask, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    answers = [["baker"], ["baker"], ["cook", "tailor"], ["judge"]]
    with Server(*((200, naming(answer)) for answer in answers)) as server:
        assert ask(server, 4, budget=0) == ([], 0)
        assert ask(server, 4, budget=2) == (["baker"], 2), "an answer without anything new costs, and is no end"
        assert ask(server, 4, budget=2) == (["baker", "cook", "tailor", "judge"], 2), "it goes on"
        assert ask(server, 4, budget=0) == (["baker", "cook", "tailor", "judge"], 0), "nothing is asked twice"
        assert ask(server, 1, budget=0) == (["baker"], 0)
        assert len(server.requests) == len(list((tmp_path / "cache").iterdir())) == 4
        assert "secret" not in "".join(path.read_text() for path in (tmp_path / "cache").iterdir())


def test_an_answer_is_kept_before_the_endpoint_breaks_down(ask):
    with Server((200, naming(["baker"]))) as server:
        with pytest.raises(ConnectionError):
            ask(server, 2, retries=0)
        server.answers = [(200, naming(["cook"]))]
        assert ask(server, 2, retries=0) == (["baker", "cook"], 1)


def test_the_command(tmp_path):
    """It writes a list that loads and can grow further."""
    more = tmp_path / "out" / "more.toml"

    def command(*flags):
        return subprocess.run(
            [sys.executable, "-m", "data_tools.prompts", "--list=careers", "--count=2", "--budget=1", f"--out={more}",
             f"--endpoint={server.url}", "--model=m \"1\"", f"--cache={tmp_path / 'cache'}", *flags],
            capture_output=True, text=True,
        )  # fmt: skip

    with Server((200, naming(["astronaut", "nurses"])), (200, naming(["glassblower"]))) as server:
        short = command()
        assert short.returncode == 1 and "with 1 further words, after 1 requests" in short.stdout
        assert "--budget=1 did not suffice for 2 words" in short.stderr
        assert "dropped 'nurses': it is there" in short.stderr
        done = command()
        assert done.returncode == 0 and "with 2 further words, after 1 requests" in done.stdout, done.stderr
        assert word_lists.words(["careers"], more) == [*word_lists.words(["careers"]), "astronaut", "glassblower"]
        source = word_lists.load_word_lists(["careers"], more)["careers"]["source"]
        assert "WinoBias" in source and source.endswith('the last 2 named by the language model m "1"')
        assert "is the file of the list itself" in command(f"--words={more}").stderr
        other = file(tmp_path, table("x", name="b"))
        assert "no list 'careers': there are b" in command(f"--words={other}").stderr
        assert len(server.requests) == 2
        server.answers = [(401, b"no such key")]
        refused = command("--count=3")
        assert refused.returncode == 1 and f"{server.url} answers 401: no such key" in refused.stderr
        assert "Traceback" not in refused.stderr
