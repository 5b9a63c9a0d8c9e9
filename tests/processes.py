"""Real processes for tests, forked from one that has imported TensorFlow already.

    process = start(function, arguments, environment={...}, output=path)
    process.kill()

    done = run("benchmarks.codecs", "--budget=0.1")

The import takes five to ten seconds of a core, in each of the three to six processes of a cluster.
Nothing has run in TensorFlow before: each process has devices, threads, connections of its own.
It hashes strings as the others do, though. Those that do not are in the tests of the launcher, the
examples and the experiments: `tfqcomm.launch` starts interpreters of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib.metadata
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
PRELOAD = ["tensorflow", "keras", "tfqcomm"]
NEW_NETWORK = 0x40000000  # CLONE_NEWNET, of sched.h

# A worker forked from TensorFlow 2.20 once died of a segmentation fault, nobody knows where. None
# ever did that was started anew.
FORKS = not importlib.metadata.version("tensorflow").startswith("2.20.")

_context = multiprocessing.get_context("forkserver" if FORKS else "spawn")
_context.set_forkserver_preload(PRELOAD)


class Process:
    """A process that leads a group of its own, and ends with the one that started it."""

    def __init__(self, process: multiprocessing.process.BaseProcess):
        self._process = process

    @property
    def pid(self) -> int:
        """The number of the process and of its group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Returns the exit code, negative for a signal, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> bool:
        """Waits for the end, and returns whether it came in time."""
        self._process.join(timeout)
        return self.poll() is not None

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process and to what it has started; none if it is gone."""
        for send in (os.killpg, os.kill):  # It may not lead its group yet.
            with contextlib.suppress(ProcessLookupError):
                send(self.pid, number)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends the signal and waits for the end."""
        self.send_signal(number)
        self._process.join()


def start(
    target: Callable,
    arguments: Sequence[Any] = (),
    *,
    environment: Mapping[str, str],
    output: pathlib.Path | str = os.devnull,
    errors: pathlib.Path | str | None = None,
    namespace: str | None = None,
) -> Process:
    """Starts `target(*arguments)` in a process of its own, in the root of the repository.

    Args:
        target: Function at the top level of a module.
        arguments: What is pickled and given to it.
        environment: All environment variables of the process.
        output: File to append standard output to.
        errors: The same for standard error. None: with the output.
        namespace: Path of the network namespace to run in. None: this process' own.
    """
    files = str(output), str(errors or output)
    arguments = target, arguments, dict(environment), files, namespace
    process = _context.Process(target=_run, args=arguments, daemon=True)
    process.start()
    return Process(process)


def run(
    module: str,
    *arguments: str,
    timeout: float = 280,
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module *arguments` and returns its exit code, output and errors.

    Raises:
        subprocess.TimeoutExpired: After `timeout` seconds, with what was printed until then.
    """
    command = [module, *arguments]
    with tempfile.TemporaryDirectory() as directory:
        output, errors = (pathlib.Path(directory, name) for name in ("output", "errors"))
        process = start(run_module, command, environment=os.environ, output=output, errors=errors)
        ended = process.wait(timeout)
        process.kill()
        printed = [file.read_text(errors="replace") for file in (output, errors)]
    if not ended:
        raise subprocess.TimeoutExpired(command, timeout, *printed)
    return subprocess.CompletedProcess(command, process.poll(), *printed)


def run_module(module: str, *arguments: str) -> None:
    """What `python -m module *arguments` does, as a target."""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _run(target, arguments, environment, files, namespace) -> None:
    os.setsid()
    _end_with_parent()
    gc.freeze()  # What was imported lives as long as the process.
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    for standard, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), standard)
    faulthandler.enable()  # A crash prints where it was.
    if namespace is not None:
        _enter(namespace)
    np.random.seed()  # else all processes would draw the same
    target(*arguments)


def _end_with_parent() -> None:
    """Ends this process, and what it started, when the parent ends."""
    parent = multiprocessing.parent_process().sentinel

    def end() -> None:
        multiprocessing.connection.wait([parent])
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end, daemon=True).start()


def _enter(namespace: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns is new in Python 3.12
    file = os.open(namespace, os.O_RDONLY)
    if libc.setns(file, NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "setns", namespace)
    os.close(file)
