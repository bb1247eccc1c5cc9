"""Fields of a config that its method does not read: set all the same, they are refused, not passed over."""

import types

from livo_jax import methods, values

READ = {  # (a field that chooses, its choice) -> the fields that it reads of those of all choices
    ("value_encoder.kind", "full"): (
        "value_encoder.states", "value_encoder.reads_prompt", "value_encoder.pooled", "train.train_embeddings",
    ),
    ("value_encoder.kind", "lora"): (
        "value_encoder.rank", "value_encoder.alpha", "value_encoder.targets", "value_encoder.states",
        "value_encoder.reads_prompt", "value_encoder.pooled",
    ),
    ("value_encoder.kind", "token"): ("value_encoder.tokens",),
    ("loss.form", "livo"): ("loss.alpha", "loss.beta", "loss.gamma_1", "loss.gamma_2"),
    ("loss.form", "sft"): (),
    ("loss.form", "dpo"): ("loss.beta",),
    ("loss.form", "ipo"): ("loss.beta",),
    ("loss.form", "kto"): ("loss.beta",),
    ("train.learning_rate_scaling", "linear"): ("train.reference_batch_size",),
    ("train.learning_rate_scaling", "sqrt"): ("train.reference_batch_size",),
    ("train.learning_rate_scaling", "none"): (),
}  # fmt: skip
OFF = {  # what a field says that asks for nothing: any other value is refused where it is not read, whoever set it
    "loss.form": "livo", "loss.min_snr_gamma": 0.0, "data.beside": 0.0, "data.attributes": 0.0, "data.anchors": 0.0,
    "value_encoder.kind": "full", "value_encoder.start": "", "value_encoder.states": 1,
    "value_encoder.reads_prompt": True, "value_encoder.pooled": False,
}  # fmt: skip
FORMS = tuple(form for field, form in READ if field == "loss.form")  # methods of a config of their own have these names
SHARED = ("sampling", "eval")  # sections that a comparison wants alike, whether a method reads all of them or not


def of(config, name: str):
    """The value of a field by its name, "train.steps"."""
    for part in name.split("."):
        config = config[part]
    return config


def ignored(config) -> dict[str, str]:
    """The sections and fields that are not read, each with the setting that does not read it."""
    method = methods.make_method(config)
    found = dict.fromkeys(method.UNREAD, f"config.method={config.method!r}")
    if not config.data.anchors:
        for field in ("loss.anchor", "loss.anchor_of_harms"):
            found.setdefault(field, "config.data.anchors=0.0")
    for field in dict.fromkeys(field for field, _ in READ):
        chosen = of(config, field)
        if unread(field, found) or (field, chosen) not in READ:  # an unknown choice is told elsewhere
            continue
        of_all = {name for (other, _), names in READ.items() if other == field for name in names}
        found |= dict.fromkeys(of_all - {*READ[field, chosen]}, f"config.{field}={chosen!r}")
    return found


def unread(name: str, found: dict[str, str]) -> str | None:
    """The setting that does not read a field, itself or its section, of those of `ignored`; None where it is read."""
    return next((found[field] for field in found if f"{name}.".startswith(f"{field}.")), None)


