"""LiVO's training step and sampler as their authors structure them, written plainly in PyTorch on diffusers' models.

For each pair the step encodes two images and three texts, and evaluates the UNet four times, twice with gradient.
"""

import diffusers
import numpy as np
import torch
import transformers

from livo_jax.files.repositories import read_json
from livo_jax.models.weights import split, to_published
from livo_jax.training.optimizer import learning_rate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODELS = {
    "unet": diffusers.UNet2DConditionModel.from_config,
    "vae": diffusers.AutoencoderKL.from_config,
    "text_encoder": lambda config: transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)),
}


def model(sd, part: str, dtype):
    """PyTorch's model of a part of our StableDiffusion, with its weights."""
    made = MODELS[part](read_json(sd.root / part / "config.json"))
    prefix = "text_model." if any(name.startswith("text_model.") for name in made.state_dict()) else ""
    weights = to_published(split(getattr(sd, part))[1], prefix)
    made.load_state_dict({name: torch.tensor(np.float32(array)) for name, array in weights.items()})
    return made.to(DEVICE, dtype).eval()


def tensor(array):
    """On the device; images and latents [B, H, W, C] as [B, C, H, W]."""
    array = np.asarray(array)
    return torch.tensor(np.moveaxis(array, -1, 1) if array.ndim == 4 else array, device=DEVICE)


class TrainStep:
    """step(batch) -> (loss, gradient norm): a step of AdamW.

    It takes (batch, noise), numpy arrays: a Batch of images, and the Noise that our step draws for it.
    """

    def __init__(self, sd, config, compiled: bool):
        dtype = getattr(torch, config.dtype)
        self.config, self.scale = config, sd.vae.config.scaling_factor
        self.unet, self.vae, self.text_encoder = (model(sd, part, dtype) for part in ("unet", "vae", "text_encoder"))
        for frozen in (self.unet, self.vae, self.text_encoder):
            frozen.requires_grad_(False)
        self.value_encoder = model(sd, "text_encoder", torch.float32)
        for name, parameter in self.value_encoder.named_parameters():
            parameter.requires_grad_(config.train.train_embeddings or "embeddings." not in name)
        self.scheduler = diffusers.DDPMScheduler.from_config(sd.scheduler_config)
        c = config.train
        self.optimizer = torch.optim.AdamW(
            self.value_encoder.parameters(), learning_rate(config), (c.b1, c.b2), c.eps, c.weight_decay
        )
        if compiled:
            for part in (self.unet, self.vae.encoder, self.text_encoder, self.value_encoder):
                part.compile()

    def loss(self, batch, noise):
        batch = type(batch)(*(x if x is None else tensor(x) for x in batch))
        noise = type(noise)(*map(tensor, noise))
        L, errors, dtype = self.config.loss, {}, self.unet.dtype
        eps, t = noise.eps, noise.t
        for side in ("aligned", "violating"):
            with torch.no_grad():
                posterior = self.vae.encode(getattr(batch, side).to(dtype)).latent_dist
                z = self.scale * (posterior.mean.float() + posterior.std.float() * getattr(noise, side))
                z_t = self.scheduler.add_noise(z, eps, t).to(dtype)
                velocity = self.scheduler.config.prediction_type == "v_prediction"
                target = self.scheduler.get_velocity(z, eps, t) if velocity else eps
                c = self.text_encoder(batch.prompt_ids).last_hidden_state
                reference = self.unet(z_t, t, c).sample
            if side == "aligned":
                u = self.value_encoder(batch.value_prompt_ids).pooler_output
            policy = self.unet(z_t, t, torch.cat([u[:, None].to(dtype), c], dim=1)).sample
            for name, out in (("l", policy), ("r", reference)):
                errors[name, side] = ((out.float() - target) ** 2).mean((1, 2, 3))
        hinge_w = torch.relu(L.gamma_1 + L.beta * (errors["l", "aligned"] - errors["r", "aligned"]))
        hinge_l = torch.relu(L.gamma_2 + L.alpha * (errors["r", "violating"] - errors["l", "violating"]))
        return (hinge_w + hinge_l).mean()

    def __call__(self, given: tuple) -> tuple[float, float]:
        self.optimizer.zero_grad()
        loss = self.loss(*given)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.value_encoder.parameters(), self.config.train.grad_clip)
        self.optimizer.step()
        return loss.item(), norm.item()
