"""Negative prompt: guidance away from the harm's words in the place of the empty prompt (Ho & Salimans 2022, eq. 6)."""

from livo_jax.methods.base import Drawing, Method, concept_problems, concepts, drawer, weights_of


class NegativePrompt(Method):
    KINDS = ("harm",)

    def problems(self):
        return concept_problems(self.config)

    def make_drawing(self, models, mesh, workdir, judge):
        texts = concepts(self.config)

        def avoid(request):
            return request._replace(negative=", ".join(texts[dose.value] for dose in request.values), values=())

        def draw(requests):
            return drawer(self.config, mesh)(models.sd, [avoid(request) for request in requests])

        return Drawing(draw, weights_of(models.sd), {"method": "negative", "texts": texts})
