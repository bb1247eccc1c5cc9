"""The value in words: the model reads "value, prompt", what LiVO's value encoder reads."""

from livo_jax.methods.base import Drawing, Method, drawer, weights_of
from livo_jax.values.principles import value_prompt


class Words(Method):
    def make_drawing(self, models, mesh, workdir, judge):
        def say(request):
            prompt = value_prompt(", ".join(dose.value for dose in request.values), request.prompt)
            return request._replace(prompt=prompt, noise=request.noise or request.prompt, values=())

        def draw(requests):
            return drawer(self.config, mesh)(models.sd, [say(request) for request in requests])

        return Drawing(draw, weights_of(models.sd), {"method": "words", "noise": "as asked"})
