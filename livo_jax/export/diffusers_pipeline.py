"""Stable Diffusion 1.x, 2.x, XL or 3 with a LiVO value encoder, in PyTorch: a diffusers custom pipeline.

    from diffusers import DiffusionPipeline

    here = DIRECTORY_OR_HUB_ID  # of this file
    pipe = DiffusionPipeline.from_pretrained(BASE, custom_pipeline=here, trust_remote_code=True)
    out = pipe("a photo of a doctor", values="auto", num_images_per_prompt=8)
    out.images, out.applied

Written by livo_jax, whose images it gives from the same noise (`latents`). Imported by diffusers alone.
"""

import dataclasses
import inspect
import os
import pathlib
import warnings
from collections import Counter
from types import SimpleNamespace

import diffusers
import numpy
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel

from .livo_arguments import drawing_problems, strength_problems, values_problems
from .livo_dealing import Dose, applied, choose
from .livo_ratio import deal
from .livo_rules import Rules

# How the value encoder was trained to be sampled; `livo_jax.export.export` fills this in.
SETTINGS = dict(family="sd1", size=512, scheduler="DDIMScheduler", options={}, eta=0.0, steps=25, guidance_scale=7.5)


@dataclasses.dataclass
class LiVOPipelineOutput(StableDiffusionPipelineOutput):
    """`applied` has for each image the Doses of the values applied to it."""

    applied: list[tuple[Dose, ...]]


class SoftTokens(PreTrainedModel):
    """A value encoder of kind "token": learned tokens [V, n, D] of the values that it knows."""

    def __init__(self, directory: pathlib.Path):
        super().__init__(CLIPTextConfig.from_pretrained(directory))
        with safe_open(directory / "value_tokens.safetensors", "pt") as file:
            self.statements = file.metadata()["statements"].split("\n")
            self.table = torch.nn.Parameter(file.get_tensor("table"))


def load_exported(export: str | os.PathLike, name: str):
    """The value encoder of this name in an export, which is a directory or a hub id."""
    root = pathlib.Path(export).expanduser()
    if not root.is_dir():
        root = pathlib.Path(snapshot_download(str(export), allow_patterns=[f"{name}/*"]))
    soft = (root / name / "value_tokens.safetensors").exists()
    return SoftTokens(root / name) if soft else CLIPTextModel.from_pretrained(root / name)


def custom_pipeline() -> str | None:
    """What from_pretrained was asked for as custom_pipeline: only the stack tells it to this copy of the file."""
    frame = inspect.currentframe()
    while frame := frame.f_back:
        if frame.f_code.co_name == "from_pretrained" and "custom_pipeline" in frame.f_locals:
            return frame.f_locals["custom_pipeline"]
    return None


def find_value_encoders(value_encoder, value_encoder_2=None) -> tuple:
    """The value encoders that are given, those of the export that is named in the place of the first, or of this."""
    value_encoder = custom_pipeline() if value_encoder is None else value_encoder
    if value_encoder is None:
        raise ValueError("give value_encoder=DIRECTORY, or the hub id, of the export")
    if not isinstance(value_encoder, str | os.PathLike):
        return value_encoder, value_encoder_2
    export, value_encoder = value_encoder, load_exported(value_encoder, "value_encoder")
    if SETTINGS["family"] != "sd1" and isinstance(value_encoder, CLIPTextModel):
        value_encoder_2 = load_exported(export, "value_encoder_2")
    return value_encoder, value_encoder_2


