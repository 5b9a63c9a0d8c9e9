"""The output of several tasks in one place: whole lines, each with its task's name in front.

Without what TensorFlow says of itself when it starts, in the midst of which no error is seen.
"""

from __future__ import annotations

import functools
import glob
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import TextIO

PROGRESS_SECONDS = 1.0  # at most one line of a progress bar in this time

# What no variable of TensorFlow's switches off: it comes before its log has been set up. Python's
# log names a .py file, errors begin with E.
_CHATTER = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR$"
    rb"|I\d{4} \d\d:\d\d:[\d.]+ +\d+ [\w/.-]+\.cc:\d+\] "
)
# Where there is no GPU this is how TensorFlow finds out; the second form is that of 2.20.
_NO_GPU = re.compile(
    rb"(?:E\d{4} \d\d:\d\d:[\d.]+ +\d+ |[\d-]+ \d\d:\d\d:[\d.]+: E )"
    rb"[\w/]*cuda\w*\.cc:\d+\] failed call to cuInit: "
)


class LineCutter:
    r"""Cuts a byte stream into lines, and thins out progress bars.

    A bar overwrites its line by a carriage return, which the output of several tasks in one place
    cannot. So `\r` ends a line as `\n` does, but of the lines it ends only one per
    `PROGRESS_SECONDS` is returned, and the bar's last state always.

    Args:
        left_out: says of a line that it is not to be returned.
    """

    def __init__(self, left_out: Callable[[bytes], bool] | None = None):
        self._left_out = left_out
        self._begun = bytearray()  # a line without its end; grows in place, however long it gets
        self._held = b""  # the bar's state that is not returned yet
        self._after_return = False
        self._next_progress = 0.0  # on the clock of `time.monotonic`

    def cut(self, data: bytes) -> list[bytes]:
        """Returns the lines that `data` completes, without their ends."""
        lines = []
        *pieces, rest = re.split(rb"([\r\n])", data)
        for text, end in zip(pieces[::2], pieces[1::2], strict=True):
            text = self._completed_by(text)
            lines += self._progress(text) if end == b"\r" else self._line(text)
            self._after_return = end == b"\r"
        self._begun += rest
        return lines

    def finish(self) -> list[bytes]:
        """Returns what was begun and not ended."""
        rest = self._completed_by(b"")
        return self._line(rest) if rest or self._held else []

    def _completed_by(self, text: bytes) -> bytes:
        self._begun += text
        line = bytes(self._begun).strip(b"\b")  # Keras' bar also steps back over its old text.
        self._begun.clear()
        return line

    def _line(self, text: bytes) -> list[bytes]:
        held, self._held = self._held, b""
        if self._left_out and self._left_out(text):
            return []
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


def is_chatter(line: bytes) -> bool:
    """Whether a line of TensorFlow's C++ log tells nothing that has gone wrong."""
    return bool(_CHATTER.match(line) or (_NO_GPU.match(line) and not _has_gpu()))


@functools.cache
def _has_gpu() -> bool:
    return bool(glob.glob("/dev/nvidia*") or glob.glob("/dev/dxg"))  # Linux; Windows' Linux


def show(lines: Sequence[bytes], name: str, stream: TextIO, colour: int | None = None) -> None:
    """Prints lines with `[name] ` in front, on a terminal in the ANSI colour `colour`."""
    prefix = f"[{name}] "
    if colour and stream.isatty() and not os.environ.get("NO_COLOR"):
        prefix = f"\x1b[{colour}m{prefix}\x1b[0m"
    for line in lines:
        stream.buffer.write(prefix.encode() + line + b"\n")
    stream.flush()
