"""What a step minimises: preferences between images, of a policy with the value and a reference without it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from livo_jax import diffusion
from livo_jax.models.clip import widened
from livo_jax.models.vae import VAEConfig
from livo_jax.models.weights import apply, split
from livo_jax.training import losses
from livo_jax.training.batch import SIDES, Batch, Noise
from livo_jax.training.optimizer import but_embeddings


class Networks(NamedTuple):
    """What a step computes with beside arrays.

    graphs: GraphDefs of unet, text_encoder, trained (what is trained) and, where batches have images, vae.
    latents: config of the VAE, which says how its latents are scaled. time_ids: of XL, as StableDiffusion has them.
    """

    graphs: dict[str, nnx.GraphDef]
    schedule: diffusion.NoiseSchedule | diffusion.FlowSchedule
    latents: VAEConfig
    time_ids: jax.Array | None = None

    def merge(self, name: str, params) -> nnx.Module:
        return nnx.merge(self.graphs[name], params)

    def apply(self, name: str, frozen: dict, *args, **method):
        """What a frozen module returns, as weights.apply has it."""
        return apply(self.graphs[name], frozen[name], *args, **method)


def split_models(sd, trained, with_vae: bool) -> tuple[Networks, dict, dict]:
    """The Networks of a StableDiffusion and what is trained, its parameters, and those that are frozen, by name."""
    modules = {"unet": sd.unet, "text_encoder": sd.text_encoder, "trained": trained}
    if with_vae:
        modules["vae"] = sd.vae
    graphs, params = {}, {}
    for name, module in modules.items():
        graphs[name], params[name] = split(module)
    return Networks(graphs, sd.schedule, sd.vae.config, sd.time_ids), params.pop("trained"), params


def moments(networks: Networks, frozen: dict, batch: Batch, side: str):
    """Mean and log-variance [B, h, w, C] of the posterior of one side's images."""
    stored = getattr(batch, f"{side}_moments")
    if stored is not None:
        return jnp.split(stored, 2, axis=-1)
    return networks.apply("vae", frozen, getattr(batch, side), method="encode")


def add_noise(networks: Networks, frozen: dict, batch: Batch, noise: Noise, sides=SIDES):
    """z_t [n B, h, w, C], what the UNet is told of t [n B], and the target, of n sides' images with equal eps and t.

    They go through the UNet as one batch: side by side, so that no row leaves its device.
    """

    def sample_latents(side):
        mean, logvar = (x.astype(jnp.float32) for x in moments(networks, frozen, batch, side))
        return networks.latents.scale(mean + jnp.exp(0.5 * logvar) * getattr(noise, side))

    z = jnp.stack([sample_latents(side) for side in sides], axis=1)
    z = z.reshape(-1, *z.shape[2:])
    eps, t = (jnp.repeat(x, len(sides), axis=0) for x in (noise.eps, noise.t))
    schedule = networks.schedule
    return diffusion.add_noise(schedule, z, eps, t), schedule.times(t), diffusion.target(schedule, z, eps, t)


def prompt_states(networks: Networks, frozen: dict, batch: Batch):
    """c [B, L, D] and, of XL and 3, text_embeds [B, P] of a batch's prompts, from the cache or the text encoder."""
    if batch.prompt_states is not None:
        return batch.prompt_states.astype(jax.tree.leaves(frozen["unet"])[0].dtype), batch.text_embeds
    text = networks.apply("text_encoder", frozen, batch.prompt_ids)
    return text.last_hidden_state, text.text_embeds


def condition(value_encoder, text_encoder, batch: Batch, c, pooled):
    """What the policy and the reference read: ([u; c], mask, pooled), (c, mask, pooled).

    The mask [B, tokens] bool is None for all; pooled: [B, P], the pooled text of XL and 3, which a value may move.
    Where a second value stands beside, both have it: what is learned is what u adds to it. Another pair trains its
    token.
    """

    def prepend(u, c):
        return jnp.concatenate([widened(u, c.shape[-1]).astype(c.dtype), c], axis=1)

    def move(pooled, shift):
        return pooled if shift is None else (pooled + shift).astype(pooled.dtype)

    ids = batch.value_prompt_ids
    u, shift = value_encoder.tokens(ids, text_encoder), value_encoder.pooled_shift(ids, text_encoder)  # u: [B, n, D]
    if batch.beside is None:
        return (prepend(u, c), None, move(pooled, shift)), (c, None, pooled)
    ids = batch.beside_prompt_ids
    u_beside = jax.lax.stop_gradient(value_encoder.tokens(ids, text_encoder))
    if shift is not None:
        of_beside = jax.lax.stop_gradient(value_encoder.pooled_shift(ids, text_encoder))
        pooled = move(pooled, jnp.where(batch.beside[:, None], of_beside, 0.0))
    beside = jnp.broadcast_to(batch.beside[:, None], u.shape[:2])
    mask = jnp.concatenate([beside, jnp.ones(c.shape[:2], bool)], axis=1)
    c = prepend(u_beside, c)
    with_value = jnp.concatenate([jnp.ones(u.shape[:2], bool), mask], axis=1)
    return (prepend(u, c), with_value, move(pooled, shift)), (c, mask, pooled)


