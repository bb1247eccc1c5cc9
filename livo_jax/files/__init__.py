"""Files: directories, the hub, published modules, and every text and image that users give."""

from livo_jax.files.directories import is_hidden
from livo_jax.files.images import image_files, read_image
from livo_jax.files.texts import (
    DELIMITERS,
    by_spelling,
    json_rows,
    read_texts,
    spelled_otherwise,
    text_fault,
    tidy,
)

__all__ = [
    "DELIMITERS", "by_spelling", "image_files", "is_hidden", "json_rows", "read_image", "read_texts",
    "spelled_otherwise", "text_fault", "tidy",
]  # fmt: skip
