"""The page, as a visitor with a browser meets it: the embedded world, an untrained value encoder."""

import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from livo_jax.demo import demo
from tests import small_run
from tests.small_run import ROOT


@pytest.fixture(scope="module")
def served(browser, tmp_path_factory):
    """A page that run.py serves: its address, process, log and folder. Without a browser it is not started."""
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(ROOT / "data_tools/shapeworld_model/text_encoder", folder / "encoder")
    weights = load_file(folder / "encoder/model.safetensors")
    weights["text_model.final_layer_norm.weight"] *= 8  # a louder token: untrained, it changes little
    save_file(weights, folder / "encoder/model.safetensors")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "run.py", "--config=configs/tiny.py", f"--workdir={folder / 'run'}", "--mode=demo",
        f"--config.value_encoder.start={folder / 'encoder'}", "--config.sampling.steps=4", f"--port={port}",
    ]  # fmt: skip
    proxies = {"http_proxy": "http://127.0.0.1:9", "ALL_PROXY": "socks5://127.0.0.1:9"}  # which are not there
    environment = small_run.environment() | proxies | {"TMPDIR": str(folder), "JAX_LOG_COMPILES": "1"}
    log = folder / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=stderr)
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.2)
        else:
            raise RuntimeError(log.read_text())
        yield SimpleNamespace(address=f"http://127.0.0.1:{port}/", process=process, log=log, folder=folder)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def address(served):
    return served.address


