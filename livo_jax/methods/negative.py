"""Negative prompt: guidance away from the harm's words in the place of the empty prompt (Ho & Salimans 2022, eq. 6)."""

from livo_jax.methods import Method, concepts, drawer, networks

KINDS = ("harm",)


def make(config, sd, mesh, *_) -> Method:
    texts = concepts(config)
    avoid = lambda request: request._replace(negative=", ".join(texts[d.value] for d in request.values), values=())
    draw = lambda requests: drawer(config, mesh)(sd, [avoid(request) for request in requests])
    return Method(draw, networks(sd), {"method": "negative", "texts": texts}, kinds=KINDS)
