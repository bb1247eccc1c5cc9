"""Stable Diffusion with a LiVO value encoder, in PyTorch: a diffusers custom pipeline.

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(BASE, custom_pipeline=DIRECTORY, trust_remote_code=True)
    images = pipe("a photo of a doctor", value="gender equality", keep_probability=0.5, num_images_per_prompt=8).images

Written by livo_jax, whose images it gives from the same noise (`latents`). Imported by diffusers alone.
"""

import math
import zlib

import diffusers
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from transformers import CLIPTextModel

# How the value encoder was trained to be sampled; `livo_jax.export` fills this in.
SETTINGS = dict(directory=".", scheduler="DPMSolverMultistepScheduler", options={}, steps=25, guidance_scale=7.5)


def applies(keep_probability: float, seed: int, value: str, prompt: str, index: int) -> bool:
    """Whether image number `index` of a prompt gets the value: an even share of them, from a random start."""
    start = zlib.crc32(f"{seed}, {value}, {prompt}".encode()) / 2**32
    return math.floor(start + keep_probability * (index + 1)) > math.floor(start + keep_probability * index)


class LiVOPipeline(diffusers.StableDiffusionPipeline):
    """Stable Diffusion 1.x and 2.x whose images follow a value.

    `value_encoder` is the CLIPTextModel beside this file's original; give it where that was moved:
    from_pretrained(..., value_encoder=CLIPTextModel.from_pretrained(...)).
    """

    _optional_components = [*diffusers.StableDiffusionPipeline._optional_components, "value_encoder"]

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
            value_encoder = CLIPTextModel.from_pretrained(SETTINGS["directory"], subfolder="value_encoder")
        scheduler = getattr(diffusers, SETTINGS["scheduler"]).from_config(published, **SETTINGS["options"])
        self.register_modules(scheduler=scheduler, value_encoder=value_encoder)

    def _tokenize(self, texts):
        return self.tokenizer(
            texts, padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        ).input_ids.to(self._execution_device)  # fmt: skip

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        value: str | None = None,
        keep_probability: float = 1.0,
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
    ) -> StableDiffusionPipelineOutput:
        """Images of prompts, all images of the first, then all of the second, ...

        Args:
            value: what the images are to follow, e.g. "gender equality"; None for the base's images.
            keep_probability: the share of each prompt's images that the value is applied to: 0.5 for a bias
                between two attributes, 1 for a harm.
            seed: decides which images these are.
            latents: [N, C, h, w] standard normal noise of all images; drawn from `generator` if None.
            output_type: "pil", "np" or "pt".
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        texts = [text for text in prompts for _ in range(num_images_per_prompt)]
        rows = [(text, texts[:i].count(text)) for i, text in enumerate(texts)]  # a prompt's images are numbered
        with_value = [bool(value) and applies(keep_probability, seed, value, *row) for row in rows]

        # Parts may come in different dtypes: transformers keeps that of a file, diffusers makes it float32.
        dtype = self.unet.dtype
        # [u; c] against [masked; c]: the negative prompt and images without a value do not see the first token.
        c = self.text_encoder(self._tokenize(texts + [negative_prompt] * len(rows)))[0].to(dtype)
        u = self.value_encoder(self._tokenize([f"{value}, {text}" for text in texts])).pooler_output.to(dtype)
        cond = torch.cat([torch.cat([u, torch.zeros_like(u)])[:, None], c], dim=1)
        mask = torch.ones(cond.shape[:2], dtype=torch.bool, device=cond.device)
        mask[:, 0] = torch.tensor(with_value + [False] * len(rows))

        height = height or self.unet.config.sample_size * self.vae_scale_factor
        width = width or self.unet.config.sample_size * self.vae_scale_factor
        self.scheduler.set_timesteps(num_inference_steps, device=cond.device)
        z = self.prepare_latents(
            len(rows), self.unet.config.in_channels, height, width, dtype, cond.device, generator, latents
        )
        for t in self.progress_bar(self.scheduler.timesteps):
            model_input = self.scheduler.scale_model_input(torch.cat([z, z]), t)
            out = self.unet(model_input, t, encoder_hidden_states=cond, encoder_attention_mask=mask).sample
            with_prompt, with_negative = out.chunk(2)
            out = with_negative + guidance_scale * (with_prompt - with_negative)
            z = self.scheduler.step(out, t, z).prev_sample
        images = self.vae.decode(z.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        images, unsafe = self.run_safety_checker(images, cond.device, images.dtype)
        shown = [not bad for bad in unsafe] if unsafe is not None else [True] * len(rows)
        images = self.image_processor.postprocess(images, output_type=output_type, do_denormalize=shown)
        self.maybe_free_model_hooks()
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=unsafe)
