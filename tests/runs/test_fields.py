"""Fields that a method does not read, learning rates, and what a method cannot do: told before anything is loaded."""

import importlib

import pytest

from configs import livo, sdxl, tiny
from configs.baselines import ALL as BASELINES
from livo_jax import methods
from livo_jax.files.settings import flatten
from livo_jax.runs import check, fields
from livo_jax.training.optimizer import learning_rate

FORMS = ("sft", "dpo", "ipo", "kto")


def config_of(method, start="tiny"):
    """The config of a method, of a form of the loss, or of livo with a kind of value encoder."""
    if method in BASELINES:
        return importlib.import_module(f"configs.baselines.{method}").get_config(start)
    config = {"tiny": tiny, "livo": livo}[start].get_config()
    config.value_encoder.kind = "full" if method == "livo" else method
    return config


@pytest.mark.parametrize("start", ["tiny", "livo"])
@pytest.mark.parametrize("method", ["livo", "lora", "token", *BASELINES])
def test_the_configs_as_they_are_work(method, start):
    assert not fields.problems(config_of(method, start))


def test_every_field_of_the_table_is_one_and_every_method_is_known():
    known = [*flatten(livo.get_config().to_dict()), "preferences"]
    named = {*fields.OFF, *(name for names in fields.READ.values() for name in names)}
    named |= {field for field, _ in fields.READ}
    named |= {field for method in methods.METHODS.values() for field in method.UNREAD}
    for name in named:
        assert any(f"{field}.".startswith(f"{name}.") for field in known), name
    assert {"livo", *BASELINES} == {*FORMS, *methods.METHODS}


# (method, field, a value that is not its own, what is said to not read it)
UNREAD = [
    ("livo", "value_encoder.rank", 4, "config.value_encoder.kind='full'"),
    ("livo", "value_encoder.tokens", 2, "config.value_encoder.kind='full'"),
    ("livo", "train.reference_batch_size", 4, "config.train.learning_rate_scaling='none'"),
    ("lora", "value_encoder.tokens", 2, "config.value_encoder.kind='lora'"),
    ("lora", "train.train_embeddings", True, "config.value_encoder.kind='lora'"),
    ("token", "value_encoder.states", 0, "config.value_encoder.kind='token'"),
    ("token", "value_encoder.alpha", 2.0, "config.value_encoder.kind='token'"),
    ("sft", "loss.beta", 2.0, "config.loss.form='sft'"),
    ("dpo", "loss.alpha", 2.0, "config.loss.form='dpo'"),
    ("ipo", "loss.gamma_1", 2.0, "config.loss.form='ipo'"),
    ("kto", "loss.gamma_2", 2.0, "config.loss.form='kto'"),
    ("dpo_unet", "loss.form", "kto", "config.method='dpo_unet'"),
    ("dpo_unet", "loss.min_snr_gamma", 5.0, "config.method='dpo_unet'"),
    ("dpo_unet", "loss.alpha", 2.0, "config.method='dpo_unet'"),
    ("dpo_unet", "value_encoder.kind", "lora", "config.method='dpo_unet'"),
    ("dpo_unet", "eval.strengths", (0.5,), "config.method='dpo_unet'"),
    ("dpo_unet", "sampling.prompt_layout", "official", "config.method='dpo_unet'"),
    ("dpo_unet", "data.anchors", 0.3, "config.method='dpo_unet'"),
    ("concept_ablation", "loss.min_snr_gamma", 5.0, "config.method='concept_ablation'"),
    ("concept_ablation", "loss.beta", 5.0, "config.method='concept_ablation'"),
    ("concept_ablation", "value_encoder.start", "somewhere", "config.method='concept_ablation'"),
    ("uce", "loss.beta", 5.0, "config.method='uce'"),
    ("uce", "train.learning_rate", 5.0, "config.method='uce'"),
    ("uce", "eval.ratios", ("equal",), "config.method='uce'"),
    ("sld", "value_encoder.kind", "lora", "config.method='sld'"),
    ("words", "data.cache", False, "config.method='words'"),
    ("negative", "preferences.pairs_per_scene", 3, "config.method='negative'"),
    ("fair_diffusion", "train.ema_decay", 0.9, "config.method='fair_diffusion'"),
]


@pytest.mark.parametrize("method, field, value, by", UNREAD, ids=lambda x: str(x))
def test_a_field_that_is_not_read_is_refused(method, field, value, by):
    """Where the command line sets it; and where it asks for something, whoever set it."""
    config = config_of(method)
    section, name = field.split(".")
    config[section][name] = value
    told = f"config.{field}={value!r}: {by} does not read it"
    with pytest.raises(ValueError, match="the config cannot work:\n") as error:
        check.check_fields(config, {field: value})
    assert told in str(error.value)
    if field in fields.OFF and isinstance(methods.make_method(config), methods.TrainedMethod):
        assert any(told in line for line in fields.problems(config))


