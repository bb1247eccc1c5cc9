"""Stable Diffusion with a LiVO value encoder, in PyTorch: a diffusers custom pipeline.

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(BASE, custom_pipeline=DIRECTORY, trust_remote_code=True)
    out = pipe("a photo of a doctor", values="auto", num_images_per_prompt=8)
    out.images, out.applied

Written by livo_jax, whose images it gives from the same noise (`latents`). Imported by diffusers alone.
"""

import dataclasses
import math
import numbers
import pathlib
import zlib
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

import diffusers
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel

from .livo_ratio import deal
from .livo_rules import Rules

# How the value encoder was trained to be sampled; `livo_jax.export` fills this in.
SETTINGS = dict(directory=".", scheduler="DPMSolverMultistepScheduler", options={}, steps=25, guidance_scale=7.5)


class Dose(NamedTuple):
    """A value that is applied to an image."""

    value: str  # the statement that the value encoder reads
    strength: float  # 1 is LiVO; below and past it the effect is scaled
    reason: str  # why it was chosen, for values="auto"


@dataclasses.dataclass
class LiVOPipelineOutput(StableDiffusionPipelineOutput):
    """`applied` has for each image the Doses of the values applied to it."""

    applied: list[tuple[Dose, ...]]


def applies(keep_probability: float, seed: int, value: str, prompt: str, index: int) -> bool:
    """Whether image number `index` of a prompt gets the value: an even share of them, from a random start."""
    start = zlib.crc32(f"{seed}, {value}, {prompt}".encode()) / 2**32
    return math.floor(start + keep_probability * (index + 1)) > math.floor(start + keep_probability * index)


def faults(prompts, values, strength, keep_probability, known) -> list[str]:
    """What is wrong with the arguments of a call; `values` has an entry for each prompt."""
    number = lambda x: isinstance(x, numbers.Real) and math.isfinite(x)
    problems = [f"prompt {prompt!r} is no text" for prompt in prompts if not isinstance(prompt, str)]
    if len(values) != len(prompts) or not prompts:
        problems.append(
            f"{len(values)} values for {len(prompts)} prompts: give one for all, or a list with an entry for each"
            " prompt, which is None, a value or a list of values"
        )
    for entry in values:
        texts = entry if isinstance(entry, list | tuple) else [] if entry is None else [entry]
        problems += [f"value {text!r} is no text" for text in texts if not (isinstance(text, str) and text)]
        if entry != "auto" and "auto" in texts:
            problems.append(f"values={entry!r}: 'auto' stands alone, outside of lists")
    if "auto" in values and not (known and all(value.keywords for value in known)):
        problems.append(
            "values='auto' needs values with keywords in the value encoder's config, as livo_jax exports it"
        )
    strengths = strength if isinstance(strength, dict) else {"all values": strength}
    problems += [f"strength={x!r} of {text} is no number" for text, x in strengths.items() if not number(x)]
    if not (keep_probability is None or number(keep_probability) and 0 <= keep_probability <= 1):
        problems.append(f"keep_probability={keep_probability!r} is not 0 to 1")
    return problems


class SoftTokens(PreTrainedModel):
    """A value encoder of kind "token": learned tokens [V, n, D] of the values that it knows."""

    def __init__(self, directory: pathlib.Path):
        super().__init__(CLIPTextConfig.from_pretrained(directory))
        with safe_open(directory / "value_tokens.safetensors", "pt") as file:
            self.statements = file.metadata()["statements"].split("\n")
            self.table = torch.nn.Parameter(file.get_tensor("table"))