def problems(config, changed=types.MappingProxyType({}), comparing: bool = False) -> list[str]:
    """A line for every field that is set and not read, and for what else the method cannot work with.

    Raises ValueError where config.principles has unknown values.

    Args:
        changed: {field: value} of what the command line sets. Of other fields only such as ask for something are told
            (OFF): a method's config keeps what it does not read as the config has it that it starts from.
        comparing: whether the method is one of several to be compared.
    """
    method = methods.make_method(config)
    if method.SECTION and method.SECTION not in config:
        file = f"configs/baselines/{method.SECTION}.py"
        return [f"config.method={config.method!r} has settings in config.{method.SECTION}: begin with --config={file}"]
    found, lines = ignored(config), []
    if (name := changed.get("method")) and ":" not in name and name not in (*methods.METHODS, *FORMS):
        known = ", ".join(methods.METHODS)
        lines.append(f"config.method={name!r}: choose from {known}, or one of your own, package.module:Name")
    for name, value in sorted(changed.items()):
        if (name, value) == ("train.steps", 0):  # what a method that trains nothing wants
            continue
        if (by := unread(name, found)) and not (comparing and name.startswith(SHARED)):
            lines.append(f"config.{name}={value!r}: {by} does not read it, leave it out")
    trains = isinstance(method, methods.TrainedMethod)
    for name, off in OFF.items() if trains else ():
        if (by := unread(name, found)) and name not in changed and of(config, name) != off:
            lines.append(f"config.{name}={of(config, name)!r}: {by} does not read it, set {off!r}")
    if not trains and config.train.steps and "train.steps" not in changed:
        lines.append(f"config.train.steps={config.train.steps}: config.method={config.method!r} trains nothing, set 0")
    own_rate = config.train.learning_rate or config.method in config.train.learning_rates
    if trains and not method.HAS_TOKENS and not own_rate:
        lines.append(f"config.train.learning_rate=0: config.method={config.method!r} has no rate of its own, set one")
    if config.eval.ratios and method.HAS_TOKENS and config.eval.rate_images < 1:
        told = "a ratio is solved from what the tokens show, choose at least 1"
        lines.append(f"config.eval.rate_images={config.eval.rate_images}: {told}")
    if trains and (slow := too_slow(config)):
        lines.append(slow)
    there = {value.kind for value in values.load_principles(config)} if {*method.KINDS} != {"bias", "harm"} else ()
    if there and there.isdisjoint(method.KINDS):
        kinds = " or ".join(method.KINDS)
        lines.append(f"config.principles={config.principles}: {config.method} is for values of kind {kinds}")
    return lines + method.problems()


def too_slow(config) -> str | None:
    """What is to be said of a learning rate at which nothing would be learned, if it is one."""
    c = config.train
    trained = config.method if config.method in c.learning_rates else config.value_encoder.kind
    own = c.learning_rates.get(trained, 0.0)
    if not 0 < c.learning_rate <= own / 100:
        return None
    return (
        f"config.train.learning_rate={c.learning_rate:g}: AdamW moves a weight by at most about that in a step, so by"
        f" {c.learning_rate * c.steps:.2g} in {c.steps} steps, and {trained} learns at {own:g}: set 0 for that"
    )


def check_mode(config, mode: str, values=()):
    """Raises ValueError where the method of a config cannot do what is asked for; `values`: those to generate with."""
    method = f"config.method={config.method!r}"
    kind = methods.make_method(config)
    drawn, has_tokens = not isinstance(kind, methods.TrainedMethod), kind.HAS_TOKENS
    if not drawn and config.train.steps < 1:
        raise ValueError(f"config.train.steps={config.train.steps}: choose at least 1, for {method} trains")
    if drawn and mode in ("train", "plan"):
        raise ValueError(f"--mode={mode}: {method} trains nothing; --mode=evaluate measures it")
    if mode in ("export", "demo") and not has_tokens:
        raise ValueError(
            f"--mode={mode}: {method} has no value encoder; --mode=evaluate measures it and keeps its images"
        )
    if mode == "export" and ":" in config.value_encoder.kind:
        raise ValueError(
            f"--mode=export: pipelines do not know config.value_encoder.kind={config.value_encoder.kind!r}, its own"
            " code has to save it"
        )
    if mode == "generate" and drawn:
        raise ValueError(
            f"--mode=generate draws with value tokens, and {method} has none; --mode=evaluate draws its images, of"
            " config.eval.prompts or subjects, and keeps them"
        )
    if mode == "generate" and values and not has_tokens:
        raise ValueError(
            f"--value={values[0]}: {method} has no value tokens, its model follows all of its values in every image:"
            " leave --value out"
        )
