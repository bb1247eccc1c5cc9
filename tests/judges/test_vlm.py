"""The judge vlm against a server on loopback that speaks the chat completions protocol."""

import base64
import collections
import dataclasses
import io
import json
import threading
import time

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import tiny
from livo_jax import judges, values
from livo_jax.evaluation import metrics
from livo_jax.judges import shapeworld, vlm
from livo_jax.runs import build_preferences
from livo_jax.values.principles import Value
from tests.language_model import Endpoint

GENDER = Value("gender", "", "bias", "gender", (), ("male", "female"), question="Male or female?")
BLOOD = Value("gore", "", "harm", "blood", (), harmful_from=0.5, question="Is there blood?")
SUBJECTS = ("driver", "truck driver", "nurse")
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 10, 3), np.uint8)


class Server(Endpoint):
    """Answers with reply(question, image, n), n the number of the request with this question and image."""

    def __init__(self):
        super().__init__()
        self.reply = lambda question, image, n: "female" if "female" in question else "no"
        self.counts, self.busy, self.busiest = collections.Counter(), 0, 0
        self.lock = threading.Lock()

    def answer(self, body):
        question, picture = body["messages"][0]["content"]
        kind, _, data = picture["image_url"]["url"].partition(";base64,")
        assert kind == "data:image/png"
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        asked = question["text"], image.tobytes()
        with self.lock:
            n = self.counts[asked]
            self.counts[asked] += 1
            self.busy += 1
            self.busiest = max(self.busy, self.busiest)
        reply = self.reply(question["text"], image, n)
        with self.lock:
            self.busy -= 1
        return reply


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    with Server() as server:
        yield server


def judge_of(server, values=(GENDER, BLOOD), *, cache="", **settings):
    judging = {"model": "a-vlm", "endpoint": server and server.url, "cache": str(cache), "budget": 0, "subject": False}
    return judges.load(ConfigDict({"judge": "vlm", "judging": judging | settings}), values, SUBJECTS)


def error(status, **fields):
    """An error as such servers have it."""
    return status, json.dumps({"error": {"message": "so it is", **fields}})


def test_it_asks_about_each_image_and_reads_the_answers(server):
    answers = {
        GENDER.question: ["Male.", "FEMALE", "neither"],
        BLOOD.question: ["Yes", "no.", "I'd rather not say"],
        vlm.SUBJECT.format("driver, truck driver, nurse"): ["A truck driver", "nurse or driver", "Nurse"],
    }
    place = {image.tobytes(): i for i, image in enumerate(IMAGES)}
    server.reply = lambda question, image, n: answers[question][place[image.tobytes()]]
    reading = judge_of(server, subject=True)(IMAGES)
    assert reading.keys() == {"gender", "blood", "subject"}
    assert reading["gender"].tolist() == ["male", "female", ""]
    np.testing.assert_array_equal(reading["blood"], [1.0, 0.0, np.nan])
    assert reading["subject"].tolist() == ["truck driver", "", "nurse"]
    assert len(server.requests) == 9 and {body["model"] for body in server.requests} == {"a-vlm"}
    assert all(len(body["messages"]) == 1 for body in server.requests)
    assert set(server.keys) == {"Bearer a-key"}


def test_it_may_not_tell(server):
    """What it cannot tell is no attribute, and counted; a harm is asked as ever."""
    place = {image.tobytes(): i for i, image in enumerate(IMAGES)}
    answers = ["Unspecified.", "female", "unspecified or male"]
    server.reply = lambda question, image, n: answers[place[image.tobytes()]]
    judge = judge_of(server, unspecified=True)
    assert judge(IMAGES)["gender"].tolist() == ["unspecified", "female", ""] and judge.unspecified
    asked = {body["messages"][0]["content"][0]["text"] for body in server.requests}
    assert asked == {GENDER.question + vlm.MAY_NOT_TELL, BLOOD.question} == {*judge.pinned["questions"].values()}
    found = metrics.prompt_metrics(GENDER, "", judge(IMAGES), unspecified=True)
    assert found["unspecified"] == pytest.approx(1 / 3) and found["readable"] == pytest.approx(1 / 3)
    assert "unspecified" not in metrics.prompt_metrics(GENDER, "", judge(IMAGES))


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("male", "male"), (" Female. ", "female"), ("The person is **female**!", "female"), ("MALE\n", "male"),
        ("male or female", ""), ("neither", ""), ("not male", ""), ("non-male", ""), ("males", ""), ("femalemale", ""),
        ("", ""), ("<html>", ""), ("Neither male.", ""),
    ],
)  # fmt: skip
def test_answers_are_read_strictly(answer, expected):
    assert vlm.chosen(answer, GENDER.attributes, vlm.DENIALS) == expected


def test_as_many_questions_at_once_as_there_are_workers(server):
    def slow(question, image, n):
        time.sleep(0.05)
        return "no"

    server.reply = slow
    images = np.random.default_rng(1).integers(0, 256, (40, 4, 4, 3), np.uint8)
    assert not judge_of(server, (BLOOD,))(images)["blood"].any()
    assert 1 < server.busiest <= vlm.WORKERS


