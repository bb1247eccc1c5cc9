"""What the judges share whose models transformers computes, with PyTorch."""

import importlib.metadata
import importlib.util

from livo_jax.files.repositories import find_repository, weight_files
from livo_jax.judges import hash_files


def pytorch_problems(config, wanted: str) -> list[str]:
    """What a judge of PyTorch lacks; wanted: what config.judging.model names."""
    problems = []
    if not config.judging.model:
        problems.append(f"config.judging.model is empty: give {wanted}")
    if not importlib.util.find_spec("torch"):
        problems.append("PyTorch is not installed: pip install torch")
    return problems


def pin_pytorch(config, files: list[str]) -> dict:
    """What readings of config.judging.model depend on, for Judge.pinned; files: patterns of its repository's."""
    weights = hash_files(weight_files(find_repository(config.judging.model, files), "model", None))
    version = importlib.metadata.version("transformers")
    return {"model": str(config.judging.model), "weights": weights, "transformers": version}


def load_pytorch(root, processor_class, model_class, what: str):
    """A directory's processor, its model for inference, and the names of the weights that it lacks.

    Args:
        processor_class, model_class: of transformers, as AutoProcessor. what: the model is, for errors.

    Raises:
        FileNotFoundError: it has no weights in safetensors.
        ValueError: transformers cannot read it.
    """
    import torch
    from safetensors import SafetensorError

    weight_files(root, "model", None)
    device, dtype = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", torch.float32)
    try:
        processor = processor_class.from_pretrained(root, trust_remote_code=False)
        model, info = model_class.from_pretrained(
            root, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]  # a list of all models that it knows may follow
        raise ValueError(f"{root} holds no {what} that transformers can read: {reason}") from error
    return processor, model.to(device).eval(), sorted(info["missing_keys"])
