"""The value in words: the model reads "value, prompt", what LiVO's value encoder reads."""

from livo_jax.methods import Method, drawer, networks
from livo_jax.values.principles import value_prompt

KINDS = ("bias", "harm")


def make(config, sd, mesh, *_) -> Method:
    def say(request):
        statements = ", ".join(dose.value for dose in request.values)
        return request._replace(prompt=value_prompt(statements, request.prompt), noise=request.prompt, values=())

    draw = lambda requests: drawer(config, mesh)(sd, [say(request) for request in requests])
    return Method(draw, networks(sd), {"method": "words"})
