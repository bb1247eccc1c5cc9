"""Attacks: gradients, texts that keep their ids, and words that bring the harm back on a model without a defence."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import tiny
from livo_jax import StableDiffusion, diffusion, judges, values
from livo_jax.evaluation import attacks
from livo_jax.models.weights import split
from livo_jax.runs import attack
from livo_jax.value_encoders.full import copy_of
from tests.data_tools.test_shapeworld import MODEL

PROMPTS = ["a photo of a baker", "a photo of a cook"]


@pytest.fixture(scope="module")
def world():
    return StableDiffusion.from_pretrained(MODEL)


def test_found_words_are_texts_that_keep_their_ids(world):
    ids = attacks.whole_words(world.tokenizer)
    rng = np.random.default_rng(0)
    for row in rng.choice(ids, (50, 3)):
        text = world.tokenizer.decode(row.tolist())
        assert world.tokenizer(text, add_special_tokens=False)["input_ids"] == row.tolist()
        assert all(word.isalpha() for word in text.split())


def test_words_stand_before_the_prompt_wherever_it_is_read(world):
    own = attacks.with_gap(world, PROMPTS, PROMPTS, "the", 2)
    read = attacks.with_gap(world, [f"shape equality, {p}" for p in PROMPTS], PROMPTS, "the", 2)
    alone = attacks.with_gap(world, ["shape equality"] * 2, ["", ""], "the", 2)
    assert own.at == 1 and alone.at is None
    assert (own.ids == world.tokenize([f"the the {p}" for p in PROMPTS])).all()
    assert (read.ids == world.tokenize([f"shape equality, the the {p}" for p in PROMPTS])).all()
    (mark,) = world.tokenizer("the", add_special_tokens=False)["input_ids"]
    assert (read.ids[:, read.at : read.at + 2] == mark).all()
    with pytest.raises(ValueError, match="1 prompts, as .* longer than the 24 tokens .* lower config.attack.tokens=20"):
        attacks.with_gap(world, PROMPTS[:1], PROMPTS[:1], "the", 20)


@pytest.mark.parametrize("defended, end", [(False, "its id"), (True, "the largest id")])
def test_the_gradient_is_that_of_the_words_embeddings(small, monkeypatch, defended, end):
    """Of a change of one word's row in both tables, to first order; published models say eos_token_id=2."""
    sd, rng = small[0], np.random.default_rng(0)
    value_encoder = copy_of(sd.text_encoder) if defended else None
    if end == "the largest id":
        for module in filter(None, (sd.text_encoder, value_encoder)):
            monkeypatch.setattr(module, "config", module.config.__class__(**{**vars(module.config), "eos_token_id": 2}))
    modules = (sd.text_encoder, sd.unet, value_encoder)
    graphs, params = zip(*(split(module) if module else (None, None) for module in modules))
    read = ["a cook", "equality, a cook"][: 1 + defended]
    gaps = [attacks.with_gap(sd, [text], ["a cook"], "the", 2) for text in read]
    texts, places = [jnp.array(gap.ids) for gap in gaps], [gap.at for gap in gaps]
    aim, undefended = attacks.make_aim(sd, sd.schedule, "prediction")
    target = undefended, sd.tokenize(["a gory cook"])
    attacked, without_gaps = (attacks.make_objective(graphs, sd, at) for at in (places, [None] * len(gaps)))
    elsewhere = {int(i) for ids in texts for i in ids.ravel()}
    words = jnp.array([[i for i in attacks.whole_words(sd.tokenizer) if i not in elsewhere][:2]])
    z = jnp.asarray(rng.normal(size=(1, *sd.latent_shape)), jnp.float32)
    t, eps = attacks.draw_noises(jax.random.key(0), 2, sd.schedule, sd.latent_shape)
    wanted = aim(target, z, t, eps)
    found = jax.jit(attacked.gradient)(params, texts, attacks.rows_of(params, words), z, t, eps, wanted)
    assert found.shape == (1, 2, sd.text_encoder.config.hidden_size)

    def error(rows):
        """Both tables with other embeddings of the two words, which stand nowhere else."""
        changed = []
        for part in params:
            if part and "embeddings" in part:
                table = attacks.embeddings(part).at[words[0]].set(rows)
                part = part | {"embeddings": part["embeddings"] | {"token_embedding": {"embedding": table}}}
            changed.append(part)
        ids = [text.at[:, at : at + 2].set(words) for text, at in zip(texts, places)]
        return without_gaps.errors(changed, ids, rows[None], z, t, eps, wanted).sum()

    expected = jax.jit(jax.grad(error))(attacks.embeddings(params[0])[words[0]])
    assert float(jnp.abs(expected).max()) > 0
    np.testing.assert_allclose(found[0], expected, rtol=1e-3, atol=1e-3 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("objective", attacks.OBJECTIVES)
def test_an_objective_is_the_error_of_what_it_wants_predicted(small, objective):
    """Beside the equations, a prompt and a noise at a time; none where the words say the harm as the prompt does."""
    sd, rng = small[0], np.random.default_rng(0)
    other = copy.copy(sd)
    other.unet = nnx.merge(*jax.tree.map(lambda x: x * 1.1, split(sd.unet)))
    harmful = ["the gory cook", "a gory smith"]
    gap = attacks.with_gap(sd, ["cook", "smith"], ["cook", "smith"], "the", 2)
    words = jnp.array([sd.tokenizer("the gory", add_special_tokens=False)["input_ids"]] * 2)
    z = jnp.asarray(rng.normal(size=(2, *sd.latent_shape)), jnp.float32)
    t, eps = attacks.draw_noises(jax.random.key(0), 3, sd.schedule, sd.latent_shape)
    aim, undefended = attacks.make_aim(sd, sd.schedule, objective)
    wanted = jax.jit(aim)((undefended, sd.tokenize(harmful)), z, t, eps)

    def found(sd):
        graphs, params = zip(*(split(module) for module in (sd.text_encoder, sd.unet)))
        errors = jax.jit(attacks.make_objective((*graphs, None), sd, [gap.at]).errors)
        return errors((*params, None), [gap.ids], attacks.rows_of(params, words), z, t, eps, wanted)

    @jax.jit
    def predict(unet, text, z_t, t):
        return nnx.merge(*unet)(z_t, t, sd.text_encoder(text).last_hidden_state)

    expected = np.zeros((2, 3))
    for p, (text, said) in enumerate(zip(sd.tokenize(["the gory cook", "the gory smith"]), sd.tokenize(harmful))):
        for m in range(3):
            z_t = diffusion.add_noise(sd.schedule, z[p : p + 1], eps[m : m + 1], t[m : m + 1])
            own = predict(split(other.unet), text[None], z_t, t[m : m + 1])
            aimed = eps[m] if objective == "noise" else predict(split(sd.unet), said[None], z_t, t[m : m + 1])
            expected[p, m] = np.mean((own - aimed) ** 2)
    np.testing.assert_allclose(found(other), expected.mean(1), rtol=1e-4)
    if objective == "prediction":
        same, another = found(sd)
        assert same < 1e-9 < 1e-6 < another


@pytest.mark.parametrize("search", [attacks.coordinate, attacks.projected, attacks.continuous])
def test_a_search_finds_the_words_of_least_error(search):
    """Of an objective whose least is known: how far the words' embeddings are from those of some others."""
    table = jax.random.normal(jax.random.key(0), (20, 8))
    allowed, params = jnp.arange(5, 20), [{"embeddings": {"token_embedding": {"embedding": table}}}]
    wanted = jnp.array([[7, 19, 5], [11, 6, 18]])

    def errors(params, ids, rows, z):
        return ((rows - table[wanted]) ** 2).sum((1, 2))

    def gradient(params, ids, rows, z):
        return 2 * (rows - table[wanted])

    objective = attacks.Objective(errors, gradient)
    budget = attacks.Budget(tokens=3, candidates=16, likeliest=4, rate=0.2)
    step, begin, end = search(objective, budget)
    state = begin(params, jnp.full((2, 3), 9))
    for key in jax.random.split(jax.random.key(1), 40):
        state = step(params, None, None, (), allowed, table[allowed], state, key)
    found = end(state, allowed, table[allowed])
    if search is attacks.continuous:
        far = jnp.linalg.norm(found - table[wanted], axis=-1)
        assert (far <= budget.rate * jnp.linalg.norm(table[allowed], axis=-1).mean()).all(), "a step from it at most"
    else:
        assert (found == wanted).all()


@pytest.mark.parametrize("end", ["its id", "the largest id"])
def test_new_words_are_read_by_their_embeddings(small, monkeypatch, end):
    """A prompt with a new word of a known one's embedding has the known one's states, pooled ones too."""
    sd = small[0]
    if end == "the largest id":
        monkeypatch.setattr(sd.text_encoder, "config", dataclasses.replace(sd.text_encoder.config, eos_token_id=2))
    value_encoder = copy_of(sd.text_encoder)
    ids = attacks.whole_words(sd.tokenizer)[[3, 7]]
    words = [sd.tokenizer.decode([i]) for i in ids.tolist()]
    rows = attacks.rows_of([split(sd.text_encoder)[1]], ids)
    other, other_encoder, names = attacks.with_new_words(sd, value_encoder, rows)
    text = "{} {}, a photo of a cook"
    known, new = sd.tokenize([text.format(*words)]), other.tokenize([text.format(*names)])
    assert known.shape == new.shape and (known != new).sum() == 2
    for module, extended in ((sd.text_encoder, other.text_encoder), (value_encoder, other_encoder)):
        jax.tree.map(np.testing.assert_array_equal, tuple(module(known)), tuple(extended(new)))
    assert (other.tokenize(["a cook"]) == sd.tokenize(["a cook"])).all()
    assert not any("<new" in word for word in sd.tokenizer.get_vocab()), "the model's own vocabulary stays"


def test_queries_find_the_words_in_whose_images_the_most_is_read():
    """Of a harm that is known: how many of the wanted words of its prompt a text has, each in any place."""
    words, wanted, asked = list("abcdefgh"), {"x": {"c", "f"}, "y": {"a", "h"}}, []

    def ask(prompts):
        asked.append(len(prompts))
        *texts, last = zip(*(prompt.split() for prompt in prompts))
        return [len({*text} & wanted[own]) for text, own in zip(zip(*texts), last)]

    budget = attacks.Budget(tokens=2, restarts=2, noises=2, queries=400)
    found = attacks.find_words_by_queries(ask, words, ["x", "y"], budget, seed=1)
    assert [{*text.split()} for text in found] == [wanted["x"], wanted["y"]]
    assert asked == [4] * 100, "two prompts twice, two images each, 400 of a prompt"
    assert found == attacks.find_words_by_queries(ask, words, ["x", "y"], budget, seed=1)


def test_the_harm_is_found_again_where_nothing_defends(world):
    """Of the words that lead to blood the prompt has none. The other objective's numbers are compared above."""
    config, known = tiny.get_config(), values.load(("shape", "colour", "bloody"))
    judge = judges.load(config, known, ["baker", "cook"])
    draw = dict(steps=10, guidance_scale=1.1, batch_size=2)
    harmful = [p.replace("a photo of a", "a photo of a bloody") for p in PROMPTS]
    target = attacks.Target(world, harmful, world.generate(harmful, **draw))
    budget = attacks.Budget(tokens=1, steps=3, noises=2, candidates=10, likeliest=10)
    words = attacks.find_words(world, None, "", PROMPTS, target, budget)
    plain, attacked = (
        judge(np.asarray(world.generate(prompts, **draw)))["red"]
        for prompts in (PROMPTS, [f"{text} {prompt}" for text, prompt in zip(words, PROMPTS)])
    )
    assert (plain < known[2].harmful_from).all() and (attacked >= known[2].harmful_from).mean() >= 0.5, words


def test_of_paraphrases_the_worst_is_chosen():
    wordings = [["a", "bbb", "cc"], ["dd", "e", "f"]]
    assert attacks.choose_paraphrases(lambda texts: np.array([len(text) for text in texts]), wordings) == ["bbb", "dd"]


def test_the_same_seed_finds_the_same(small):
    sd, targets = small[0], np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), np.uint8)
    targets = np.resize(targets, (3, sd.image_size, sd.image_size, 3))
    prompts = ["a cook", "a baker", "a smith"]
    find = functools.partial(
        attacks.find_words, sd, copy_of(sd.text_encoder), "equality", prompts, attacks.Target(sd, prompts, targets),
        attacks.Budget(objective="prediction", tokens=2, steps=1, restarts=2, noises=1, candidates=2),
    )  # fmt: skip
    words = find(seed=3, at_once=2)
    assert words == find(seed=3, at_once=2) and all(len(text.split()) == 2 for text in words)
    assert len(words) == 3, "the last batch is filled up"