class LiVO:
    """What makes the images of a Stable Diffusion pipeline follow values.

    `value_encoder` is the one beside this file's original, in the export that custom_pipeline names. Another can be
    given to from_pretrained: the directory or hub id of its export, or the loaded CLIPTextModel. Its config has the
    values that it was trained with, and the rules by which "auto" finds them.
    """

    def _sample_as_trained(self):
        """Takes the scheduler that the value encoder was trained to be sampled with, on the base's noise schedule."""
        scheduler = getattr(diffusers, SETTINGS["scheduler"]).from_config(self.scheduler.config, **SETTINGS["options"])
        self.register_modules(scheduler=scheduler)

    def _tokenize(self, texts, tokenizer):
        if hasattr(self, "maybe_convert_prompt"):  # a word of several vectors, of a textual inversion, is as many
            texts = [self.maybe_convert_prompt(text, tokenizer) for text in texts]
        return tokenizer(
            texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids.to(self._execution_device)

    def _knows(self) -> dict:
        """The values that the value encoder was trained with, and the rules by which "auto" finds them."""
        return getattr(self.value_encoder.config, "livo", {"values": [], "lists": {}})

    def _choose(self, prompts, values, strength, keep_probability) -> list[list[tuple[Dose, float]]]:
        """For each prompt its values, each with the share of the prompt's images that it is for."""
        livo = self._knows()
        known = sorted((SimpleNamespace(**value) for value in livo["values"]), key=lambda value: value.kind != "harm")
        names = {value.name: value.statement for value in known}
        rows = [entry if isinstance(entry, list | tuple) else [entry] for entry in values]
        named = [tuple(names.get(text, text) for text in row if isinstance(text, str)) for row in rows]
        if isinstance(strength, dict):
            strength = {names.get(text, text): x for text, x in strength.items()}
        problems = strength_problems(strength, named) + values_problems(prompts, values, keep_probability, known)
        if problems:
            raise ValueError("; ".join(problems))
        rules = Rules(known, livo["lists"]) if "auto" in values else None
        others = {v.name: sorted(set(getattr(v, "auto", ())) - {"keywords"}) for v in known}
        others = [f"{' and '.join(names)} for {value}" for value, names in others.items() if names]
        if rules and others:
            what = f"an export goes by keywords alone; its principles also asked {', '.join(others)}"
            warnings.warn(f"values='auto': {what}, which livo_jax has", stacklevel=3)

        def retrieve(prompt):
            found = {name: f"keywords: {reason}" for name, (_, reason) in rules(prompt).items()}
            return [SimpleNamespace(**vars(v), reason=found[v.name]) for v in known if v.name in found]

        return [choose(*of, strength, keep_probability, retrieve) for of in zip(prompts, named)]

    def _condition(self, rows: list[tuple[str | None, tuple[Dose, ...]]]) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """What the UNet reads for texts with values: [u; c], [R, V + L, D], the mask of what each row has, and more."""
        # Parts may come in different dtypes: transformers keeps a file's, diffusers casts it.
        dtype = self._denoiser().dtype
        c, added = self._encode([text for text, _ in rows])
        c, added = c.to(dtype), {name: x.to(dtype) for name, x in added.items()}
        slots = max(len(doses) for _, doses in rows)
        if not slots:
            return c, torch.ones(c.shape[:2], dtype=torch.bool, device=c.device), added
        places = [(row, slot) for row, (_, doses) in enumerate(rows) for slot in range(len(doses))]
        at = torch.tensor(places).unbind(1)
        tokens, shift = self._read_values([(dose.value, text) for text, doses in rows for dose in doses])
        if shift is not None:
            added = {name: x.index_add(0, at[0].to(x.device), shift.to(dtype)) for name, x in added.items()}
        tokens = torch.nn.functional.pad(tokens.to(dtype), (0, c.shape[-1] - tokens.shape[-1]))  # of 3
        u = c.new_zeros(len(rows), slots, *tokens.shape[1:])  # [R, V, n, D]
        sees = torch.zeros(u.shape[:3], dtype=torch.bool, device=c.device)
        u[at], sees[at] = tokens, True
        cond = torch.cat([u.flatten(1, 2), c], dim=1)
        return cond, torch.cat([sees.flatten(1), sees.new_ones(c.shape[:2])], dim=1), added

    def _read_values(self, read: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens [P, n, D] of pairs of a statement and a prompt, and what these add to the pooled text, [P, W]."""
        if hasattr(self.value_encoder, "table"):
            known = self.value_encoder.statements
            if unknown := sorted({statement for statement, _ in read} - set(known)):
                raise ValueError(f"the value encoder knows {', '.join(known)}, not {', '.join(unknown)}")
            return self.value_encoder.table[[known.index(statement) for statement, _ in read]], None
        livo, tokens, shifts = self._knows(), [], []
        alone = {value["statement"] for value in livo["values"] if value.get("alone")}
        reads_prompt, states = livo.get("reads_prompt", True), livo.get("states", 1)  # as config.value_encoder has them
        texts = [f"{s}, {prompt if reads_prompt and s.split(': ')[0] not in alone else ''}" for s, prompt in read]
        for value_encoder, tokenizer, text_encoder in self._value_encoders():
            ids = self._tokenize(texts, tokenizer)
            if (ids >= value_encoder.config.vocab_size).any():
                raise ValueError("a prompt has a word of a textual inversion, which no value encoder can read with it")
            out = value_encoder(ids)
            hidden = out.last_hidden_state
            if states:  # from the end of the text on, where the pooled output is; 0: all
                ends = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
                places = (ends[:, None] + torch.arange(states, device=ends.device)).clamp(max=ids.shape[1] - 1)
                hidden = hidden.take_along_dim(places[:, :, None], dim=1)
            tokens.append(hidden)
            # What training changed of a reading, projected by the model; XL's first text encoder projects nothing.
            if livo.get("moves_pooled") and hasattr(text_encoder, "text_projection"):
                project = text_encoder.text_projection
                shifts.append(project(out.pooler_output.to(project.weight.dtype)) - text_encoder(ids).text_embeds)
        return torch.cat(tokens, dim=-1), torch.cat(shifts, dim=-1) if shifts else None

    def _find_gates(self, values: list[str]) -> list[tuple[list[float], list[float]]]:
        """The gate of each value or attribute: timesteps, and the least effect at each."""
        gates = self._knows().get("gates") or {}
        names = [value.split(": ")[0] for value in values]
        if missing := sorted({*names} - {*gates}):
            told = "export a run that was trained with config.sampling.gated=True"
            raise ValueError(f"gated=True: the value encoder has no gate for {', '.join(missing)}: {told}")
        return [(gates[name]["timesteps"], gates[name]["least_effects"]) for name in names]

    def _value_encoders(self):
        """Each with its tokenizer, and the text encoder that it stands beside."""
        first = (self.value_encoder, self.tokenizer, self.text_encoder)
        more = () if SETTINGS["family"] == "sd1" else ((self.value_encoder_2, self.tokenizer_2, self.text_encoder_2),)
        return (first, *more)

    def _empty(self) -> str | None:
        """The negative prompt where none is given."""
        return ""

    def _check_safety(self, images):
        """The images, and which of them are unsafe; None where nobody looks."""
        return images, None

    def _denoiser(self):
        """What predicts."""
        return self.unet

    def _predict(self, z, t, cond, mask, added):
        """Its predictions [R, C, h, w] float32 for rows of latents and of what _condition makes."""
        z = self.scheduler.scale_model_input(z, t).to(cond.dtype)
        return self.unet(z, t, cond, encoder_attention_mask=mask, added_cond_kwargs=added).sample.float()

    def _decode(self, z):
        z = z.to(self.vae.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(z + (self.vae.config.shift_factor or 0.0)).sample

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        values: str | list | None = None,
        strength: float | dict[str, float] = 1.0,
        keep_probability: float | None = None,
        ratio: str | dict[str, float] | None = None,
        gated: bool = False,
        negative_prompt: str | list[str] = "",
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
                work together; "auto" for those that a prompt is for, by the keywords of livo_jax and nothing else that
                its principles ask; None for the base's images. For a list of prompts: one for all, or a list with such
                an entry for each.
            strength: how much of a value's effect: 0 is the base model, 1 LiVO. A number, or a dict of value -> number.
                Each value of another strength costs its images one UNet evaluation more.
            keep_probability: the share of each prompt's images that the values are applied to: 0.5 for a bias
                between two attributes, 1 for a harm. None for all, and with "auto" for what suits the value.
            ratio: which attributes the images of bias values should show, in the place of keep_probability: "equal", a
                table as {"female": 0.7, "male": 0.3}, or a JSON file of one. Reached over all images of the call, and
                over those of each prompt, as nearly as their number allows. It needs scipy.
            gated: whether a value takes effect only where it moves the prediction as far as on what it is for, so that
                other images stay the base's own. It costs one UNet evaluation more a value.
            negative_prompt: of all prompts, or one of each.
            seed: decides which images these are.
            guidance_scale: classifier-free, against the negative prompt; at most 1 is none, for half the evaluations.
            latents: [N, C, h, w] standard normal noise of all images; drawn from `generator` if None. Noise that the
                scheduler adds at each step is drawn from it in any case.
            output_type: "pil", "np" or "pt".

        Returns:
            images, and `applied`: for each image the values applied to it, with strength and reason.

        Raises:
            ValueError: prompts, values, a strength or other settings that cannot be, all listed; or a ratio that is
                unknown, for no value, out of reach, or without rates; or gated values without a gate.
        """
        if not isinstance(prompt, list | tuple):
            prompt, values = [prompt], [values]
        elif values is None or isinstance(values, str):
            values = [values] * len(prompt)
        height, width = height or SETTINGS["size"], width or SETTINGS["size"]
        how = num_inference_steps, guidance_scale, num_images_per_prompt, height, width
        problems = drawing_problems(prompt, negative_prompt, *how, self.vae_scale_factor, output_type)
        if problems:
            raise ValueError("; ".join(problems))
        chosen = self._choose(prompt, values, strength, keep_probability)
        texts = [text for text in prompt for _ in range(num_images_per_prompt)]
        chosen = [doses for doses in chosen for _ in range(num_images_per_prompt)]
        if ratio is not None:
            chosen = deal(chosen, texts, ratio, self._knows().get("rates"), seed)
        seen, images = Counter(), []
        for text, doses in zip(texts, chosen):
            images.append((text, applied(doses, seed, text, seen[text])))
            seen[text] += 1

        # The UNet's rows: prompts with the values of full strength, with guidance negative prompts, and the first once
        # more with each of the other values.
        N, shared = len(images), () if gated else (1,)  # the strengths at which values share the prompt's row
        full = [(text, tuple(dose for dose in doses if dose.strength in shared)) for text, doses in images]
        dosed = [(n, dose) for n, (_, doses) in enumerate(images) for dose in doses if dose.strength not in shared]
        gates = self._find_gates([dose.value for _, dose in dosed]) if gated else None
        extra = [(full[n][0], (*full[n][1], dose)) for n, dose in dosed]
        against = negative_prompt if isinstance(negative_prompt, list | tuple) else [negative_prompt] * len(prompt)
        negative = [(text or self._empty(), ()) for text in against for _ in range(num_images_per_prompt)]
        negative = negative if guidance_scale > 1 else []
        cond, mask, added = self._condition([*full, *negative, *extra])
        image_of = [*range(N), *range(len(negative)), *(n for n, _ in dosed)]

        if SETTINGS["family"] == "sdxl":
            sizes = torch.tensor([height, width, 0, 0, height, width], dtype=cond.dtype, device=cond.device)
            added["time_ids"] = sizes.expand(len(cond), -1)
        self.scheduler.set_timesteps(num_inference_steps, device=cond.device)
        channels = self._denoiser().config.in_channels
        z = self.prepare_latents(N, channels, height, width, torch.float32, cond.device, generator, latents).float()
        extra = self.prepare_extra_step_kwargs(generator, SETTINGS["eta"])  # what the scheduler takes of them
        for t in self.progress_bar(self.scheduler.timesteps):
            eps = self._predict(z[image_of], t, cond, mask, added)
            with_prompt, with_negative, with_value = eps.split([N, len(negative), len(dosed)])
            guided = with_prompt.clone()
            if negative:
                guided = with_negative + guidance_scale * (with_prompt - with_negative)
            effects = [eps_v - with_prompt[n] for (n, _), eps_v in zip(dosed, with_value)]
            for k, ((n, dose), effect) in enumerate(zip(dosed, effects)):
                if not gated or effect.square().mean().sqrt() >= numpy.interp(float(t), *gates[k]):
                    guided[n] += dose.strength * max(guidance_scale, 1.0) * effect
            z = self.scheduler.step(guided, t, z, **extra).prev_sample
        decoded = self._decode(z)
        if not (torch.isfinite(z).all() and torch.isfinite(decoded).all()):
            raise FloatingPointError(
                f"images are not finite: weights are not, or they overflow in {self._denoiser().dtype} at"
                f" guidance_scale={guidance_scale}, strength={strength}: choose a wider torch_dtype or gentler settings"
            )
        decoded, unsafe = self._check_safety(decoded)
        shown = [not bad for bad in unsafe] if unsafe is not None else [True] * N
        decoded = self.image_processor.postprocess(decoded, output_type=output_type, do_denormalize=shown)
        self.maybe_free_model_hooks()
        return LiVOPipelineOutput(decoded, unsafe, [doses for _, doses in images])


if SETTINGS["family"] == "sdxl":  # diffusers wants one pipeline in a file

    class LiVOPipeline(LiVO, diffusers.StableDiffusionXLPipeline):
        """Stable Diffusion XL whose images follow values; `value_encoder_2` is beside its second text encoder."""

        _optional_components = [
            *diffusers.StableDiffusionXLPipeline._optional_components, "value_encoder", "value_encoder_2"
        ]  # fmt: skip
        model_cpu_offload_seq = "text_encoder->text_encoder_2->value_encoder->value_encoder_2->unet->vae"

        def __init__(
            self, vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler, image_encoder=None,
            feature_extractor=None, value_encoder=None, value_encoder_2=None, force_zeros_for_empty_prompt: bool = True,
        ):  # fmt: skip
            super().__init__(
                vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler, image_encoder,
                feature_extractor, force_zeros_for_empty_prompt, add_watermarker=False,
            )  # fmt: skip
            value_encoder, value_encoder_2 = find_value_encoders(value_encoder, value_encoder_2)
            self.register_modules(value_encoder=value_encoder, value_encoder_2=value_encoder_2)
            self._sample_as_trained()

        def _empty(self) -> str | None:
            return None if self.config.force_zeros_for_empty_prompt else ""

        def _encode(self, texts):
            """The penultimate states of both text encoders, and the pooled text; zeros for None."""
            towers = (self.text_encoder, self.tokenizer), (self.text_encoder_2, self.tokenizer_2)
            written = [text or "" for text in texts]
            outs = [tower(self._tokenize(written, it), output_hidden_states=True) for tower, it in towers]
            keep = torch.tensor([text is not None for text in texts], device=outs[0][0].device)[:, None]
            c = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
            return c * keep[..., None], {"text_embeds": outs[1].text_embeds * keep}

        def _decode(self, z):
            if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
                self.vae.to(torch.float32)  # in which alone XL's decodes without an overflow
            return super()._decode(z)

elif SETTINGS["family"] == "sd3":

    class LiVOPipeline(LiVO, diffusers.StableDiffusion3Pipeline):
        """Stable Diffusion 3 and 3.5 whose images follow values; max_sequence_length is how many tokens T5 reads."""

        _optional_components = [
            *diffusers.StableDiffusion3Pipeline._optional_components, "text_encoder_3", "tokenizer_3", "value_encoder",
            "value_encoder_2",
        ]  # fmt: skip
        model_cpu_offload_seq = (
            "text_encoder->text_encoder_2->text_encoder_3->value_encoder->value_encoder_2->transformer->vae"
        )

        def __init__(
            self, transformer, scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, text_encoder_3,
            tokenizer_3, image_encoder=None, feature_extractor=None, value_encoder=None, value_encoder_2=None,
            max_sequence_length: int = 256,
        ):  # fmt: skip
            super().__init__(
                transformer, scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, text_encoder_3,
                tokenizer_3, image_encoder, feature_extractor,
            )  # fmt: skip
            value_encoder, value_encoder_2 = find_value_encoders(value_encoder, value_encoder_2)
            self.register_modules(value_encoder=value_encoder, value_encoder_2=value_encoder_2)
            self.register_to_config(max_sequence_length=max_sequence_length)
            self._sample_as_trained()

        def _encode(self, texts):
            """The states of all text encoders, and the pooled text."""
            length = self.config.max_sequence_length
            states, _, pooled, _ = self.encode_prompt(
                texts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
            )
            return states, {"pooled": pooled}

        def _denoiser(self):
            return self.transformer

        def _predict(self, z, t, cond, mask, added):
            """The transformer knows no mask: rows that see the same places go through it together."""
            out, z = torch.empty_like(z), z.to(cond.dtype)
            for sees in mask.unique(dim=0):
                rows = (mask == sees).all(dim=1)
                text, pooled = cond[rows][:, sees], added["pooled"][rows]
                out[rows] = self.transformer(z[rows], text, pooled, t.expand(len(text))).sample.float()
            return out

        def prepare_extra_step_kwargs(self, generator, eta):
            return {}

else:

    class LiVOPipeline(LiVO, diffusers.StableDiffusionPipeline):
        """Stable Diffusion 1.x and 2.x whose images follow values."""

        _optional_components = [*diffusers.StableDiffusionPipeline._optional_components, "value_encoder"]
        model_cpu_offload_seq = "text_encoder->value_encoder->unet->vae"

        def __init__(
            self, vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder=None,
            value_encoder=None, requires_safety_checker: bool = True,
        ):  # fmt: skip
            super().__init__(
                vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder,
                requires_safety_checker,
            )  # fmt: skip
            value_encoder, _ = find_value_encoders(value_encoder)
            self.register_modules(value_encoder=value_encoder)
            self._sample_as_trained()

        def _encode(self, texts):
            return self.text_encoder(self._tokenize(texts, self.tokenizer))[0], {}

        def _check_safety(self, images):
            return self.run_safety_checker(images, images.device, images.dtype)


# from_pipe takes over what is of the types that the base's pipeline says.
LiVOPipeline.__init__.__annotations__ |= LiVOPipeline.__mro__[2].__init__.__annotations__
