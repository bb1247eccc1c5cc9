"""Every field of a config, with its meaning and the paper's value (Wang et al. 2024, section 5.1).

A config is this one with what differs: configs/livo.py, configs/tiny.py and the rest say what, and why. A field that
the paper does not have is off here. --config.SECTION.FIELD=VALUE sets any field on the command line.
"""

import pathlib

from livo_jax.configs import prompt_sets
from ml_collections import ConfigDict

EMBEDDED = pathlib.Path(__file__).resolve().parents[1] / "data_tools" / "shapeworld_model"


def check_variant(name: str, variant: str, known=("smoke",)):
    """Raises ValueError where there is no configs/NAME.py:VARIANT."""
    if variant not in ("", *known):
        there = ", ".join(f"configs/{name}.py:{other}" for other in known)
        raise ValueError(f"configs/{name}.py:{variant}: there is configs/{name}.py and {there}")


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of data order, noise and timesteps
    config.method = "livo"  # the column of the results; baselines: configs/baselines/
    config.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # hub id or diffusers directory
    config.variant = ""  # of the weight files; "fp16": half to fetch
    config.random_weights = False  # the architecture of config.model alone, untrained
    config.loras = ()  # merged into it, as ("FILE", "FILE=0.8"): diffusers' or kohya's .safetensors, with their scales
    config.guidance_distilled = False  # whether it is made for no guidance: sampling.guidance_scale above 1 then warns
    config.quantised = ""  # "int8" or "fp8": its linear layers and convolutions keep weights of 8 bits; "" as they are
    config.dtype = "bfloat16"  # of the frozen models; the value encoder, its optimizer and the errors are float32
    config.principles = ("gender", "race", "nudity", "gore", "zombie")  # names in livo_jax/values/principles.toml
    config.principles_file = ""  # a TOML file of your own, as that one is; empty for it
    config.judge = ""  # a module of livo_jax/judges; empty: train without evaluation
    # Devices: rows of a batch are divided over data and fsdp, weights over fsdp and tensor; -1 takes the rest.
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.cpu_devices = 1  # as so many a CPU counts, at most one a core: a small model on one leaves cores idle
    config.shard_frozen = False  # whether the frozen models are divided as the value encoder is: more traffic

    config.value_encoder = c = ConfigDict()  # livo_jax/value_encoders/
    c.kind = "full"  # a text encoder of its own; "lora": low-rank updates of the model's; "token": soft tokens alone
    c.start = ""  # directory or hub id of one of this kind to start from; empty: the model's text encoder
    c.rank, c.alpha = 8, 8.0  # lora: kernels are W + alpha / rank * A B
    c.targets = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # lora: the layers that are updated
    c.tokens = 4  # token: of each value
    c.states = 1  # full, lora: 1 gives the pooled state as the token, more those that follow too, 0 all of the text
    c.reads_prompt = True  # full, lora: whether the text has the prompt too, or the value alone
    c.pooled = False  # full, lora: whether a value moves the pooled text of XL and 3 too
    c.alone = ()  # full, lora: kinds of values, as ("harm",), whose text has none all the same, as a token never has

    config.judging = c = ConfigDict()  # of the judges; docs/judges.md has what each of them needs
    c.model = ""  # clip, llava, classifier, detector: directory or hub id, as openai/clip-vit-large-patch14. vlm: its
    # name at the endpoint. q16, mhsc: the file that data_tools/convert_judge.py made. nudenet: an .onnx file; empty:
    # the package's
    c.labels = ()  # classifier, detector, nudenet, q16, mhsc: as ("nsfw=nudity", "Man=gender:male"); empty: the
    # judge's own
    c.classes = ()  # detector: what one without classes of its own looks for; empty: COCO's
    c.colours = ""  # detector: a CLIP that tells colours of objects, as model; empty: none
    c.detected_from, c.counted_from = 0.3, 0.9  # detector: scores of an object, and of one that is counted: GenEval's
    c.thresholds = ()  # scores from which a harm is counted too, beside its harmful_from; empty: the judge's own
    c.unspecified = False  # vlm, llava: whether a bias may be answered "unspecified", which is counted
    c.endpoint = ""  # vlm: base URL of an OpenAI-compatible server, as http://localhost:8000/v1; key: OPENAI_API_KEY
    c.cache = ""  # vlm: directory that keeps the answers, so that nothing is asked twice; empty for none
    c.budget = 0  # vlm: questions that a build or an evaluation sends at most; 0 for no limit
    c.subject = False  # whether subjects are read too; traits ("a kind person") cannot be seen

    config.preferences = c = ConfigDict()  # how pairs are built (data_tools/build_preferences.py)
    c.model = ""  # that draws them; empty: config.model
    c.scenes = ()  # of all values; empty: each one's own, the seen words of its sources (livo_jax/data/words.toml)
    # With the subject for each {}: two of them ask for two of the pair's attribute; judges read the first.
    c.templates = ("a photo of a(n) {}", "a portrait of a(n) {}", "a picture of a(n) {}")
    c.pairs_per_scene = 8  # at most, of each bias and scene
    c.harm_pairs_per_scene = 8
    c.candidates_per_pair = 2.0  # images drawn of each side, for the judge to choose from
    c.least_distance = 4  # bits of 64 by which the perceptual hashes of a side's images differ at least; 0 keeps all
    c.images_per_file = 512  # an interrupted build draws again at most so many for each process
    # Files that attacks left, whose prompts of the scenes take turns with a harm's others: eval/attacks_found.json.
    c.attacks = ()
    c.census_per_scene = 8  # neutral images that tell which attribute the model favours

    config.data = c = ConfigDict()
    c.directory = ""  # of the pairs; empty: WORKDIR/preferences, which a judge lets build at the first start
    c.cache = False  # of latents and prompt states beside the pairs, made at the first start; saves the VAE's passes
    c.random_flip = True  # both images of a pair or neither
    c.beside = 0.0  # share of the pairs that train with a second value's token beside their own; not in the paper
    c.attributes = 0.0  # share of a bias's pairs whose value names the attribute to show: what --ratio mixes
    c.anchors = 0.0  # share of the pairs whose prompt the value should leave alone; not in the paper

    config.loss = c = ConfigDict()  # livo_jax/training/losses.py
    c.form = "livo"  # or sft, dpo, ipo, kto: of these the last three read beta, sft none of the constants
    c.alpha = 500.0  # slope of the violating hinge
    c.beta = 1000.0  # slope of the aligned hinge
    c.gamma_1 = 1.0  # margin of the aligned hinge
    c.gamma_2 = 0.5  # margin of the violating hinge
    c.anchor = 0.0  # slope of how far the prediction moves where the value should leave a prompt alone; 0: as pairs
    c.anchor_of_harms = 1.0  # times that, where the value is a harm
    c.timesteps = (0, 1000)  # t is of first .. last - 1
    c.timestep_density = "uniform"  # or "logit_normal", which has most of them about the middle: Stable Diffusion 3's
    c.min_snr_gamma = 0.0  # weights the errors by min(snr, gamma) / snr (Hang et al. 2023: 5); 0 for none

    config.train = c = ConfigDict()
    c.steps = 15_000
    c.batch_size = 8  # pairs, over all devices
    c.accumulate = 1  # micro-batches in which a step works off its batch: less memory, the same numbers
    c.remat = "none"  # what the UNet's blocks keep for the backward pass: none recomputes nothing, or dots, full
    c.learning_rate = 0.0  # AdamW moves a weight by about that in a step; 0: that of what is trained, which is
    c.learning_rates = ConfigDict({
        "full": 1e-6,  # the paper's
        # Not measured on this model. As published for low-rank updates of it (diffusers' DreamBooth LoRA),
        "lora": 1e-4,
        # for Textual Inversion (diffusers' 5e-4 times its batch of 4; here tokens are text states, of size 1),
        "token": 2e-3,
        # and for Diffusion-DPO by low-rank updates (diffusers' research_projects/diffusion_dpo).
        "dpo_unet": 1e-5,
        "concept_ablation": 1.6e-5,  # 2e-6 times its batch of 8
    })  # fmt: skip
    c.learning_rate_scaling = "none"  # "linear" or "sqrt" in batch_size / reference_batch_size
    c.reference_batch_size = 8
    c.warmup_steps = 0  # linear, from zero
    c.schedule = "constant"  # or "cosine", to zero at the last step
    c.b1, c.b2, c.eps, c.weight_decay = 0.9, 0.999, 1e-8, 1e-2  # AdamW
    c.grad_clip = 1.0  # global norm
    c.train_embeddings = True  # of tokens and positions
    c.ema_decay = 0.0  # moving average of the value encoder, used in its place (try 0.999); 0 for none

    config.sampling = c = ConfigDict()  # of pairs, samples and evaluation
    c.sampler = "dpmsolver++"  # or dpmsolver++_karras, ddim, euler, pndm; few steps: euler_ancestral, euler_trailing,
    # ddim_trailing, lcm, tcd, as the model was published
    c.steps = 25
    c.guidance_scale = 7.5  # at most 1: none, for half the UNet evaluations
    c.prompt_layout = "padded"  # or "official": the value token and the prompt's own tokens alone
    c.gated = False  # whether values take effect only where they move the prediction as far as on what they are for
    c.batch_size = 8  # images at once on each device

    config.eval = c = ConfigDict()
    c.seed = 0
    c.template = "a photo of a(n) {}"
    c.seen, c.held_out = (), ()  # subjects that the pairs' scenes show, and those that no value's pairs show
    c.images_per_prompt = 60  # bias; of a multiple of 20 a value gets exactly its share
    c.harm_images_per_prompt = 60
    c.left_alone_images = 5  # of each prompt that a value should leave alone, of which over-refusal is measured
    # Further splits, of the held-out subjects: {split: wordings}. Harmful ones are of each harm; those to be left alone
    # are of each bias where they have an {attribute}, of each harm where they have none.
    c.harmful_wordings, c.left_alone_wordings = ConfigDict(), ConfigDict()
    # Further splits of each bias, of the held-out subjects: {split: {"wording": what else is said of the {subject}, and
    # by the judge's axes what it should read then, as "count": 2}}.
    c.compositions = ConfigDict()
    c.rate_images = 10  # of each seen prompt and token of a bias, which tell what it shows (--ratio); 0 for none
    c.drawn = ""  # directory that keeps the images and readings of evaluations; empty: WORKDIR/eval/drawn
    c.auto = False  # whether a value is measured, too, on those prompts alone that the retriever finds it for
    c.combinations = False  # whether every two values, and all at once, are measured together, too
    c.keep_probabilities = ()  # with which biases are measured, too
    c.strengths = ()  # at which the values are measured, too
    c.ratios = ()  # which are measured, too: "equal", or what else --ratio takes
    # Prompts in place of the subjects', as ("harm=i2p", "gender=own"): a kind or value, a set; or "left_alone=overt", a
    # set that every value should leave alone.
    c.prompts = ()
    c.prompt_sets = prompt_sets.get_sets()

    config.attack = c = ConfigDict()  # --mode=attack: what it spends on each harm; docs/attacks.md
    # Of words, greedy; or projected, continuous (no words, a bound), queries and paraphrases (by images alone).
    c.search = "coordinate"
    c.objective = "noise"  # by gradients: that of the target image, UnlearnDiffAtk's; or prediction, the base's, P4D's
    c.kinds = ("harm",)  # of values that are attacked; "bias" by queries
    c.splits = ("held_out", "seen")  # whose subjects are attacked, in this order
    c.tokens = 3  # words that go before a prompt
    c.steps, c.restarts = 30, 1
    c.noises = 4  # that a step compares by
    c.candidates, c.likeliest = 32, 32  # coordinate: tried in a step, of so many for each place
    c.rate = 0.2  # projected, continuous: how far a step moves a word's embedding, in the mean length of one
    c.queries = 240  # queries: images of each prompt that it may look at
    c.paraphrases = 8  # paraphrases: other wordings of each harmful prompt, of which the worst is measured
    c.endpoint, c.model = "", ""  # paraphrases: base URL of an OpenAI-compatible server, the model's name there
    c.prompts, c.at_once = 16, 16  # neutral prompts that are attacked, and how many together
    c.seed = 0

    config.checkpoint = ConfigDict({"every": 1000, "keep": 2})  # steps between checkpoints, how many stay
    config.log = c = ConfigDict()  # steps between
    c.every = 50
    c.samples_every = 1000  # 0 for no samples
    c.wandb = ""  # a Weights & Biases project
    config.profile = ConfigDict({"steps": 0})  # how many to record for TensorBoard and XProf, from the third on
    lock(config)
    return config


def lock(config: ConfigDict):
    """Makes a misspelt field an error, not a field more, but where the keys are a config's own."""
    config.lock()
    c = config.eval
    for open_to_more in (
        c.prompt_sets, c.harmful_wordings, c.left_alone_wordings, c.compositions, config.train.learning_rates,
    ):  # fmt: skip
        open_to_more.unlock()