def make_preference(config, T: int):
    """The function of losses.py that config.loss.form names, with its constants; T timesteps.

    Raises:
        ValueError: an unknown form, or one that micro-batches would change.
    """
    c, of_ratios = config.loss, {"beta": config.loss.beta, "T": T}
    forms = {
        "livo": {name: c[name] for name in ("alpha", "beta", "gamma_1", "gamma_2")},
        "sft": {},
        "dpo": of_ratios,
        "ipo": of_ratios,
        "kto": of_ratios,
    }
    if c.form not in forms:
        raise ValueError(f"config.loss.form={c.form!r}: choose from {', '.join(forms)}")
    if c.form == "kto" and config.train.accumulate > 1:
        raise ValueError(
            f"config.train.accumulate={config.train.accumulate}: kto compares with the mean of a whole batch, set 1"
        )
    if forms[c.form] is of_ratios and c.beta <= 0:
        raise ValueError(f"config.loss.beta={c.beta}: {c.form} wants it above 0")
    return functools.partial(getattr(losses, c.form), **forms[c.form])


def make_loss(networks: Networks, config):
    """The function loss(params, frozen, batch, noise) -> (loss, metrics) of config.loss.

    params: of the value encoder. frozen: parameters of text_encoder, unet and vae. batch: a Batch, noise: its Noise.
    With config.loss.anchor a pair that is an anchor adds how far the value moves its prediction, in the place of its
    part of the form: for livo's hinges nothing, for the others' margin of errors 0, which no gradient passes.
    """
    schedule, form, min_snr_gamma = networks.schedule, config.loss.form, config.loss.min_snr_gamma
    preference = make_preference(config, schedule.num_timesteps)
    anchor, of_harms = config.loss.get("anchor", 0.0), config.loss.get("anchor_of_harms", 1.0)
    compares = form != "sft"
    has_reference, sides = compares or anchor, SIDES if compares else SIDES[:1]

    def per_side(x):
        """The rows [B, ...] once for each side: [n B, ...]."""
        return x if x is None else jnp.repeat(x, len(sides), axis=0)

    def loss(params, frozen, batch, noise):
        if not config.train.train_embeddings:
            params = stop_embeddings(params)
        value_encoder = networks.merge("trained", params)
        text_encoder = networks.merge("text_encoder", frozen["text_encoder"])

        z_t, t, target = add_noise(networks, frozen, batch, noise, sides)
        c, text_embeds = prompt_states(networks, frozen, batch)
        of_policy, of_reference = condition(value_encoder, text_encoder, batch, c, text_embeds)

        def predict(cond, mask, text_embeds):
            given = z_t, t, per_side(cond), per_side(mask), per_side(text_embeds), networks.time_ids
            return networks.apply("unet", frozen, *given)

        def errors(eps_hat):  # of each side, [n, B]
            weight = diffusion.min_snr_weight(schedule, t, min_snr_gamma) if min_snr_gamma else 1.0
            return (weight * losses.denoising_error(eps_hat, target)).reshape(-1, len(sides)).T

        if not has_reference:
            return preference(*errors(predict(*of_policy)))
        reference, policy = predict(*of_reference), predict(*of_policy)
        reference_errors, policy_errors = errors(reference), errors(policy)
        anchored, constants = anchor and batch.anchor is not None, {}
        if anchored and form == "livo":  # an anchor has no hinges
            constants = {name: jnp.where(batch.anchor, 0.0, x) for name, x in preference.keywords.items()}
        elif anchored:  # nor has it margins
            policy_errors = jnp.where(batch.anchor, jax.lax.stop_gradient(reference_errors), policy_errors)
        compared = (*policy_errors, *reference_errors) if compares else policy_errors
        preferred, metrics = preference(*compared, **constants)
        if not anchored:
            return preferred, metrics
        # What the value should leave alone has a prediction that is to stay: of a harm that of its harmless image. The
        # other shows what the token is to remove, whatever the prompt says.
        by_side = losses.denoising_error(policy, reference).reshape(-1, len(sides)).T
        moved = jnp.where(batch.harm, by_side[0], by_side.mean(0))
        moved = jnp.mean(jnp.where(batch.anchor, moved * jnp.where(batch.harm, of_harms, 1.0), 0.0))
        metrics["anchor_moved"] = moved
        if form == "livo":
            metrics["hinged"] = 1 - jnp.mean(batch.anchor)
        return preferred + anchor * moved, metrics

    return loss


def stop_embeddings(params: dict) -> dict:
    """The parameters, with no gradient to the embeddings.

    make_optimizer leaves these as they are; here no time and no part of the gradient's norm goes to them.
    """

    def stop(trained, part):
        return part if trained else jax.lax.stop_gradient(part)

    return jax.tree.map(stop, but_embeddings(params), params)
