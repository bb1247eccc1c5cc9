"""Values: what a value is, and which images it is for."""

from livo_jax.values.principles import (
    PRINCIPLES,
    Value,
    attributed,
    find,
    load,
    load_principles,
    phrase,
    read_tables,
    value_prompt,
)

__all__ = [
    "PRINCIPLES",
    "Value",
    "attributed",
    "find",
    "load",
    "load_principles",
    "phrase",
    "read_tables",
    "value_prompt",
]


def __getattr__(name: str):
    # The retriever stands above the values, in livo_jax.retrieval, and is called by this name too.
    if name == "Retriever":
        from livo_jax.retrieval.retriever import Retriever

        return Retriever
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