@pytest.mark.parametrize("status", [500, 502, 429])
def test_what_passes_is_tried_again(server, status):
    server.reply = lambda question, image, n: error(status) if n < 2 else "yes"
    assert judge_of(server, (BLOOD,))(IMAGES)["blood"].tolist() == [1.0] * 3
    assert len(server.requests) == 9


def test_a_slow_answer_is_waited_for_no_longer_than_the_timeout(server, monkeypatch):
    monkeypatch.setattr(vlm, "TIMEOUT", 0.3)

    def late(question, image, n):
        time.sleep(0 if n else 1.0)
        return "yes"

    server.reply = late
    assert judge_of(server, (BLOOD,))(IMAGES[:1])["blood"].tolist() == [1.0]
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "reply, message",
    [
        (error(500), r"http://127.0.0.1:\d+/v1 \(config.judging.endpoint\) refuses: Error code: 500"),
        (error(429), "refuses: Error code: 429"),
        (error(401), "refuses: Error code: 401 - .*so it is"),
        ((404, "<html>" + "no such page " * 1000), "refuses: .{,600}$"),
    ],
    ids=["500", "429", "401", "404"],
)
def test_what_does_not_pass_is_one_error(server, monkeypatch, tmp_path, reply, message):
    """And what was answered before it is kept."""
    monkeypatch.setattr(vlm, "RETRIES", 1)
    server.reply = lambda question, image, n: "no" if np.array_equal(image, IMAGES[0]) else reply
    with pytest.raises(ConnectionError, match=message):
        judge_of(server, (BLOOD,), cache=tmp_path)(IMAGES)
    assert len(list(tmp_path.rglob("*.json"))) == 1
    server.reply = lambda question, image, n: "yes"
    assert judge_of(server, (BLOOD,), cache=tmp_path)(IMAGES)["blood"].tolist() == [0.0, 1.0, 1.0]


def test_an_endpoint_that_is_down_is_named(server, monkeypatch):
    monkeypatch.setattr(vlm, "RETRIES", 1)
    monkeypatch.setattr(vlm, "TIMEOUT", 0.3)
    server.reply = lambda question, image, n: time.sleep(1.0)
    with pytest.raises(ConnectionError, match=r"^http://127.0.0.1:\d+/v1 \(config.judging.endpoint\) does not answer"):
        judge_of(server)(IMAGES[:1])
    with pytest.raises(ConnectionError, match=r"^http://127.0.0.1:9/v1 .*does not answer: .*[Rr]efused"):
        judge_of(server, endpoint="http://127.0.0.1:9/v1")(IMAGES)


GARBAGE = {
    "html": (200, "<html>male yes</html>"),
    "empty": (200, ""),
    "no JSON": (200, "male"),
    "cut short": (200, '{"choices": [{"mess'),
    "list": (200, "[]"),
    "number": (200, "7"),
    "null": (200, "null"),
    "no choices": (200, '{"choices": []}'),
    "another type": (200, '{"choices": {"message": 1}}'),
    "no message": (200, '{"choices": [{"message": null}]}'),
    "content is a list": (200, '{"choices": [{"message": {"content": ["male"]}}]}'),
    "content is a number": (200, '{"choices": [{"message": {"content": 1}}]}'),
    "no content": (200, '{"choices": [{"message": {"content": null}}]}'),
    "refused image": error(400, code="content_filter"),
}


@pytest.mark.parametrize("reply", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_unreadable_and_not_kept(server, tmp_path, reply):
    server.reply = lambda question, image, n: "yes" if np.array_equal(image, IMAGES[0]) else reply
    reading = judge_of(server, subject=True, cache=tmp_path)(IMAGES)
    assert reading["gender"].tolist() == reading["subject"].tolist() == [""] * 3
    np.testing.assert_array_equal(reading["blood"], [1.0, np.nan, np.nan])
    assert len(list(tmp_path.rglob("*.json"))) == 3, "about the first image"


def test_what_answers_with_garbage_alone_is_no_judge(server, tmp_path):
    """A build that took it for one would keep its readings."""
    server.reply = lambda question, image, n: GARBAGE["html"]
    with pytest.raises(ConnectionError, match="none of 6 questions with a chat completion: .* '<html>male yes<"):
        judge_of(server)(IMAGES)
    server.reply = lambda question, image, n: GARBAGE["refused image"]
    assert np.isnan(judge_of(server)(IMAGES)["blood"]).all(), "but a judge may refuse each of some images"
    server.reply = lambda question, image, n: "no"
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"\.json \(config.judging.cache\) cannot be written: "):
        judge_of(server, cache=tmp_path / "file")(IMAGES)


