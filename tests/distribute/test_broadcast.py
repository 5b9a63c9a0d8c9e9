"""A broadcast between real processes whose sender is known at run time only."""

import pytest

from tests.distribute import broadcast_functions as functions
from tests.multi_process import run_workers

pytestmark = pytest.mark.multi_process


def expected(rank, world, groups):
    size = world // groups
    group = rank // size
    return [
        100 * number + group * size + (number // 2 + group) % size if number % 2 == 0 else -1
        for number in range(functions.ROUNDS)
    ]


@pytest.mark.parametrize(
    ("workers", "groups"),
    [
        (2, 1),
        pytest.param(3, 1, marks=pytest.mark.slow),
        pytest.param(4, 2, marks=pytest.mark.slow),
    ],
)
def test_every_worker_gets_what_the_root_sent(workers, groups):
    found = run_workers(functions.broadcast_from_changing_roots, workers, args={"groups": groups})
    assert found == [expected(rank, workers, groups) for rank in range(workers)]