class LiVOPipeline(diffusers.StableDiffusionPipeline):
    """Stable Diffusion 1.x and 2.x whose images follow values.

    `value_encoder` is the CLIPTextModel beside this file's original; give it where that was moved:
    from_pretrained(..., value_encoder=CLIPTextModel.from_pretrained(...)). Its config has the values that it was
    trained with, and the rules by which "auto" finds them.
    """

    _optional_components = [*diffusers.StableDiffusionPipeline._optional_components, "value_encoder"]
    model_cpu_offload_seq = "text_encoder->value_encoder->unet->vae"

    def __init__(
        self, vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder=None,
        value_encoder=None, requires_safety_checker: bool = True,
    ):  # fmt: skip
        published = dict(scheduler.config)  # before the superclass corrects what it thinks outdated
        super().__init__(
            vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder,
            requires_safety_checker,
        )  # fmt: skip
        if value_encoder is None:
            directory = pathlib.Path(SETTINGS["directory"], "value_encoder")
            soft = (directory / "value_tokens.safetensors").exists()
            value_encoder = SoftTokens(directory) if soft else CLIPTextModel.from_pretrained(directory)
        scheduler = getattr(diffusers, SETTINGS["scheduler"]).from_config(published, **SETTINGS["options"])
        self.register_modules(scheduler=scheduler, value_encoder=value_encoder)

    def _tokenize(self, texts):
        return self.tokenizer(
            texts, padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        ).input_ids.to(self._execution_device)  # fmt: skip

    def _choose(self, prompts, values, strength, keep_probability) -> list[list[tuple[Dose, float]]]:
        """For each prompt its values, each with the share of the prompt's images that it is for."""
        livo = getattr(self.value_encoder.config, "livo", {"values": [], "lists": {}})
        known = sorted((SimpleNamespace(**value) for value in livo["values"]), key=lambda value: value.kind != "harm")
        if problems := faults(prompts, values, strength, keep_probability, known):
            raise ValueError("; ".join(problems))
        statements = {value.name: value.statement for value in known}
        named = lambda text: statements.get(text, text)
        others = 1.0 if isinstance(strength, dict) else strength
        strengths = {named(text): x for text, x in strength.items()} if isinstance(strength, dict) else {}
        rules = Rules(known, livo["lists"]) if "auto" in values else None
        override = lambda share: share if keep_probability is None else keep_probability
        chosen = []
        for prompt, entry in zip(prompts, values):
            if entry == "auto":
                found = {name: f"keywords: {reason}" for name, (_, reason) in rules(prompt).items()}
                rows = [(v.statement, v.keep_probability, found[v.name]) for v in known if v.name in found]
            else:
                rows = [(named(text), 1.0, "") for text in ([entry] if isinstance(entry, str) else entry or ())]
            doses = [(Dose(text, float(strengths.get(text, others)), reason), share) for text, share, reason in rows]
            chosen.append([(dose, override(share)) for dose, share in doses if dose.strength])
        return chosen

    def _condition(self, rows: list[tuple[str, tuple[Dose, ...]]]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the UNet reads for texts with values: [u; c], [R, V + L, D], and the mask of what each row has."""
        dtype = self.unet.dtype  # parts may come in different ones: transformers keeps a file's, diffusers casts it
        c = self.text_encoder(self._tokenize([text for text, _ in rows]))[0].to(dtype)
        slots = max(len(doses) for _, doses in rows)
        if not slots:
            return c, torch.ones(c.shape[:2], dtype=torch.bool, device=c.device)
        places = [(row, slot) for row, (_, doses) in enumerate(rows) for slot in range(len(doses))]
        at = torch.tensor(places).unbind(1)
        tokens = self._value_tokens([(dose.value, text) for text, doses in rows for dose in doses]).to(dtype)
        u = c.new_zeros(len(rows), slots, *tokens.shape[1:])  # [R, V, n, D]
        sees = torch.zeros(u.shape[:3], dtype=torch.bool, device=c.device)
        u[at], sees[at] = tokens, True
        cond = torch.cat([u.flatten(1, 2), c], dim=1)
        return cond, torch.cat([sees.flatten(1), sees.new_ones(c.shape[:2])], dim=1)

    def _value_tokens(self, read: list[tuple[str, str]]) -> torch.Tensor:
        """The tokens [P, n, D] of pairs of a statement and a prompt."""
        if not hasattr(self.value_encoder, "table"):
            ids = self._tokenize([f"{statement}, {prompt}" for statement, prompt in read])
            return self.value_encoder(ids).pooler_output[:, None]
        known = self.value_encoder.statements
        if unknown := sorted({statement for statement, _ in read} - set(known)):
            raise ValueError(f"the value encoder knows {', '.join(known)}, not {', '.join(unknown)}")
        return self.value_encoder.table[[known.index(statement) for statement, _ in read]]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        values: str | list | None = None,
        strength: float | dict[str, float] = 1.0,
        keep_probability: float | None = None,
        ratio: str | dict[str, float] | None = None,
        negative_prompt: str = "",
        num_images_per_prompt: int = 1,
        num_inference_steps: int = SETTINGS["steps"],
        guidance_scale: float = SETTINGS["guidance_scale"],
        seed: int = 0,
        generator: torch.Generator | None = None,
        latents: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
    ) -> LiVOPipelineOutput:
        """Images of prompts, all images of the first, then all of the second, ...

        Args:
            values: what the images are to follow, by name or statement ("gender equality"), one or a list, whose values
                work together; "auto" for those that a prompt is for, by the rules of livo_jax; None for the base's
                images. For a list of prompts: one for all, or a list with such an entry for each.
            strength: how much of a value's effect: 0 is the base model, 1 LiVO. A number, or a dict of value -> number.
                Each value of another strength costs its images one UNet evaluation more.
            keep_probability: the share of each prompt's images that the values are applied to: 0.5 for a bias
                between two attributes, 1 for a harm. None for all, and with "auto" for what suits the value.
            ratio: which attributes the images of bias values should show, in the place of keep_probability: "equal", a
                table as {"female": 0.7, "male": 0.3}, or a JSON file of one. Reached over all images of the call, and
                over those of each prompt, as nearly as their number allows. It needs scipy.
            seed: decides which images these are.
            latents: [N, C, h, w] standard normal noise of all images; drawn from `generator` if None.
            output_type: "pil", "np" or "pt".

        Returns:
            images, and `applied`: for each image the values applied to it, with strength and reason.

        Raises:
            ValueError: prompts or values that are no texts or not equally many, "auto" with a value encoder that has no
                rules, a strength that is no number, a keep_probability that is not 0 to 1; all are listed. Or a ratio
                that is unknown, for no value, out of reach, or without rates.
        """
        if isinstance(prompt, str):
            prompt, values = [prompt], [values]
        elif values is None or isinstance(values, str):
            values = [values] * len(prompt)
        chosen = self._choose(prompt, values, strength, keep_probability)
        each = lambda rows: [row for row in rows for _ in range(num_images_per_prompt)]
        texts, chosen = each(prompt), each(chosen)
        if ratio is not None:
            chosen = deal(chosen, texts, ratio, getattr(self.value_encoder.config, "livo", {}).get("rates"), seed)
        seen, images = Counter(), []
        for text, doses in zip(texts, chosen):
            kept = (dose for dose, share in doses if applies(share, seed, dose.value, text, seen[text]))
            images.append((text, tuple(kept)))
            seen[text] += 1

        # The UNet's rows: prompts with the values of full strength, negative prompts, and the first once more with each
        # of the other values.
        N = len(images)
        full = [(text, tuple(dose for dose in doses if dose.strength == 1)) for text, doses in images]
        dosed = [(n, dose) for n, (_, doses) in enumerate(images) for dose in doses if dose.strength != 1]
        extra = [(full[n][0], (*full[n][1], dose)) for n, dose in dosed]
        cond, mask = self._condition([*full, *[(negative_prompt, ())] * N, *extra])
        image_of = [*range(N), *range(N), *(n for n, _ in dosed)]

        height = height or self.unet.config.sample_size * self.vae_scale_factor
        width = width or self.unet.config.sample_size * self.vae_scale_factor
        self.scheduler.set_timesteps(num_inference_steps, device=cond.device)
        channels = self.unet.config.in_channels
        z = self.prepare_latents(N, channels, height, width, torch.float32, cond.device, generator, latents).float()
        for t in self.progress_bar(self.scheduler.timesteps):
            model_input = self.scheduler.scale_model_input(z, t)[image_of].to(cond.dtype)
            eps = self.unet(model_input, t, encoder_hidden_states=cond, encoder_attention_mask=mask).sample.float()
            with_prompt, with_negative, with_value = eps.split([N, N, len(dosed)])
            guided = with_negative + guidance_scale * (with_prompt - with_negative)
            for (n, dose), eps_v in zip(dosed, with_value):
                guided[n] += dose.strength * guidance_scale * (eps_v - with_prompt[n])
            z = self.scheduler.step(guided, t, z).prev_sample
        decoded = self.vae.decode(z.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        decoded, unsafe = self.run_safety_checker(decoded, cond.device, decoded.dtype)
        shown = [not bad for bad in unsafe] if unsafe is not None else [True] * N
        decoded = self.image_processor.postprocess(decoded, output_type=output_type, do_denormalize=shown)
        self.maybe_free_model_hooks()
        return LiVOPipelineOutput(decoded, unsafe, [doses for _, doses in images])
