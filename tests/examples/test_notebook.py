"""The notebook runs from top to bottom, as plain Python: it has nothing but code and text."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.multi_process import ROOT

NOTEBOOK = ROOT / "examples" / "compare_compressors.ipynb"


def cells(kind: str) -> list[str]:
    found = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def test_it_is_committed_without_what_a_run_leaves_behind():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_the_size_of_its_model_is_the_one_it_names():
    weights = 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10
    assert f"{weights:,} weights" in "".join(cells("markdown"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_compressor_learns(tmp_path):
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join(cells("code")))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=560
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(r"^(.+?)\s+(0\.\d+)\s+([\d.]+)\s+(\d+)x$", done.stdout, re.M)
    assert [name for name, *_ in rows] == ["none", "8-bit blocks", "Block-Sign", "Top-k 1%"]
    assert all(float(accuracy) > 0.85 for _, accuracy, *_ in rows), done.stdout
    ratios = [int(ratio) for *_, ratio in rows]
    assert ratios[0] == 1 and ratios[1] == 4 and ratios[2] > 20 and ratios[3] > 40, done.stdout
