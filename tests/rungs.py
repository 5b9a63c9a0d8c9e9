"""Which of a test's parameters the default run tries, and which it leaves to the slow rung.

What is left out takes nearly the same way as what is not; `make test-slow` runs it, and so does CI.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import pytest


def slow_unless(quick: Callable[..., bool], values: Sequence) -> list:
    """Parameters for `pytest.mark.parametrize`, marked slow where `quick` says False.

    Args:
        quick: of a value, or of the parts of a tuple.
        values: of one parameter, or tuples for several.
    """
    parts = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*p, marks=[] if quick(*p) else [pytest.mark.slow]) for p in parts]


SAMPLED = ("aggregators", "compressors", "distribute", "kernels", "optimizers", "step")
STRIDE = 4


def sample(items: Sequence[pytest.Item]) -> None:
    """Marks three of four parameters of a test slow, where tests trace graph after graph.

    Which one of four runs by default depends on the test's name, so that every codec and optimizer
    of a catalogue meets some tests of its file. All run by default of a test that is marked
    `every`, and where there are no more than three that are not slow anyway.
    """
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        exempt = any(item.get_closest_marker(name) for name in ("slow", "network", "gpu", "every"))
        if item.path.parent.name in SAMPLED and not exempt:
            tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    for name, parameters in tests.items():
        if len(parameters) < STRIDE:
            continue
        for index, item in enumerate(parameters):
            if (index + zlib.crc32(name.encode())) % STRIDE:
                item.add_marker(pytest.mark.slow)