def test_all_are_told_at_once_and_a_comparison_shares_what_it_measures_by():
    config = config_of("dpo_unet")
    changed = {"loss.form": "kto", "loss.gamma_1": 2.0, "eval.ratios": ("equal",)}
    config.loss.form, config.train.learning_rate = "kto", 1e-9
    assert len(fields.problems(config, changed)) == 4
    assert len(fields.problems(config, changed, comparing=True)) == 3


def test_a_ratio_wants_to_know_what_the_tokens_show():
    config = config_of("livo")
    config.eval.ratios, config.eval.rate_images = ("equal",), 0
    (told,) = fields.problems(config)
    assert told.startswith("config.eval.rate_images=0: a ratio is solved from what the tokens show")
    config.eval.rate_images = 1
    assert not fields.problems(config)


def test_a_misspelled_method_is_told_and_a_config_may_name_its_column():
    """The command line names what there is; it would train LiVO under the other name."""
    config = config_of("livo")
    config.method = "livooo"
    (told,) = fields.problems(config, {"method": "livooo"})
    assert "config.method='livooo': choose from livo, " in told and "package.module:Name" in told
    assert not fields.problems(config)


@pytest.mark.parametrize(
    "method, rate", [("livo", 1e-6), ("lora", 1e-4), ("token", 2e-3), ("dpo_unet", 1e-5), ("concept_ablation", 1.6e-5)]
)
def test_each_kind_has_a_learning_rate_of_its_own(method, rate):
    """Which moves it in a training, as the paper's 1e-6 would not; a rate that cannot is refused."""
    config = config_of(method, "livo")
    assert learning_rate(config) == rate and not fields.problems(config)
    config.train.learning_rate = rate / 2
    assert learning_rate(config) == rate / 2 and not fields.problems(config)
    config.train.learning_rate = rate / 100
    (told,) = fields.problems(config)
    assert f"{method if method != 'livo' else 'full'} learns at {rate:g}: set 0 for that" in told


def test_the_rates_of_other_configs():
    assert [learning_rate(config_of(kind)) for kind in ("livo", "lora", "token")] == [1.5e-3, 1.5e-3, 3e-2]
    assert [learning_rate(config_of(kind)) for kind in (*FORMS, "dpo_unet", "concept_ablation")] == [3e-3] * 4 + [
        3e-4
    ] * 2
    assert learning_rate(sdxl.get_config()) == 1e-6
    config = config_of("livo")
    config.value_encoder.kind = "tokens"
    with pytest.raises(ValueError, match="kind='tokens': config.train.learning_rates has none"):
        learning_rate(config)


@pytest.mark.parametrize("method", ["sld", "uce", "fair_diffusion", "concept_ablation"])
def test_settings_that_a_config_has_not_are_told_with_the_file_that_has_them(method):
    config = tiny.get_config()
    config.method = method
    assert fields.problems(config, {"method": method}) == [
        f"config.method={method!r} has settings in config.{method}: begin with --config=configs/baselines/{method}.py"
    ]


@pytest.mark.parametrize("method", ["negative", "sld"])
def test_a_harm_that_no_words_name_is_told(method, tmp_path):
    config, file = config_of(method), tmp_path / "principles.toml"
    file.write_text('[x]\nstatement="x"\nkind="harm"\naxis="red"\nwordings=["gory {subject}"]\nharmful_from=0.5\n')
    config.principles_file, config.principles = str(file), ("x",)
    assert f"config.method={method!r} needs negative or keywords of [x], which has neither" in fields.problems(config)


def test_an_anchor_of_one_image_asks_the_frozen_model_too():
    config = config_of("sft")
    assert methods.make_method(config).passes[1] == 1
    config.loss.anchor = 15.0
    assert methods.make_method(config).passes[1] == 2


MODES = [
    ("uce", "train", "trains nothing; --mode=evaluate"), ("sld", "plan", "trains nothing"),
    ("dpo_unet", "export", "has no value encoder"), ("words", "export", "has no value encoder"),
    ("concept_ablation", "demo", "has no value encoder"), ("negative", "generate", "--mode=evaluate draws its images"),
    ("dpo_unet", "generate", "--value=gender: config.method='dpo_unet' has no value tokens"),
]  # fmt: skip


@pytest.mark.parametrize("method, mode, told", MODES)
def test_what_a_method_cannot_do_is_refused(method, mode, told):
    with pytest.raises(ValueError, match=told):
        fields.check_mode(config_of(method), mode, ["gender"])


def test_what_a_method_can_do():
    for method in ("livo", "lora", "dpo", "dpo_unet"):
        for mode in ("train", "plan", "evaluate", "generate"):
            fields.check_mode(config_of(method), mode)
    config = config_of("livo")
    config.train.steps = 0
    with pytest.raises(ValueError, match="config.train.steps=0: choose at least 1"):
        fields.check_mode(config, "generate")


@pytest.mark.parametrize("method, principles", [("negative", ("gender",)), ("fair_diffusion", ("gore",))])
def test_values_of_another_kind_are_refused(method, principles):
    config = config_of(method)
    config.principles = principles
    assert f"{method} is for values of kind" in "\n".join(fields.problems(config))
