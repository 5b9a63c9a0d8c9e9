"""Two real workers with two devices each, to the bit what two workers do that average by hand."""

import numpy as np
import pytest

from tests.callbacks import backup_functions
from tests.distribute import hierarchical_functions as functions
from tests.multi_process import run_workers
from tests.optimizers import reference
from tests.replicas import build, plain, random_gradients
from tfqcomm.distribute import CompressedAllReduce

pytestmark = [pytest.mark.slow, pytest.mark.multi_process, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def backup_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("backup"))


@pytest.fixture(scope="module")
def workers(backup_dir):
    """What each of two workers found."""
    args = {"backup_dir": backup_dir}
    return run_workers(functions.on_two_workers, args=args, devices=functions.DEVICES, timeout=800)


def by_hand(gradients):
    """The means of each process' replicas, which one replica of its own could have had."""
    pairs = functions.PROCESSES, functions.DEVICES
    return [g.reshape(len(g), *pairs, *g.shape[2:]).mean(axis=2) for g in gradients]


@pytest.mark.parametrize("case", functions.CASES)
def test_processes_exchange_the_means_of_their_replicas(workers, case, mirrored_strategy):
    strategy = mirrored_strategy(functions.PROCESSES, CompressedAllReduce("identity"))
    given = by_hand(functions.gradients())
    expected = functions.train(strategy, functions.CASES[case], given)
    owed = {k: v for k, v in expected["owed"].items() if k.startswith("residual/")}
    assert owed
    for found in (worker[case] for worker in workers):
        for now, wanted in zip(found["history"], expected["history"], strict=True):
            for replica in now:
                for value, right in zip(replica, wanted[0], strict=True):
                    np.testing.assert_array_equal(value, right)
        assert found["traced"] == 1
        assert found["traffic"].bytes_sent == expected["traffic"].bytes_sent
        assert found["traffic"].steps == expected["traffic"].steps
        routes = [(how, codec.removesuffix(" between processes")) for how, codec in found["routes"]]
        assert routes == expected["routes"]
        for name, value in owed.items():
            np.testing.assert_allclose(found["owed"][name], value, rtol=0, atol=1e-6)


class HierarchicalQAdam(reference.QAdamReference):
    """Quantized Adam whose workers are replicas, and whose messages are those of processes."""

    def step(self, gradients, alpha):
        self.v = self.beta_2 * self.v + (1 - self.beta_2) * gradients.astype(np.float64) ** 2
        self.m = self.beta_1 * self.m + (1 - self.beta_1) * gradients
        updates = alpha * self.m / np.sqrt(self.v)
        means = updates.reshape(functions.PROCESSES, functions.DEVICES, *self.x.shape).mean(axis=1)
        targets = means + self.e[: functions.PROCESSES]
        sent = np.stack([self.compress(target) for target in targets])
        self.e[: functions.PROCESSES] = targets - sent
        self.x = self.x - sent.mean(axis=0)
        return self.x


def test_messages_of_a_workers_half_are_averaged(workers):
    gradients = random_gradients(functions.STEPS, functions.REPLICAS, functions.SHAPES)
    _, start = build(plain(), functions.qadam, functions.SHAPES)
    for index, (variable, given) in enumerate(zip(start, gradients, strict=True)):
        expected = HierarchicalQAdam(
            variable.numpy(), functions.REPLICAS, reference.top_k, **functions.QADAM
        )
        for step, of_replicas in enumerate(given):
            right = expected.step(of_replicas, 0.01)
            for worker in workers:
                for replica in worker["qadam"]["history"][step]:
                    np.testing.assert_allclose(replica[index], right, rtol=0, atol=2e-5)
    assert all(worker["qadam"]["traced"] == 1 for worker in workers)


def test_differences_of_models_are_averaged(workers, mirrored_strategy):
    """What DiLoCo exchanges, at the end of every second step."""
    strategy = mirrored_strategy(functions.PROCESSES, CompressedAllReduce("identity"))
    given = by_hand(random_gradients(functions.STEPS, functions.REPLICAS, functions.SHAPES))
    expected = functions.train(
        strategy, {"compressor": None}, given, lambda: functions.diloco(False)
    )
    for found in (worker["diloco"] for worker in workers):
        assert found["traced"] == 1
        assert found["traffic"].bytes_sent == expected["traffic"].bytes_sent
        for now, wanted in zip(found["history"][1::2], expected["history"][1::2], strict=True):
            for replica in now:
                for value, right in zip(replica, wanted[0], strict=True):
                    np.testing.assert_allclose(value, right, rtol=0, atol=1e-5)


def test_what_a_worker_remembers_is_masked_by_what_its_process_sent(workers):
    """Momentum correction: each of the four has its own momentum, and all end with one model."""
    replicas = [r for worker in workers for r in worker["masked"]["history"][-1]]
    assert len(replicas) == functions.REPLICAS
    for replica in replicas:
        for value, first in zip(replica, replicas[0], strict=True):
            assert np.isfinite(value).all()
            np.testing.assert_array_equal(value, first)
    for worker in workers:
        assert worker["masked"]["traced"] == 1
        np.testing.assert_equal(worker["masked"]["owed"], workers[0]["masked"]["owed"])
        momentum = worker["masked"]["owed"]["worker/momentum/0"]
        assert 0 < np.count_nonzero(momentum) < momentum.size


@pytest.mark.parametrize("replicas", [functions.PROCESSES * functions.DEVICES, 3])
def test_what_is_owed_survives_a_crash(workers, backup_dir, replicas, mirrored_strategy):
    """Also where others go on, which are in one process and not hierarchical."""
    before = workers[0]["backup"]["before"]
    if replicas == 3:
        strategy = mirrored_strategy(replicas, CompressedAllReduce("block_sign"))
        model = backup_functions.resume_without_gradients(strategy, backup_dir)
        after = [backup_functions.settled(model)]
    else:
        after = [worker["backup"]["after"] for worker in workers]
        assert any(owed.any() for owed in workers[0]["backup"]["owed"])
    for of in after:
        for one, two in zip(before, of, strict=True):
            np.testing.assert_allclose(one, two, rtol=0, atol=1e-6)
