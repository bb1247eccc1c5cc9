"""What each part of LiVO's recipe does, on the embedded world: one thing changed at a time.

    python run.py --config=configs/ablations.py --mode=evaluate

trains and measures every setting of SWEEPS as configs/compare_tiny.py does its methods, beside the run that they all
share; the report plots them. Its trainings are a sixth of the whole; those of `:parts` are whole: it has PARTS, and
the other losses with all else as LiVO has it, the anchors' loss too.
`:smoke` is a run of minutes, to see that everything runs; its figures mean nothing.
"""

from livo_jax.configs import common, compare_tiny
from ml_collections import ConfigDict

SWEEPS = {  # a field of configs/tiny.py: what it is set to; its own setting there is the run livo
    "loss.alpha": (0.0, 50.0, 200.0),
    "loss.beta": (100.0, 400.0, 1600.0),
    "loss.gamma_1": (1.0, 10.0),
    "loss.gamma_2": (1.0, 10.0),
    "value_encoder.states": (1, 4, 0),  # one value token, several, a token of every state of the text
    "value_encoder.reads_prompt": (True, False),
    "data.anchors": (0.0, 0.3),
}
PARTS = {  # what configs/tiny.py has beside the paper's recipe, taken away
    "loss.anchor": (0.0, 6000.0),
    "data.attributes": (0.0, 0.4),
    "data.beside": (0.0, 0.3),
    "value_encoder.alone": ((), ("harm",)),
    "train.train_embeddings": (True, False),
}
FORMS = ("livo", "sft", "dpo", "ipo", "kto")  # of the loss, each with the constants of its file in configs/baselines/
ANCHOR = {  # loss.anchor of the others in `:parts`: as LiVO's, 15 times the form's own slope where there is no margin
    "sft": 15.0,
    "dpo": 1500.0,  # beta T / 2
    "ipo": 300_000.0,  # T / beta
    "kto": 750.0,  # beta T / 8
}
KEEP = (0.0, 0.25, 0.5, 0.75, 1.0)  # probabilities, of the run livo


def get_config(variant: str = "") -> ConfigDict:
    common.check_variant("ablations", variant, ("smoke", "parts"))
    parts = variant == "parts"
    config = compare_tiny.get_config("" if parts else variant)
    methods = {name: config.methods[name] for name in FORMS}
    if parts:
        for name, anchor in ANCHOR.items():
            own = config.methods.livo.copy_and_resolve_references()
            own.method = own.loss.form = name
            own.loss.beta, own.loss.anchor = methods[name].loss.beta, anchor
            methods[name] = own
    sweeps = [("loss.form", tuple((name, name) for name in FORMS))]
    for field, settings in (PARTS if parts else SWEEPS).items():
        section, name = field.split(".")
        points = []
        for setting in settings:
            own = config.methods.livo.copy_and_resolve_references()
            if own[section][name] == setting:
                own = methods["livo"]
            else:
                own[section][name] = setting
                own.method = f"{name}_{'none' if setting == () else setting}".removesuffix(".0")
                methods[own.method] = own
            points.append((str(setting), own.method))
        sweeps.append((field, tuple(points)))
    many = () if parts else methods.values()  # a sixth of the training, half the prompts, and fewer images
    for own in many:
        own.train.warmup_steps = min(100, own.train.warmup_steps)
        own.train.learning_rates.full = methods["livo"].train.learning_rates.full  # of the forms too
        own.train.steps, own.eval.images_per_prompt = min(600, own.train.steps), min(20, own.eval.images_per_prompt)
        own.eval.seen, own.eval.held_out = own.eval.seen[::2], own.eval.held_out[::2]
    methods["livo"].eval.keep_probabilities = KEEP
    config.methods, config.sweeps, config.curve.points = ConfigDict(methods), tuple(sweeps), 0
    config.attacks = ()
    return config