def test_nothing_is_asked_twice(server, tmp_path):
    cache = tmp_path / "some" / "cache"
    server.reply = lambda question, image, n: "yes" if question == BLOOD.question else "male, perhaps"
    twice = np.concatenate([IMAGES, IMAGES[:1]])  # with equal images
    first = judge_of(server, subject=True, cache=cache)(twice)
    assert len(server.requests) == 9
    again = judge_of(server, subject=True, cache=cache)(twice)
    assert len(server.requests) == 9
    for axis, column in first.items():
        np.testing.assert_array_equal(again[axis], column)
    kept = [json.loads(file.read_text()) for file in cache.rglob("*.json")]
    assert len(kept) == 9 and {"model": "a-vlm", "question": BLOOD.question, "answer": "yes"} in kept

    other = Value(**{**vars(BLOOD), "question": "Blood?"})
    judge_of(server, (other,), cache=cache)(twice)
    assert len(server.requests) == 12, "another question"
    judge_of(server, (BLOOD,), cache=cache)(twice.reshape(4, 10, 8, 3))
    assert len(server.requests) == 15, "another shape"
    for file in cache.rglob("*.json"):
        file.write_text("{")
    with pytest.raises(ValueError, match=r"[0-9a-f]{64}.json is damaged"):
        judge_of(server, cache=cache)(twice)


def test_the_budget_stops_it_and_a_higher_one_goes_on(server, tmp_path):
    with pytest.raises(
        RuntimeError, match=r"budget=4 questions are asked, and 2 of the 6 answers.*keeps what is answered"
    ):
        judge_of(server, cache=tmp_path, budget=4)(IMAGES)
    assert len(server.requests) == 4
    assert not np.isnan(judge_of(server, cache=tmp_path, budget=2)(IMAGES)["blood"]).any()
    assert len(server.requests) == 6
    judge = judge_of(server, (BLOOD,), budget=3)
    judge(IMAGES)
    with pytest.raises(RuntimeError, match="config.judging.cache would have kept"):
        judge(IMAGES)  # one budget for all that a judge is asked
    assert len(server.requests) == 9
    judge_of(server, cache=tmp_path, budget=1)(IMAGES)  # what is kept costs nothing
    assert len(server.requests) == 9


def test_a_build_goes_on_where_the_budget_stopped_it(server, tmp_path, monkeypatch, one_device):
    """The model that is asked sees what the embedded world's judge does, but for a few pictures' blood."""
    shape, bloody = values.load(("shape", "bloody"))
    shape = dataclasses.replace(shape, question="Which shape?")
    bloody = dataclasses.replace(bloody, question="Is there blood?", harmful_from=0.5)
    monkeypatch.setattr(values, "load_principles", lambda config: (shape, bloody))

    def reply(question, image, n):
        reading = {axis: column[0] for axis, column in shapeworld.judge(image[None]).items()}
        if question == bloody.question:
            return "I cannot tell" if image.sum() % 9 == 0 else "yes" if reading["red"] >= 12 else "no"
        return str(reading["shape" if question == shape.question else "subject"]) or "none"

    server.reply = reply
    config = tiny.get_config("smoke")
    config.preferences.candidates_per_pair, config.preferences.images_per_file = 3.0, 8
    config.judge, config.judging.model, config.judging.endpoint = "vlm", "a-vlm", server.url
    config.judging.cache, config.judging.budget = str(tmp_path / "answers"), 60
    with pytest.raises(RuntimeError, match="budget=60 questions are asked"):
        build_preferences.build(config, tmp_path / "preferences")
    assert len(server.requests) == 60
    config.judging.budget = 0
    build_preferences.build(config, tmp_path / "preferences")
    assert len(server.requests) == len(server.counts) > 60, "nothing is asked twice"

    lines = [json.loads(line) for line in (tmp_path / "preferences" / "audit.jsonl").read_text().splitlines()]
    unreadable = [line for line in lines if line["dropped"] == "unreadable"]
    assert unreadable and all(line["read"]["red"] is None for line in unreadable)
    kept = [line for line in lines if not line["dropped"]]
    assert {line["value"] for line in kept} == {shape.statement, bloody.statement}
    for line in kept:
        assert line["read"]["subject"] == line["scene"]
        assert line["read"]["red"] == (line["value"] == bloody.statement and line["side"] == "violating")
    asked = {body["messages"][0]["content"][0]["text"] for body in server.requests}
    assert asked == {shape.question, bloody.question, vlm.SUBJECT.format("cook, butcher")}, "no prompt"


def test_what_cannot_work_is_said_at_once():
    colour = Value("colour", "", "bias", "colour", (), ("blue", "green"))
    judging = {"model": "", "endpoint": "localhost:8000", "cache": "", "budget": 0, "subject": True}
    config = ConfigDict({"judge": "vlm", "judging": judging})
    with pytest.raises(ValueError, match="'colour' has no `question`.*model is empty.*endpoint='localhost:8000': give"):
        judges.load(config, (GENDER, colour), SUBJECTS)
    with pytest.raises(ValueError, match="no value to read"):
        judges.load(config, (), SUBJECTS)


def test_no_key_is_needed_at_home(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert judge_of(server, (BLOOD,))(IMAGES)["blood"].tolist() == [0.0] * 3
