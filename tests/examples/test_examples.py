"""Every example runs by the command in its docstring, and learns."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.multi_process import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NAMES = [path.stem for path in EXAMPLES]


def command_in(path) -> list[str]:
    """The first indented lines of a docstring, as a shell would take them."""
    lines = re.search(r"^    python .*\n(?:        .*\n)*", path.read_text(), re.M)[0]
    return shlex.split(lines.replace("\\\n", ""))


@pytest.mark.parametrize("path", EXAMPLES, ids=NAMES)
def test_an_example_fits_on_a_page_and_says_how_to_run_it(path):
    assert len(path.read_text().splitlines()) <= 60
    assert f"examples/{path.name}" in command_in(path)


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("path", EXAMPLES, ids=NAMES)
def test_an_example_learns(path, tmp_path):
    replaced = {
        "python": sys.executable,
        f"examples/{path.name}": str(path),
        "--backup_dir=/tmp/backup": f"--backup_dir={tmp_path}/backup",
    }
    done = subprocess.run(
        [replaced.get(word, word) for word in command_in(path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kind = {"custom_loop": "loss", "recommender": "recall"}.get(path.stem, "accuracy")
    first, *_, last = map(float, re.findall(rf"(?<!val_){kind}:? ([\d.]+)", done.stdout))
    assert last < 0.7 * first if kind == "loss" else last > 0.7, done.stdout