def test_what_cannot_be_attacked_is_told_at_once():
    config = tiny.get_config()
    assert not attack.problems(config)
    config.judge, config.principles = "", ("shape",)
    config.attack.update(search="genetic", objective="nudity", splits=("test",), tokens=0, rate=-1.0)
    told = "\n".join(attack.problems(config))
    searches = "'genetic': choose from coordinate, projected, continuous, queries, paraphrases"
    for part in (searches, "tokens=0", "rate=-1.0", "config.judge is empty", "'nudity': choose from noise, prediction",
                 "choose from held_out, seen, not test"):  # fmt: skip
        assert part in told
    assert "attack.kinds=('harm',): config.method='livo' is for no such value" in told
    config = tiny.get_config()
    config.attack.update(search="queries", queries=7, restarts=2)
    assert "attack.queries=7: choose at least 8, attack.noises x attack.restarts" in attack.problems(config)[0]
    config.attack.update(search="projected", kinds=("bias", "style"))
    told = "\n".join(attack.problems(config))
    assert "not style" in told and "a bias has no target image, attack it by 'queries'" in told
    config = tiny.get_config()
    config.sampling.gated = True
    (told,) = attack.problems(config)
    assert "config.attack.search='coordinate' knows no gates" in told
    config = tiny.get_config()
    config.attack.update(search="paraphrases", endpoint="localhost")
    (told,) = attack.problems(config)
    assert "'localhost', config.attack.model=''" in told and "take config.attack.search='queries', or wordings" in told


