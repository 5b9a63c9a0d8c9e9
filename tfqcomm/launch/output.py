"""The output of several tasks in one place: whole lines, each with its task's name in front."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from typing import TextIO

PROGRESS_SECONDS = 1.0  # at most one line of a progress bar in this time


class LineCutter:
    r"""Cuts a byte stream into lines, and thins out progress bars.

    A bar overwrites its line by a carriage return, which the output of several tasks in one place
    cannot. So `\r` ends a line as `\n` does, but of the lines it ends only one per
    `PROGRESS_SECONDS` is returned, and the bar's last state always.
    """

    def __init__(self):
        self._rest = b""  # the line begun
        self._held = b""  # the bar's state that is not returned yet
        self._after_return = False
        self._next_progress = 0.0  # on the clock of `time.monotonic`

    def cut(self, data: bytes) -> list[bytes]:
        """Returns the lines that `data` completes, without their ends."""
        lines = []
        *pieces, self._rest = re.split(rb"([\r\n])", self._rest + data)
        for text, end in zip(pieces[::2], pieces[1::2], strict=True):
            text = text.strip(b"\b")  # Keras' bar also steps back over its old text.
            lines += self._progress(text) if end == b"\r" else self._line(text)
            self._after_return = end == b"\r"
        return lines

    def finish(self) -> list[bytes]:
        """Returns what was begun and not ended."""
        rest, self._rest = self._rest.strip(b"\b"), b""
        return self._line(rest) if rest or self._held else []

    def _line(self, text: bytes) -> list[bytes]:
        held, self._held = self._held, b""
        if text or not self._after_return:
            return [text]
        return [held] if held else []  # The end of this line is the bar's.

    def _progress(self, text: bytes) -> list[bytes]:
        if not text:
            return []
        if time.monotonic() < self._next_progress:
            self._held = text
            return []
        self._held = b""
        self._next_progress = time.monotonic() + PROGRESS_SECONDS
        return [text]


def show(lines: Sequence[bytes], name: str, stream: TextIO, colour: int | None = None) -> None:
    """Prints lines with `[name] ` in front, on a terminal in the ANSI colour `colour`."""
    prefix = f"[{name}] "
    if colour and stream.isatty() and not os.environ.get("NO_COLOR"):
        prefix = f"\x1b[{colour}m{prefix}\x1b[0m"
    for line in lines:
        stream.buffer.write(prefix.encode() + line + b"\n")
    stream.flush()
