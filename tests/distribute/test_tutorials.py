"""TensorFlow's two tutorials for several workers run as they stand, but for the strategy."""

from __future__ import annotations

import json

import pytest

from tests.processes import run

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]


def run_on_two_workers(script, *arguments):
    """What each of the two workers reports."""
    done = run("tfqcomm.launch", "--workers=2", "-m", script, *map(str, arguments))
    assert done.returncode == 0, done.stdout + done.stderr
    reports = {
        line.split("]")[0]: json.loads(line.split("REPORT ")[1])
        for line in done.stdout.splitlines()
        if "REPORT " in line
    }
    return [reports[name] for name in sorted(reports)]


def test_the_tutorial_with_fit(tmp_path):
    chief, other = run_on_two_workers("tests.distribute.tutorial_fit", tmp_path)
    assert other.pop("own") == ["best.keras", "ckpt", "model.keras"]  # its own were written, too
    assert chief.pop("own") == []
    assert chief == other
    assert chief["epochs"] == [2]  # resumed by both workers, after an interruption
    assert chief["loss"][-1] < 2.0
    left = {path.name for path in tmp_path.iterdir()} - {"interrupted_0", "interrupted_1"}
    assert left == {"best.keras", "ckpt", "model.keras"}


def test_the_tutorial_with_a_custom_loop(tmp_path):
    script = "tests.distribute.tutorial_custom_loop"
    directory = tmp_path / "checkpoints"
    chief, other = run_on_two_workers(script, directory, 2)
    assert chief == other
    assert (chief["first epoch"], chief["iterations"]) == (0, 16)
    chief, other = run_on_two_workers(script, directory)
    assert chief == other
    assert (chief["first epoch"], chief["iterations"]) == (2, 8)
    assert chief["accuracy"][-1] > 0.5
