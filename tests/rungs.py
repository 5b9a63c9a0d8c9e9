"""Which of the tests a run takes: the default one, the slow one, and a part of it.

What the default run leaves out takes nearly the same way as what it does not; `make test-slow` runs
it. That takes too long for every commit: CI takes a part of it, which the commit decides.
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
EXEMPT = ("every", "gpu", "multi_process", "network", "slow")


def sample(items: Sequence[pytest.Item]) -> None:
    """Marks three of four parameters of a test slow, where tests trace graph after graph.

    Which one of four runs by default depends on the test's name, so that every codec and optimizer
    of a catalogue meets some tests of its file. All run by default of a test that is marked
    `every`, or looks at what processes have found, and where there are fewer than four.
    """
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        exempt = any(item.get_closest_marker(name) for name in EXEMPT)
        if item.path.parent.name in SAMPLED and not exempt:
            tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    for name, parameters in tests.items():
        if len(parameters) < STRIDE:
            continue
        for index, item in enumerate(parameters, zlib.crc32(name.encode())):
            if index % STRIDE:
                item.add_marker(pytest.mark.slow)


def outside_of(part: str, items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """The items outside of a part such as "2/4": of the files with slow tests every fourth.

    Whole files: several tests look at what workers have found once.

    Raises:
        pytest.UsageError: There is no such part.
    """
    number, slash, parts = part.partition("/")
    if not (slash and number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise pytest.UsageError(f"--part must be such as 2/4, from 1/4 to 4/4. Received: {part}")
    slow = (i for i in items if i.get_closest_marker("slow") or i.get_closest_marker("network"))
    taken = set(sorted({item.path for item in slow})[int(number) - 1 :: int(parts)])
    return {item for item in items if item.path not in taken}


def processes_first(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The same, in which whole files with tests of several processes come first.

    Those take long and wait a lot; at the end one of them would be all that still runs.
    """
    files = {i.path for i in items if i.get_closest_marker("multi_process") is not None}
    return sorted(items, key=lambda item: item.path not in files)
