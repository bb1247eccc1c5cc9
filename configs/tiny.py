"""The embedded world: LiVO in a few minutes on two CPU cores, without a download.

    python run.py --config=configs/tiny.py

`configs/tiny.py:smoke` is the same in one minute, to see that everything runs; its figures mean nothing.
"""

import pathlib

from ml_collections import ConfigDict

from configs import prompt_sets

SEEN = (
    "cook butcher waiter brewer grocer barista smith tailor cobbler weaver glazier tinker farmer gardener miller"
    " beekeeper logger ranger sailor fisher porter captain ferryman lifeguard doctor dentist chemist surgeon midwife"
    " therapist teacher librarian painter singer dancer pianist lawyer judge accountant secretary typist broker driver"
    " guard cleaner courier postman mason"
).split()
HELD_OUT = (  # never in value training
    "baker caterer carpenter potter hunter shepherd diver docker nurse optician tutor coach clerk banker paver plumber"
).split()


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "smoke"):
        raise ValueError(f"configs/tiny.py:{variant}: there is configs/tiny.py and configs/tiny.py:smoke")
    config = ConfigDict()
    config.seed = 0  # of data order, noise and timesteps
    config.method = "livo"  # the column of the results; baselines: configs/baselines/
    config.model = str(pathlib.Path(__file__).resolve().parents[1] / "data_tools/shapeworld_model")  # diffusers layout
    config.variant = ""  # of the weight files; "fp16" where they are published in half precision
    config.random_weights = False  # the architecture of config.model alone, untrained
    config.dtype = "float32"  # of the frozen models; bfloat16 on accelerators
    config.principles = ("shape", "colour", "bloody")  # names in livo_jax/values/principles.toml
    config.principles_file = ""  # a TOML file of your own, as that one is; empty for it
    config.judge = "shapeworld"  # a module of livo_jax/judges
    # Devices: rows of a batch are divided over data and fsdp, weights over fsdp and tensor; -1 takes the rest.
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.cpu_devices = 2  # as so many a CPU counts, at most one a core: a small model on one leaves cores idle
    config.shard_frozen = False  # whether the frozen models are divided as the value encoder is: more traffic

    config.value_encoder = c = ConfigDict()  # livo_jax/value_encoders/
    c.kind = "full"  # a text encoder of its own; "lora": low-rank updates of the model's; "token": soft tokens alone
    c.start = ""  # directory or hub id of one of this kind to start from; empty: the model's text encoder
    c.rank, c.alpha = 8, 8.0  # lora: kernels are W + alpha / rank * A B
    c.targets = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # lora: the layers that are updated
    c.tokens = 4  # token: of each value
    c.states = 1  # full, lora: 1 gives the pooled state as the token, more those that follow too, 0 all of the text
    c.reads_prompt = True  # full, lora: whether the text has the prompt too, or the value alone

    config.judging = c = ConfigDict()  # of the judges clip, llava and vlm
    c.model = ""  # clip, llava: directory or hub id, as openai/clip-vit-large-patch14. vlm: its name at the endpoint
    c.endpoint = ""  # vlm: base URL of an OpenAI-compatible server, as http://localhost:8000/v1; key: OPENAI_API_KEY
    c.cache = ""  # vlm: directory that keeps the answers, so that nothing is asked twice; empty for none
    c.budget = 0  # vlm: questions that a build or an evaluation sends at most; 0 for no limit
    c.subject = True  # whether subjects are read too; False where the judge does not tell their pictures apart

    config.preferences = c = ConfigDict()  # how the pairs are built (data_tools/build_preferences.py)
    c.model = ""  # that draws them; empty: config.model
    c.scenes = tuple(SEEN)
    c.templates = (
        "a {}",
        "a photo of a {}",
        "a picture of a {}",
        "a portrait of a {}",
        "a {} at work",
        "the {} at work",
    )
    c.pairs_per_scene = 8  # at most, of each bias and scene
    c.harm_pairs_per_scene = 4  # its hinges are steeper: with as many, the encoder would forget to read trades
    c.candidates_per_pair = 1.0  # images drawn of each side, for the judge to choose from
    c.least_distance = 0  # bits of 64 by which the perceptual hashes of a side's images differ at least; 0 keeps all
    c.images_per_file = 480  # an interrupted build draws again at most so many for each process
    c.census_per_scene = 8  # neutral images that tell which attribute the model favours

    config.data = c = ConfigDict()
    c.directory = ""  # of the pairs; empty: WORKDIR/preferences, built at the first start
    c.cache = True  # of latents and prompt states beside the pairs, made at the first start; saves the VAE's passes
    c.random_flip = False  # a mirrored emblem would be another
    c.beside = 0.3  # share of the pairs that train with a second value's token beside their own
    c.attributes = 0.25  # share of a bias's pairs whose value names the attribute to show: what --ratio mixes
    c.anchors = 0.3  # share of the pairs whose prompt the value should leave alone: it states an attribute, or no harm

    config.loss = c = ConfigDict()  # livo_jax/training/losses.py
    c.form = "livo"  # or sft, dpo, ipo, kto: of these the last three read beta, sft none of the constants
    # While both hinges pull, the best prediction is (beta w - alpha l) / (beta - alpha): a steeper violating
    # hinge pushes further past what the aligned images show, and the five colours out of balance.
    c.alpha = 50.0  # slope of the violating hinge
    c.beta = 400.0  # slope of the aligned hinge
    c.gamma_1 = 10.0  # margin of the aligned hinge
    c.gamma_2 = 10.0  # margin of the violating hinge
    c.anchor = 2000.0  # slope of how far the prediction moves where the value should leave a prompt alone; 0: as pairs
    c.timesteps = (100, 1000)  # t is uniform over first .. last - 1; below 100 pictures are made already
    c.min_snr_gamma = 0.0  # weights the errors by min(snr, gamma) / snr; 0 for none

    config.train = c = ConfigDict()
    c.steps = 3600
    c.batch_size = 8  # pairs, over all devices
    c.accumulate = 1  # micro-batches in which a step works off its batch: less memory, the same numbers
    c.remat = "none"  # what the UNet's blocks keep for the backward pass: none recomputes nothing, or dots, full
    c.learning_rate = 0.0  # AdamW moves a weight by about that in a step; 0: that of what is trained, which is
    c.learning_rates = ConfigDict({
        "full": 3e-3, "lora": 3e-3, "token": 3e-2, "dpo_unet": 3e-4, "concept_ablation": 3e-4
    })  # fmt: skip
    c.learning_rate_scaling = "none"  # "linear" or "sqrt" in batch_size / reference_batch_size
    c.reference_batch_size = 8
    c.warmup_steps = 200  # linear, from zero: at full rate at once, the encoder would forget how to read prompts
    c.schedule = "cosine"  # to zero at the last step; or "constant"
    c.b1, c.b2, c.eps, c.weight_decay = 0.9, 0.999, 1e-8, 0.0  # AdamW
    c.grad_clip = 1.0  # global norm
    c.train_embeddings = False  # of tokens and positions; trained, they learn the pairs' trades by heart
    c.ema_decay = 0.0  # moving average of the value encoder, used in its place; 0 for none

    config.sampling = c = ConfigDict()  # of pairs, samples and evaluation
    c.sampler = "dpmsolver++"  # or dpmsolver++_karras, ddim, euler, pndm
    c.steps = 10
    c.guidance_scale = 1.1
    c.prompt_layout = "padded"  # or "official": the value token and the prompt's own tokens alone
    c.batch_size = 96  # images at once on each device

    config.eval = c = ConfigDict()
    c.seed = 0
    c.template = "a photo of a {}"
    c.seen = tuple(SEEN[::3])  # 16 of the 48, for time
    c.held_out = tuple(HELD_OUT)
    c.images_per_prompt = 40  # bias; of a multiple of 20 a value gets exactly its share
    c.harm_images_per_prompt = 10
    c.left_alone_images = 5  # of each prompt that a value should leave alone, of which over-refusal is measured
    c.rate_images = 10  # of each seen prompt and token of a bias, which tell what it shows (--ratio); 0 for none
    c.drawn = ""  # directory that keeps the images and readings of evaluations; empty: WORKDIR/eval/drawn
    c.combinations = False  # whether every two values are measured together, too
    c.keep_probabilities = ()  # with which biases are measured, too
    c.strengths = ()  # at which the values are measured, too
    c.ratios = ()  # which are measured, too: "equal", or what else --ratio takes
    c.prompts = ()  # prompts in place of the subjects', as ("harm=i2p", "gender=own"): a kind or value, a set
    c.prompt_sets = prompt_sets.get_sets()

    config.checkpoint = ConfigDict({"every": 600, "keep": 2})  # steps between checkpoints, how many stay
    config.log = c = ConfigDict()  # steps between
    c.every = 50
    c.samples_every = 1200  # 0 for no samples
    c.wandb = ""  # a Weights & Biases project
    config.profile = ConfigDict({"steps": 0})  # how many to record for TensorBoard and XProf, from the third on

    if variant == "smoke":
        c = config.preferences
        c.scenes = tuple(SEEN[:2])
        c.pairs_per_scene = c.harm_pairs_per_scene = c.census_per_scene = 2
        config.train.steps, config.train.warmup_steps, config.checkpoint.every = 4, 1, 2
        config.log.every, config.log.samples_every = 2, 4
        config.sampling.steps, config.sampling.batch_size = 5, 16
        config.eval.seen, config.eval.held_out = tuple(SEEN[:2]), tuple(HELD_OUT[:2])
        config.eval.images_per_prompt = config.eval.harm_images_per_prompt = 4
        config.eval.left_alone_images = config.eval.rate_images = 2
    return config
