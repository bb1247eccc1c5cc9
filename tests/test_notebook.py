"""The notebook runs from its first cell to its last."""

import json
import subprocess
import sys

from tests.small_run import ROOT, environment


def test_the_embedded_world(tmp_path):
    """In a folder of its own; it is kept without what it showed."""
    cells = json.loads((ROOT / "notebooks" / "embedded_world.ipynb").read_text())["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    started = environment() | {"PYTHONPATH": str(ROOT)}
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=started, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "shape equality" in answer.stdout and (tmp_path / "runs/notebook_smoke/eval/report.html").exists()
