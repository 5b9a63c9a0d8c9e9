"""Which of a test's parameters the default run tries, and which the slow rung.

What a rung leaves out takes nearly the same way as what it does not. CI runs both rungs; all there
is runs with `--all-parameters`.
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
EXEMPT = ("every", "gpu", "multi_process", "network")


def sample(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Marks and leaves out parameters of tests that trace graph after graph.

    Of four parameters of a test one runs by default, one is marked slow, and two are left out; of
    those that are slow anyway every other one is. Which ones depends on the test's name, so that
    every codec and optimizer of a catalogue meets some tests of its file. All run of a test that is
    marked `every`, or looks at what processes have found, and where there are fewer than four.

    Returns:
        What is left out, and runs with `--all-parameters` in the slow rung.
    """
    quick: dict[str, list[pytest.Item]] = {}
    slow: dict[str, list[pytest.Item]] = {}
    for item in items:
        exempt = any(item.get_closest_marker(name) for name in EXEMPT)
        if item.path.parent.name in SAMPLED and not exempt:
            of_rung = slow if item.get_closest_marker("slow") else quick
            of_rung.setdefault(item.nodeid.split("[")[0], []).append(item)
    left_out = []
    for name, parameters in quick.items():
        if len(parameters) < STRIDE:
            continue
        for index, item in enumerate(parameters, zlib.crc32(name.encode())):
            if index % STRIDE:
                item.add_marker(pytest.mark.slow)
            if index % 2:
                left_out.append(item)
    for name, parameters in slow.items():
        if len(parameters) >= STRIDE:
            left_out += parameters[zlib.crc32(name.encode()) % 2 :: 2]
    return left_out
