"""Which of a prompt's images a value is for."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from livo_jax import values
from livo_jax.values import dealing

PROMPTS = [f"a photo of a {word}" for word in "doctor nurse baker cook tailor guard CEO teacher".split()]

DEALT, UNIFORMS = [2, 3, 6, 7, 10, 11, 12, 13, 17, 19], [0.04478515979707043, 0.3003480391834925]


def applied(statement, share, seed, prompt, n):
    return np.array([dealing.applies(statement, share, seed, prompt, i) for i in range(n)])


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.35, 0.5, 0.55, 0.8, 1.0])
def test_of_every_block_exactly_the_share_gets_the_value(share):
    patterns = set()
    for prompt, seed in itertools.product(PROMPTS, (0, 7, 2**63 - 1)):
        of_prompt = applied("gender equality", share, seed, prompt, 60).reshape(3, 20)
        assert (of_prompt.sum(1) == round(20 * share)).all()
        patterns |= {tuple(block) for block in of_prompt.tolist()}
    assert len(patterns) > 10 or share in (0, 1), "blocks, prompts and seeds have orders of their own"


def test_a_share_between_two_twentieths_is_both_by_turns():
    counts = np.array([applied("x", 1 / 3, seed, "a baker", 20).sum() for seed in range(600)])
    assert set(counts) == {6, 7} and counts.mean() == pytest.approx(20 / 3, abs=4 * (2 / 9 / 600) ** 0.5)


@pytest.mark.parametrize(
    "a, b",
    [("gender equality", "racial equality"), ("gender equality", "gender equalitz"), ("age", "a longer statement")],
)
def test_two_values_are_independent(a, b):
    """Statements of one length too, for which a checksum in the place of a hash gives the same or opposite images."""

    def of(statement, seed):
        return np.concatenate([applied(statement, 0.5, seed, prompt, 60) for prompt in PROMPTS])

    together = [float(np.mean(of(a, seed) == of(b, seed))) for seed in range(20)]
    # Of n dealt images these agree in n / 2 on average, with a deviation of about sqrt(n) / 2: 480 images a seed.
    assert np.mean(together) == pytest.approx(0.5, abs=4 * 0.5 / (480 * 20) ** 0.5)
    assert 0.4 < min(together) and max(together) < 0.6, "neither the same images nor opposite ones, for any seed"
    cells = set(zip(applied(a, 0.5, 0, PROMPTS[0], 60), applied(b, 0.5, 0, PROMPTS[0], 60)))
    assert len(cells) == 4, "with both, with either, with none"


def test_the_papers_values_meet_in_every_prompt():
    gender, race = values.load(("gender", "race"))
    for prompt in PROMPTS:
        cells = set(zip(*(applied(v.statement, v.keep_probability, 0, prompt, 60) for v in (gender, race))))
        assert len(cells) == 4


def test_dealing_is_the_same_everywhere():
    """Numbers that were written down: another machine or version deals the same."""
    assert [i for i in range(20) if dealing.applies("gender equality", 0.5, 0, "a photo of a doctor", i)] == DEALT
    assert dealing.uniforms(2, 0, "a") == pytest.approx(UNIFORMS, abs=0)
    assert dealing.uniforms(2, 0, "a") != dealing.uniforms(2, "0", "a")


def test_exports_can_carry_it():
    """The standard library is enough."""
    code = "import runpy, sys; sys.modules['numpy'] = sys.modules['jax'] = None; runpy.run_path(sys.argv[1])"
    subprocess.run([sys.executable, "-S", "-c", code, dealing.__file__], check=True)
