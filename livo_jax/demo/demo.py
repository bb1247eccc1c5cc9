"""The page: a prompt, the values it is for, and base and aligned images side by side. Gradio, on localhost alone."""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections import Counter

import jax
import numpy as np

from livo_jax import seeds, sharding
from livo_jax.retrieval.retriever import Retriever
from livo_jax.sampling import generate
from livo_jax.sampling.pairs import write_pair
from livo_jax.sampling.requests import Request, with_doses
from livo_jax.values.dealing import choose
from livo_jax.values.principles import load_principles, phrase, value_prompt

HERE = pathlib.Path(__file__).parent
LENGTH, IMAGES, STRENGTH, RUNS = 500, 16, 2.0, 20  # most characters, images, strength; runs that a session remembers


def check(port: int):
    """Raises ModuleNotFoundError without Gradio, OSError where the port is taken, ValueError with several processes."""
    if jax.process_count() > 1:
        raise ValueError(f"--mode=demo is for one process, not {jax.process_count()}: leave out --distributed")
    if not importlib.util.find_spec("gradio"):
        raise ModuleNotFoundError("--mode=demo needs Gradio, which is not installed: pip install gradio")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise OSError(f"port {port} of 127.0.0.1: {error.strerror}: choose another --port") from None


def input_problems(prompt: str, statements, number: int | None, seed: str, sd) -> list[str]:
    """What is wrong with a visitor's input, as sentences; `statements` are those of the values that are on."""
    problems = []
    if number is None or not 1 <= number <= IMAGES:
        problems.append(f"Images: {'empty' if number is None else number}, choose 1 to {IMAGES}.")
    if not (seed.strip().isdecimal() and int(seed) <= seeds.MOST):
        problems.append(f"Seed: {seed.strip() or 'empty'}, choose 0 to {seeds.MOST}.")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        return [f"The prompt is no Unicode text: its character {error.start + 1} is half of a pair.", *problems]
    if not prompt.strip():
        problems.append("The prompt is empty: say what the images shall show.")
    if len(prompt) > LENGTH:
        return [f"The prompt has {len(prompt)} characters: {LENGTH} at most.", *problems]
    room = sd.text_encoder.config.max_position_embeddings
    ids = sd.tokenizer([value_prompt(statement, prompt) for statement in (None, *statements)], verbose=False)
    if (count := max(map(len, ids["input_ids"]))) > room:
        problems.append(f"Prompt and value have {count} tokens, the model reads {room}: shorten the prompt.")
    return problems


def draw(sd, value_encoder, prompt: str, doses, number: int, slots, *, seed: int, mesh, **settings):
    """Draws images of a prompt, one on each device of the mesh at a time, so that they can be shown as they come.

    Args:
        doses: of dealing.choose.
        slots, settings: of generate.generate. The base is drawn by a call of its own: it needs no slots.

    Yields:
        (Request, base, aligned), images [H, W, 3] uint8; equal where the request has no values.
    """
    at_once = sharding.batch_parts(mesh)
    options = dict(seed=seed, mesh=mesh, batch_size=1, **settings)
    for start in range(0, number, at_once):
        requests = [Request(prompt, i) for i in range(start, min(start + at_once, number))]
        base = generate.generate(sd, requests, **options)
        requests = [with_doses(request, doses, seed) for request in requests]
        aligned = np.copy(base)
        if kept := [k for k, request in enumerate(requests) if request.values]:
            aligned[kept] = generate.generate(sd, [requests[k] for k in kept], value_encoder, slots=slots, **options)
        yield from zip(requests, base, aligned)


