"""Processes that live and end together."""

from __future__ import annotations

import contextlib
import functools
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from tfqcomm.launch.environment import RESTART_COUNT, die_with_parent
from tfqcomm.launch.output import LineCutter, is_chatter, show

GRACE_SECONDS = 5.0  # between asking a task to end and killing it
POLL_SECONDS = 0.05  # between looks at tasks that print nothing
COLOURS = (36, 33, 35, 32, 34, 31)  # ANSI foreground colours, one per task in turn
READ_BYTES = 1 << 16  # all that a Linux pipe holds


class Task:
    """One process of the cluster, the leader of its own session.

    Attributes:
        name: for people.
        exit_code: as `subprocess.Popen.returncode`.
        expendable: whether the others can do without it, once it was killed.
        serves: whether it has nothing to finish when it is to end.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        variables: Mapping[str, str],
        *,
        expendable: bool = False,
        serves: bool = False,
    ):
        self.name = name
        self.expendable = expendable
        self.serves = serves
        self.exit_code: int | None = None
        self._command, self._variables = command, variables
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )
        self.pipes: list[IO[bytes]] = []  # standard output and error
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
                self.pipes.append(pipe)

    def poll(self) -> int | None:
        """Returns the exit code, once there is one; then nothing of the task is left running."""
        if self.exit_code is None:
            self.exit_code = self.process.poll()
            if self.exit_code is not None:
                self._signal_group(signal.SIGKILL)  # what it started and left behind
        return self.exit_code

    def again(self) -> Task:
        """The same one, started anew; its environment says how often it was."""
        restarts = str(int(self._variables.get(RESTART_COUNT, 0)) + 1)
        variables = {**self._variables, RESTART_COUNT: restarts}
        how = {"expendable": self.expendable, "serves": self.serves}
        return Task(self.name, self._command, variables, **how)

    def signal(self, number: int) -> None:
        """Sends a signal to the task and its descendants."""
        if self.poll() is None:
            self._signal_group(number)

    def kill(self) -> None:
        """Kills the task and its descendants, and waits for its end."""
        self.signal(signal.SIGKILL)
        self.process.wait()

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


class LocalCluster:
    """Tasks, their output and their common end; the end of the context leaves none of them.

    Args:
        max_restarts: how often expendable tasks are started again, all together.
        verbose: show what TensorFlow's C++ log says besides errors.

    Attributes:
        tasks: those that were started, in this order.
        interrupted: whether a signal has asked the launcher to end.
    """

    def __init__(self, max_restarts: int = 0, *, verbose: bool = False):
        self.tasks: list[Task] = []
        self._restarts_left = max_restarts
        self._verbose = verbose
        self._missing: list[Task] = []  # killed, and done without
        self._signals: list[int] = []  # received, to be passed on
        self._handlers: dict[int, Any] = {}  # signal number -> handler before ours
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> LocalCluster:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not under nohup
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self._handlers[number] = signal.signal(number, lambda n, _: self._signals.append(n))
        return self

    def __exit__(self, *_) -> None:
        for task in self.tasks:
            task.kill()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def interrupted(self) -> bool:
        return bool(self._signals)

    def start(self, *args, **kwargs) -> Task:
        """Starts a `Task`, with its variables added to the environment."""
        task = Task(*args, **kwargs)
        self.tasks.append(task)
        self._show_output_of(task)
        return task

    def _show_output_of(self, task: Task) -> None:
        colour = COLOURS[self.tasks.index(task) % len(COLOURS)]
        hidden = None if self._verbose else is_chatter
        shown = ((sys.stdout, None), (sys.stderr, hidden))
        for pipe, (stream, left_out) in zip(task.pipes, shown, strict=True):
            how = functools.partial(show, name=task.name, stream=stream, colour=colour)
            self._selector.register(pipe, selectors.EVENT_READ, (pipe, LineCutter(left_out), how))

    def run(self, until: Sequence[Task]) -> int:
        """Waits until the tasks `until` have succeeded or any task has failed; ends the others.

        An expendable task that was killed is started again, or done without while there are others.

        Returns:
            The exit code as a shell has it: 128 + n after signal n.
        """
        code = self._watch(until)
        self._stop(self._signals[0] if self._signals else signal.SIGTERM)
        self.tasks.clear()  # others may be started
        return code

    def _watch(self, until: Sequence[Task]) -> int:
        while not self._signals:
            self._print(POLL_SECONDS)
            for task in self.tasks:
                code = task.poll()
                if code or (code == 0 and task not in until):
                    self._print(0)  # its last words come first
                    if self._can_do_without(task):
                        continue
                    say(f"{task.name} failed: {_describe(code)}. Ending all tasks.")
                    return 128 - code if code < 0 else code or 1
            if all(task.exit_code == 0 for task in until):
                return 0
        say(f"received {_describe(-self._signals[0])}. Ending all tasks.")
        return 128 + self._signals[0]

    def _can_do_without(self, task: Task) -> bool:
        """Starts it again if it was killed and that is allowed; says so once."""
        if task in self._missing:
            return True
        code = task.exit_code
        if not task.expendable or code is None or code >= 0:
            return False
        reason = f"{task.name} failed: {_describe(code)}."
        if self._restarts_left:
            self._restarts_left -= 1
            say(f"{reason} Starting it again; restarts left: {self._restarts_left}.")
            self.tasks[self.tasks.index(task)] = again = task.again()
            self._show_output_of(again)
            return True
        if all(t.exit_code is not None for t in self.tasks if t.expendable):
            return False
        say(f"{reason} The others go on without it.")
        self._missing.append(task)
        return True

    def _stop(self, number: int) -> None:
        """Passes a signal on; kills who is left after `GRACE_SECONDS`, or at another signal.

        Those that only serve come last: without them the others would end with other errors.
        """
        received = len(self._signals)
        told = [task for task in self.tasks if not task.serves]
        for task in told:
            task.signal(number)
        deadline = time.monotonic() + GRACE_SECONDS
        while alive := [task for task in told if task.poll() is None]:
            self._print(POLL_SECONDS)
            if time.monotonic() > deadline or len(self._signals) > received:
                say(f"{', '.join(task.name for task in alive)} did not end; killed.")
                for task in alive:
                    task.kill()
        for task in self.tasks:
            task.kill()
        for _ in range(2):  # the last output, then the end of each pipe
            self._print(0)

    def _print(self, seconds: float) -> None:
        """Prints the output there is, or the next within `seconds`."""
        if not self._selector.get_map():
            time.sleep(seconds)
            return
        for key, _ in self._selector.select(seconds):
            pipe, cutter, show_lines = key.data
            data = pipe.read(READ_BYTES)
            if data is None:  # a false alarm
                continue
            show_lines(cutter.cut(data) if data else cutter.finish())
            if not data:
                self._selector.unregister(pipe)
                pipe.close()


def say(text: str) -> None:
    """Prints a line of the launcher's own."""
    show([text.encode()], "launch", sys.stderr)


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