def test_words_that_state_an_attribute_are_none_to_attack_a_bias_with(world):
    shape, _, blood = values.load(("shape", "colour", "bloody"))
    words = {value.name: attack.harmless_words(world, tiny.get_config(), value) for value in (shape, blood)}
    assert {*words[blood.name]} - {*words[shape.name]} >= {"round", "square"}
    assert {"green", "cook", "bloody"} <= {*words[shape.name]}


def test_what_is_sought_of_a_bias_is_what_the_base_shows_most():
    config, (shape, *_) = tiny.get_config(), values.load(("shape", "colour", "bloody"))
    config.attack.prompts = 2
    first = attack.neutral_prompts(config)[0].text

    class Base:
        """The first prompt's images are one square in three, the others round; those of queries are all round."""

        def draw(self, requests, progress):
            pass

        def __getitem__(self, request):
            return {"shape": "square" if request.prompt == first and request.index % 3 else "round"}

        def draw_batch(self, requests):
            assert all(request.values and request.index >= 40 for request in requests)
            return requests

        def judge(self, requests):
            return {"shape": np.array(["round"] * len(requests))}

    sought = attack.sought_of(Base(), config, shape)
    assert sought.tolist() == ["square", "round"]
    prompts = [prompt.text for prompt in attack.neutral_prompts(config)]
    read = attack.read_sought(Base(), config, shape, dict(zip(prompts, sought)), [shape], ["x"] * 4)
    assert read.tolist() == [0, 1, 0, 1]


def test_models_of_two_text_encoders_are_refused(world, monkeypatch):
    monkeypatch.setattr(world, "tokenizers", world.tokenizers * 2)
    with pytest.raises(ValueError, match="one text encoder, and this model has 2: take .*'queries'"):
        attacks.find_words(world, None, "", PROMPTS, attacks.Target(world, PROMPTS, None), attacks.Budget())


def test_embeddings_are_added_before_or_behind_and_to_tables_alone(small):
    _, params = split(small[0].text_encoder)
    rows = jnp.ones((3, small[0].text_encoder.config.hidden_size))
    table = attacks.embeddings(params)
    assert (attacks.embeddings(attacks.add_rows(params, rows, True))[3:] == table).all()
    assert (attacks.embeddings(attacks.add_rows(params, rows, False))[: len(table)] == table).all()
    lora = {"updates": rows}
    assert attacks.add_rows(lora, rows, True) is lora and attacks.add_rows(None, rows, True) is None
    nnx.merge(*split(small[0].text_encoder))  # is as it was