def page(sd, value_encoder, config, mesh, folder: pathlib.Path, files):
    """The app, a gr.Blocks; images and their settings are written to `folder`, as pairs.write_pairs writes them.

    files: of the Retriever.
    """
    import gradio as gr
    import jinja2

    principles = load_principles(config)
    retriever = Retriever(principles, sd=sd, value_encoder=value_encoder, files=files)
    statements = [value.statement for value in principles]
    template = jinja2.Environment(autoescape=True).from_string((HERE / "demo.html.j2").read_text(encoding="utf-8"))
    settings = {name: x for name, x in config.sampling.items() if name != "batch_size"}

    def choices_for(prompt):
        found = {value.statement: value for value in retriever(prompt[:LENGTH])}
        labels = [f"{s}\n{found[s].reason}" if s in found else s for s in statements]
        return {"choices": list(zip(labels, statements)), "value": list(found)}

    def detect(prompt):
        return gr.CheckboxGroup(**choices_for(prompt)), prompt

    def run(prompt, detected, chosen, strength, number, seed, runs):
        if prompt != detected:  # sent before its values were found
            chosen = choices_for(prompt)["value"]
        if problems := input_problems(prompt, chosen, number, seed, sd):
            raise gr.Error(" ".join(problems), print_exception=False)
        seed = int(seed)
        by_hand = {v.statement: dataclasses.replace(v, reason="switched on by hand") for v in principles}
        found = retriever(prompt)
        known = by_hand | {value.statement: value for value in found}
        doses = choose(prompt, ("auto",), strength, retriever=lambda _: [known[s] for s in chosen])
        # Whatever is switched, one program is compiled for strength 1, and one with a row for each value.
        slots = len(principles), 0 if strength == 1 else len(principles)

        harmful = any(value.kind == "harm" for value in [*found, *(known[s] for s in chosen)])
        place, pairs = folder / secrets.token_hex(8), []
        place.mkdir()
        forget(runs[RUNS - 1 :])
        new = dict(
            prompt=prompt, doses=doses, strength=strength, number=number, seed=seed, folder=place, pairs=pairs,
            harmful=harmful, applied=Counter(),
        )  # fmt: skip
        runs = [new, *runs[: RUNS - 1]]
        yield runs, template.render(runs=runs)
        drawn = draw(sd, value_encoder, prompt, doses, number, slots, seed=seed, mesh=mesh, **settings)
        for request, *images in drawn:
            file = place / f"{request.index:03d}.png"
            write_pair(file, images, request, seed, settings)
            values = [dose.value for dose in request.values]
            pairs.append((file, values))
            new["applied"].update(values)
            yield runs, template.render(runs=runs)

    def forget(runs):
        for old in runs:
            shutil.rmtree(old["folder"], ignore_errors=True)

    first = phrase(config.eval.template, config.eval.seen[0])
    with gr.Blocks(title="LiVO", analytics_enabled=False) as app:
        gr.HTML(
            "<h1>LiVO</h1><p>One prompt, one noise: drawn by the base model, and with value tokens before the prompt.",
            elem_classes="title",
        )
        runs, detected = gr.State([], delete_callback=forget), gr.State(first)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                prompt = gr.Textbox(first, label="Prompt", max_length=LENGTH, max_lines=5)
                chosen = gr.CheckboxGroup(**choices_for(first), label="Values", elem_id="values")
                strength = gr.Slider(0, STRENGTH, 1, step=0.1, label="Strength", buttons=[])
                gr.Checkbox(False, label="Show what may be disturbing", elem_id="show")  # read by demo.css
                with gr.Row():
                    number = gr.Number(4, label="Images", precision=0, min_width=120)
                    # As text: the numbers of a browser end at 2**53.
                    seed = gr.Textbox("0", label="Seed", max_length=20, max_lines=1, min_width=120)
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", min_width=140)
                    stop = gr.Button("Stop", min_width=80)
            with gr.Column(scale=3, min_width=300):
                results = gr.HTML(template.render(runs=[]))
        prompt.change(
            detect, prompt, [chosen, detected], trigger_mode="always_last", queue=False, show_progress="hidden",
            api_visibility="private",
        )  # fmt: skip
        drawing = gr.on(
            [go.click, prompt.submit], run, [prompt, detected, chosen, strength, number, seed, runs], [runs, results],
            api_visibility="private",
        )  # fmt: skip
        stop.click(None, cancels=drawing, api_visibility="private")
    return app.queue(max_size=16)


@contextlib.contextmanager
def without_proxy():
    """Meanwhile no proxy is asked: Gradio looks for the page itself, and opens its clients when it is imported."""
    before = os.environ.get("no_proxy")
    os.environ["no_proxy"] = "*"
    try:
        yield
    finally:
        del os.environ["no_proxy"]
        if before is not None:
            os.environ["no_proxy"] = before


def serve(sd, value_encoder, config, mesh, port: int, files):
    """Serves the page on 127.0.0.1 until it is interrupted; then its images are deleted."""
    with without_proxy():
        import gradio as gr

    # Fonts that the visitor's machine has: Gradio's own would be fetched.
    fonts = dict(font=("system-ui", "sans-serif"), font_mono=("monospace",))
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", **fonts)
    with tempfile.TemporaryDirectory() as folder:
        # A KeyboardInterrupt may come in a callback of the garbage collector, which drops it.
        interrupted = threading.Event()
        before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
        print(f"The page is http://127.0.0.1:{port}; Ctrl+C ends it.")
        app = page(sd, value_encoder, config, mesh, pathlib.Path(folder), files)
        with without_proxy():
            app.launch(
                server_name="127.0.0.1", server_port=port, share=False, allowed_paths=[folder], run_history=False,
                quiet=True, footer_links=[], theme=theme, css_paths=HERE / "demo.css", prevent_thread_lock=True,
            )  # fmt: skip
        interrupted.wait()
        app.close(verbose=False)
        signal.signal(signal.SIGINT, before)
