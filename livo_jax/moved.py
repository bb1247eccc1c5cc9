"""Modules that are found elsewhere: those that livo_jax had before it had rooms, and those beside it in a checkout."""

import importlib.abc
import importlib.machinery
import pathlib

MOVED = {
    "baselines": "methods", "cases": "evaluation.cases", "charts": "evaluation.charts",
    "checkpoint": "runs.checkpoint", "compare": "runs.compare", "dealing": "values.dealing",
    "diffusers_pipeline": "export.diffusers_pipeline", "drawn": "evaluation.drawn",
    "endpoint": "retrieval.endpoint", "evaluate": "runs.evaluate", "fields": "runs.fields",
    "generate": "sampling.generate, and Request in livo_jax.sampling.requests", "log": "runs.log",
    "losses": "training.losses", "metrics": "evaluation.metrics", "model_files": "files.repositories",
    "plan": "runs.plan", "pretrained": "sampling.stable_diffusion, and load_module in livo_jax.files.modules",
    "prompt_sets": "evaluation.prompt_sets", "quality": "evaluation.quality", "ratio": "values.ratio",
    "report": "evaluation.report", "retriever": "retrieval", "rules": "values.rules", "step": "training.step",
    "train": "runs.train, and restore_run in livo_jax.runs.restore", "uncertainty": "evaluation.uncertainty",
    "workdir": "runs.workdir",
}  # fmt: skip


BESIDE = ("benchmarks", "configs", "data_tools")  # in a checkout; where the package is installed they lie in it


class Elsewhere(importlib.abc.MetaPathFinder):
    """Asked last, for what nobody else finds: what lies beside livo_jax in a checkout, and what moved."""

    def find_spec(self, name, path, target=None):
        package, _, module = name.partition(".")
        if package == "livo_jax" and module in BESIDE:
            return importlib.machinery.PathFinder.find_spec(name, [str(pathlib.Path(__file__).parents[1])])
        if package == "livo_jax" and module in MOVED:
            raise ModuleNotFoundError(f"{name} is now livo_jax.{MOVED[module]}", name=name)
