"""What the methods that train the UNet share."""

from flax import nnx

from livo_jax import seeds, sharding
from livo_jax.methods.base import TOKENS, Models, TrainedMethod, draw_plain, with_unet
from livo_jax.models.weights import count, one_key, split


class UNetMethod(TrainedMethod):
    """A method that trains an `Update` of the UNet, float32.

    Update(config, sd, rngs) is the module: its applied(unet) is the UNet with it, which computes in the dtype that it
    had.
    """

    UNREAD = (
        *TOKENS, "loss.form", "loss.min_snr_gamma", "loss.alpha", "loss.beta", "loss.gamma_1", "loss.gamma_2",
        "loss.anchor", "loss.anchor_of_harms",
    )  # fmt: skip
    Update: type[nnx.Module]

    def make_module(self, sd):
        return self.Update(self.config, sd, one_key())

    def start(self, sd, mesh):
        return sharding.replicate(self.Update(self.config, sd, nnx.Rngs(seeds.key(self.config.seed))), mesh)

    def models(self, sd, module):
        return Models(sd, with_unet(sd, module.applied(sd.unet)))

    def make_drawing(self, models, mesh, workdir, judge):
        update = nnx.eval_shape(lambda: self.make_module(models.base))
        settings = {"method": self.config.method}
        return draw_plain(self.config, models.sd, mesh, settings, trained=count(split(update)[1]))