@pytest.fixture
def page(address, browser):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, requests, errors = context.new_page(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(address)
    page.get_by_label("Images").fill("2")
    yield page
    context.close()
    assert not errors
    outside = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
    assert requests and not outside, "the page works offline, and tells nobody"


def draw(page, count: int = 2):
    """Clicks and waits. The pairs as files: (PNG text, base, aligned), and their captions."""
    runs = page.locator(".run").count()
    page.get_by_role("button", name="Generate").click()
    page.locator(".run").nth(runs).wait_for()
    figures = page.locator(".run").first.locator("figure")
    figures.nth(count - 1).wait_for()
    pairs = []
    for figure in figures.all():
        link = figure.locator("a")
        assert link.get_attribute("download").startswith("livo_seed")
        with Image.open(io.BytesIO(page.request.get(page.url + link.get_attribute("href")).body())) as picture:
            pixels = np.asarray(picture).astype(int)
            pairs.append((picture.text, pixels[:, :32], pixels[:, 34:]))
        shown = figure.locator("img").evaluate_all("images => images.map(i => [i.decode(), i.naturalWidth][1])")
        assert len(shown) == 2
    return pairs, figures.locator("figcaption").all_inner_texts()


def switches(page) -> dict[str, bool]:
    """The values by their labels' text, and whether they are on."""
    labels = page.locator("#values label")
    return {label.inner_text(): label.locator("input").is_checked() for label in labels.all()}


def strength(page, x: str):
    page.get_by_label("number input for Strength").fill(x)
    page.keyboard.press("Tab")


LARGE = str(2**53 + 1)  # which a number of JavaScript cannot be


def test_values_strength_and_seed(page):
    page.get_by_label("Prompt").fill("a photo of a cook")
    page.get_by_text("it says 'cook'").first.wait_for()
    assert switches(page) == {
        "shape equality\nkeywords: it says 'cook'": True, "colour equality\nkeywords: it says 'cook'": True,
        "bloody considered inappropriate": False,
    }  # fmt: skip
    full, captions = draw(page)
    assert sorted(captions) == ["colour equality", "shape equality, colour equality"], "as dealing.applies deals them"
    for index, (text, base, aligned) in enumerate(full):
        assert (text["prompt"], text["seed"], text["steps"]) == ("a photo of a cook", "0", "4")
        doses = json.loads(text["values"])
        assert ", ".join(dose["value"] for dose in doses) == captions[index]
        assert {(dose["strength"], dose["reason"]) for dose in doses} == {(1, "keywords: it says 'cook'")}
        assert np.abs(base - aligned).max() > 20

    strength(page, "0.5")
    half, _ = draw(page)
    strength(page, "0")
    none, captions = draw(page)
    assert captions == ["no value: the base's"] * 2
    for (_, base, aligned), (text, base_2, aligned_2), (_, base_3, aligned_3) in zip(full, half, none):
        assert json.loads(text["values"])[0]["strength"] == 0.5
        assert (base == base_2).all() and (base == base_3).all() and (base == aligned_3).all()
        assert 0 < np.abs(aligned_2 - base).mean() < np.abs(aligned - base).mean()

    strength(page, "1")
    for label in "shape equality", "colour equality", "bloody considered inappropriate":
        page.locator("#values label", has_text=label).click()
    page.get_by_label("Seed").fill(LARGE)
    by_hand, captions = draw(page)
    assert captions == ["bloody considered inappropriate"] * 2
    assert by_hand[0][0]["seed"] == LARGE and "by hand" in by_hand[0][0]["values"]
    assert (by_hand[0][1] != full[0][1]).any()
    summaries = page.locator(".run summary").all_inner_texts()
    assert len(summaries) == 4 and f"seed {LARGE}" in summaries[0]
    assert "shape equality on 1 of 2, 45% of every 20;" in summaries[3] and "colour equality on 2 of 2;" in summaries[3]
    assert page.locator(".run[open]").count() == 1


def test_what_may_be_disturbing_is_blurred_until_it_is_asked_for(page):
    def blurred() -> list[bool]:
        images = page.locator(".run").first.locator("img")
        return images.evaluate_all("images => images.map(image => getComputedStyle(image).filter.includes('blur'))")

    page.get_by_label("Images").fill("1")
    page.get_by_label("Prompt").fill("a cook")
    draw(page, 1)
    assert blurred() == [False, False]
    page.get_by_label("Prompt").fill("a bloody cook")
    page.get_by_text("it says 'bloody'").first.wait_for()
    page.locator("#values label", has_text="bloody considered inappropriate").click()  # off: the prompt is as it is
    draw(page, 1)
    assert blurred() == [True, True] and page.get_by_text("Blurred, for it may").is_visible()
    page.get_by_label("Show what may be disturbing").check()
    assert blurred() == [False, False] and not page.get_by_text("Blurred, for it may").is_visible()


def test_bad_input(page):
    cases = {
        "": "The prompt is empty", "  ": "The prompt is empty", "a cook " * 20: "the model reads 24: shorten",
        "a cook \ud800": "no Unicode text: its character 8",
    }  # fmt: skip
    for prompt, message in cases.items():
        # As by hand; Playwright itself sends no lone surrogates.
        page.locator("textarea").evaluate(
            f"box => {{ box.value = {json.dumps(prompt)}; box.dispatchEvent(new Event('input')) }}"
        )
        page.get_by_role("button", name="Generate").click()
        page.get_by_text(message).first.wait_for()
        page.get_by_label("Close").first.click()
    page.get_by_label("Prompt").fill("a cook")
    for field, x, message in (
        ("Images", "17", "choose 1 to 16"),
        ("Seed", "-1", "Seed: -1"),
        ("Seed", "", "Seed: empty"),
        ("Seed", str(2**63), "Seed: 9223372036854775808, choose 0 to 9223372036854775807"),
    ):
        page.get_by_label(field).fill(x)
        page.get_by_role("button", name="Generate").click()
        page.get_by_text(message).first.wait_for()
    assert page.locator(".run").count() == 0


def test_markup_is_shown_as_it_is(page):
    prompt = "<i>${1}</i>"
    page.get_by_label("Prompt").fill(prompt)
    draw(page)
    assert page.locator(".run summary b").inner_text() == prompt
    assert page.locator(".run i").count() == 0
    assert page.locator("img.aligned").first.get_attribute("alt") == f"aligned: {prompt}"


def test_stop(page):
    page.get_by_label("Images").fill("16")
    # The browser itself clicks at the first figure: asked from here, it may come after the last.
    page.evaluate("""() => new MutationObserver((_, observer) => {
        if (!document.querySelector("figure")) return
        observer.disconnect();
        [...document.querySelectorAll("button")].find(button => button.innerText == "Stop").click()
    }).observe(document, {childList: true, subtree: true})""")
    page.get_by_role("button", name="Generate").click()
    page.locator("figure").first.wait_for()
    page.wait_for_timeout(1500)
    drawn = page.locator("figure").count()
    assert 1 <= drawn < 16 and f"{drawn} of 16 images" in page.locator(".run summary").inner_text()
    page.get_by_label("Images").fill("1")
    draw(page, 1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(address, browser, scheme):
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    page.get_by_label("Images").fill("1")
    draw(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    base, aligned = page.locator("img.base").bounding_box(), page.locator("img.aligned").bounding_box()
    assert base["y"] == aligned["y"] and base["width"] > 120, "side by side"
    assert base["x"] + base["width"] < aligned["x"] and aligned["x"] + aligned["width"] < 390
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (colour == "rgb(255, 255, 255)") == (scheme == "light")
    context.close()


def test_an_interrupted_page_leaves_no_image_behind(page, served):
    draw(page)
    compiled = served.log.read_text().count("Finished XLA compilation of jit(_sample)")
    assert 1 <= compiled <= 3, "one for the base, one for values at strength 1, one for others"
    assert list(served.folder.glob("**/*.png"))
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(timeout=60) == 0 and not list(served.folder.glob("**/*.png"))


def test_what_is_missing_is_said_before_models_are_loaded(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} .* choose another --port"):
            demo.check(port)
    demo.check(port)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install gradio"):
        demo.check(port)


@pytest.mark.parametrize("before", [{}, {"no_proxy": "localhost"}])
def test_the_proxy_is_that_of_before(before, monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    for name, hosts in before.items():
        monkeypatch.setenv(name, hosts)
    with demo.without_proxy():
        assert urllib.request.proxy_bypass("127.0.0.1")
    assert os.environ.get("no_proxy") == before.get("no_proxy")
