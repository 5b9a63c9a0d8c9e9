"""How this process was started."""

from __future__ import annotations

import sys


def is_launcher() -> bool:
    """Whether `python -m tfqcomm.launch` is about to run; asked while `tfqcomm` is imported.

    It needs none of the package: importing TensorFlow would take it seconds and half a gigabyte,
    and print TensorFlow's start-up messages.
    """
    if sys.argv[:1] != ["-m"]:  # what it is while Python looks for the module
        return False
    options = sys.orig_argv[1:]
    return "-m" in options and options[options.index("-m") + 1 :][:1] == ["tfqcomm.launch"]
