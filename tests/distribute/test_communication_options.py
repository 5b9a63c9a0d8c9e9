"""TensorFlow's communication options reach every collective, without a GPU to run them on.

On CPUs TensorFlow takes no notice of the hint, so the step is traced, and run once, as for NCCL.
"""

import pytest

from tests.distribute import hint_functions
from tests.multi_process import run_workers

pytestmark = [pytest.mark.multi_process, pytest.mark.slow]

OPS = {  # the collectives of each method's step
    "none": {"CollectiveReduceV2", "CollectiveGatherV2"},  # short vectors of two are gathered
    "dense": {"CollectiveReduceV2", "CollectiveGatherV2"},
    "all-gather": {"CollectiveGatherV2"},
    "two-phase": {"CollectiveAllToAllV2", "CollectiveGatherV2"},
    "Leader SGD": {"CollectiveBcastSendV2", "CollectiveBcastRecvV2", "CollectiveGatherV2"},
}


@pytest.mark.parametrize(("implementation", "hint"), [("NCCL", "nccl"), (None, "auto")])
def test_the_hint_is_in_every_collective_of_a_step(implementation, hint):
    args = {"implementation": implementation}
    for found in run_workers(hint_functions.hints, workers=2, args=args):
        assert found.keys() == hint_functions.METHODS.keys()
        for name, hints in found.items():
            assert {op for op, _ in hints} == OPS[name], name
            assert {said for _, said in hints} == {hint}, name


def test_options_of_a_single_call_win():
    for hints in run_workers(hint_functions.hints_of_own_all_reduce, workers=2):
        assert hints == [("CollectiveReduceV2", "nccl")]
