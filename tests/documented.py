"""The examples of docs/, which tests run as they stand there."""

import pathlib
import re
import textwrap

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def example(page: str, line: str) -> str:
    """The code block of a page that has this line."""
    blocks = re.findall(r"(?:^    .*\n|^\n)+", (DOCS / page).read_text(), re.MULTILINE)
    (found,) = [block for block in map(textwrap.dedent, blocks) if line in block.splitlines()]
    return found
