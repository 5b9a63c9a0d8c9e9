"""`make test-gpu`: what it says without a GPU, and that it does not rot meanwhile."""

import os
import subprocess
import sys

import pytest

from tests.multi_process import ROOT


def run(*command: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_without_a_gpu_it_says_so_and_succeeds():
    done = run("tests.gpu", CUDA_VISIBLE_DEVICES="-1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("No GPU was found, so nothing was tested and nothing was timed.")


@pytest.mark.slow
def test_the_suite_passes_on_cpus():
    """A part of it; there are no GPUs where this runs."""
    part = "on_the_device or (stay_equal and not processes and (top_k or block_sign))"
    done = run("pytest", "-q", "-m", "gpu", "tests/gpu", "-k", part, TFQCOMM_GPU_SUITE_ON="CPU")
    assert done.returncode == 0, done.stdout
    assert "6 passed" in done.stdout
