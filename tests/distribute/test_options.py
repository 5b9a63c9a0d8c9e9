"""Options of a step on two real workers: to the bit what two replicas of one process do."""

import numpy as np
import pytest

from tests.distribute import option_functions as functions
from tests.multi_process import run_workers
from tfqcomm.distribute import CompressedAllReduce

pytestmark = [pytest.mark.slow, pytest.mark.multi_process, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def two():
    """What each of two workers found."""
    return run_workers(functions.every_case, timeout=600)


@pytest.mark.parametrize("case", functions.CASES)
def test_two_workers_do_what_one_process_does(two, case, mirrored_strategy):
    expected = functions.train(mirrored_strategy(2, CompressedAllReduce("identity")), case)
    for worker in (found[case] for found in two):
        for value, wanted in zip(worker["weights"][0], expected["weights"][0], strict=True):
            np.testing.assert_array_equal(value, wanted, strict=True)
        assert worker["history"] == expected["history"]
        assert worker["iterations"] == expected["iterations"]
        assert worker["routes"] == expected["routes"]
        for record, wanted in zip(worker["traffic"], expected["traffic"], strict=True):
            assert record["bytes_sent"] == wanted["bytes_sent"]
            assert record["steps"] == wanted["steps"]
        assert worker["owed"].keys() == expected["owed"].keys()
        for name, value in worker["owed"].items():
            np.testing.assert_allclose(value, expected["owed"][name], atol=1e-6, err_msg=name)
        assert worker["history"]["loss"][-1] < 0.7 * worker["history"]["loss"][0]


EXACT = ("policy", "accumulate")  # nothing is added up: two devices each have another order


@pytest.fixture(scope="module")
def four():
    """What each of two workers with two devices found."""
    args = {"cases": EXACT, "devices": 2}
    return run_workers(functions.every_case, args=args, devices=2, timeout=600)


@pytest.mark.parametrize("case", EXACT)
def test_two_workers_of_two_devices_do_what_one_process_does(four, case, mirrored_strategy):
    strategy = mirrored_strategy(4, CompressedAllReduce("identity"))
    # TensorFlow deals the parts of a batch in turn: worker 0 of two gets parts 0 and 2.
    expected = functions.train(strategy, case, dealt=[0, 2, 1, 3])
    for worker in (found[case] for found in four):
        assert worker["iterations"] == expected["iterations"]
        for replica in worker["weights"]:
            for value, wanted in zip(replica, expected["weights"][0], strict=True):
                np.testing.assert_array_equal(value, wanted, strict=True)
