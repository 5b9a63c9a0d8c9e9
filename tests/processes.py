"""Real processes for tests, forked from one that has imported TensorFlow already.

    process = start(function, arguments, environment={...}, output=path)
    process.kill()

The import takes five to ten seconds of a core, in each of the three to six processes of a cluster.
What forked processes share, they share before anything ran in TensorFlow: no device, no thread, no
connection. They also hash strings alike; processes that do not are in the tests of the launcher, the
examples and the experiments, which start interpreters of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
PRELOAD = ["tensorflow", "keras", "tfqcomm"]
NEW_NETWORK = 0x40000000  # CLONE_NEWNET, of sched.h

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


class Process:
    """A process that leads a group of its own, and ends with the one that started it."""

    def __init__(self, process: multiprocessing.context.ForkServerProcess):
        self._process = process

    @property
    def pid(self) -> int:
        """The number of the process and of its group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Returns the exit code, negative for a signal, or None while it runs."""
        return self._process.exitcode

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
    namespace: str | None = None,
) -> Process:
    """Starts `target(*arguments)` in a process of its own, in the root of the repository.

    Args:
        target: Function at the top level of a module.
        arguments: What is pickled and given to it.
        environment: All environment variables of the process.
        output: File to append standard output and error to.
        namespace: Path of the network namespace to run in. None: this process' own.
    """
    arguments = (target, arguments, dict(environment), str(output), namespace)
    process = _context.Process(target=_run, args=arguments, daemon=True)
    process.start()
    return Process(process)


def run_module(module: str, *argv: str) -> None:
    """What `python -m module *argv` does, as a target."""
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _run(target, arguments, environment, output, namespace) -> None:
    os.setsid()
    _end_with_parent()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for standard in (1, 2):
        os.dup2(file, standard)
    if namespace is not None:
        _enter(namespace)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # else all processes would draw the same
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
