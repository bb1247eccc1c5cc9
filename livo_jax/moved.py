"""Where the modules of livo_jax were before it had rooms: an import of one says where it is now."""

import importlib.abc

MOVED = {
    "baselines": "methods", "cases": "evaluation.cases", "charts": "evaluation.charts",
    "checkpoint": "runs.checkpoint", "compare": "runs.compare", "dealing": "values.dealing",
    "diffusers_pipeline": "export.diffusers_pipeline", "drawn": "evaluation.drawn",
    "endpoint": "retrieval.endpoint", "evaluate": "runs.evaluate", "fields": "runs.fields",
    "generate": "sampling.generate, and Request in livo_jax.sampling.requests", "log": "runs.log",
    "losses": "training.losses", "metrics": "evaluation.metrics", "model_files": "files.repositories",
    "plan": "runs.plan", "pretrained": "sampling.stable_diffusion, and load in livo_jax.files.modules",
    "prompt_sets": "evaluation.prompt_sets", "quality": "evaluation.quality", "ratio": "values.ratio",
    "report": "evaluation.report", "retriever": "retrieval", "rules": "values.rules", "step": "training.step",
    "train": "runs.train, and restore_run in livo_jax.runs.restore", "uncertainty": "evaluation.uncertainty",
    "workdir": "runs.workdir",
}  # fmt: skip


class Moved(importlib.abc.MetaPathFinder):
    """Asked last: for what nobody else finds."""

    def find_spec(self, name, path, target=None):
        package, _, module = name.partition(".")
        if package == "livo_jax" and module in MOVED:
            raise ModuleNotFoundError(f"{name} is now livo_jax.{MOVED[module]}", name=name)
