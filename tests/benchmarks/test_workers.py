"""What benchmarks share to start their workers."""

import os
import subprocess
import sys

import pytest

from benchmarks import workers

forks = []
os.register_at_fork(after_in_parent=lambda: forks.append(1))


def test_an_interrupt_is_not_lost_while_the_launcher_starts():
    """Python ignores what is raised in its hooks at a fork, so none may be called."""
    forks.clear()
    workers.run([sys.executable, "-c", ""])
    assert not forks


def test_the_launcher_ends_with_the_benchmark():
    script = "import ctypes; n = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(n))"
    workers.run([sys.executable, "-c", f"{script}; assert n.value == 9, n"])  # PR_GET_PDEATHSIG


def test_its_failure_is_an_error():
    with pytest.raises(subprocess.CalledProcessError):
        workers.run(["false"])
