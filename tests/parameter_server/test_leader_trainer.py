"""Workers that train alone, each at its own pace, and are pulled to leaders."""

import functools
import tempfile

import keras
import numpy as np
import pytest

from tests.multi_process import run_workers, start_workers
from tests.parameter_server import leader_runs
from tests.parameter_server.cluster import ServerProcesses
from tests.parameter_server.runs import STEPS
from tfqcomm import optimizers
from tfqcomm.parameter_server import LeaderTrainer

KERNELS = (20 * 64, 64 * 4)
REST = 64 + 2 * 64 + 4
EPOCHS = 6
PATIENCE = 240


@functools.cache
def results(name):
    with tempfile.TemporaryDirectory() as directory:
        args = {"name": name, "directory": directory}
        (result,) = run_workers(leader_runs.found, workers=1, args=args, timeout=500)
    return result


def fitted():
    return results("fit")


@pytest.mark.multi_process
@pytest.mark.timeout(600)
class TestFit:
    @pytest.mark.parametrize("case", [0, 1])
    def test_learns(self, case):
        history = fitted()[case]["history"]
        assert history["val_accuracy"][-1] > 0.85
        assert history["loss"][-1] < history["loss"][0] / 2
        assert max(history["staleness"]) > 0

    @pytest.mark.parametrize("case", [0, 1])
    def test_the_model_is_the_average_of_the_workers(self, case):
        result = fitted()[case]
        *means, moving = (np.mean(each, axis=0) for each in zip(*result["each"], strict=True))
        kernel, bias, gamma, beta, mean, variance, *rest = result["weights"]
        for found, expected in zip([kernel, bias, gamma, beta, *rest], means, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-6)
        np.testing.assert_allclose(np.concatenate([mean, variance]), moving, rtol=1e-5)
        assert np.ptp([each[0] for each in result["each"]], axis=0).max() > 1e-3  # they differ
        for name, value in result["evaluated"].items():
            np.testing.assert_allclose(value, result["history"][f"val_{name}"][-1], rtol=1e-5)

    @pytest.mark.parametrize("case", [0, 1])
    def test_every_step_is_counted_once(self, case):
        result = fitted()[case]
        assert sum(worker["steps"] for worker in result["workers"]) == 4 * STEPS * EPOCHS
        assert result["iterations"] == STEPS * EPOCHS
        assert [record["steps"] for record in result["traffic"]] == [STEPS] * EPOCHS

    @pytest.mark.parametrize("case", [0, 1])
    def test_bytes_are_those_of_pushes_and_pulls(self, case):
        result = fitted()[case]
        kernels = sum(KERNELS) if case == 0 else sum(1 + 8 * n // 32 for n in KERNELS)
        buckets = 0 if case == 0 else 2  # one on each server
        size = 4 * (kernels + REST + 2 * 2 + buckets)  # headers of two servers
        pushes = [worker["bytes_pushed"] / size for worker in result["workers"]]
        pulls = [worker["bytes_pulled"] / size for worker in result["workers"]]
        assert all(count == int(count) for count in (*pushes, *pulls))
        elections = STEPS * EPOCHS // 5
        led = sum(worker["times_led"] for worker in result["workers"])
        # An election is overtaken by the next one where the elected takes no step in between: how
        # often is up to whoever gives processes their time.
        if case == 0:  # whoever leads pushes, and the others pull, or see the next one only
            assert sum(pushes) == led
            assert 0 < led <= elections
            assert 0 < sum(pulls) <= 3 * led
        else:
            assert 0 < led <= sum(pushes) <= 2.5 * elections
            assert sum(pulls) > 0
        sent = sum(record["bytes_sent"] for record in result["traffic"])
        assert sent == pytest.approx(size * sum(pushes) / 4, abs=EPOCHS * STEPS)


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.timeout(600)
def test_traffic_is_logged_where_there_is_none():
    traffic = results("without pulls")["traffic"]
    assert [(r["bytes_sent"], r["bytes_pulled"]) for r in traffic] == [(0, 0)] * EPOCHS


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.timeout(600)
def test_one_worker_is_sgd():
    alone, keras_sgd = results("alone")
    for found, expected in zip(alone, keras_sgd, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("codec", "tolerance"), [(None, 1e-7), ("block_int8", 0.01)])
def test_a_pull_moves_weights_but_not_statistics(codec, tolerance):
    result = results("pulls")[codec]
    leader, follower = result["before"]
    for z, x, half, there in zip(
        leader[:-1], follower[:-1], result["halfway"], result["there"], strict=False
    ):
        np.testing.assert_allclose(half, x - 0.5 * (x - z), atol=tolerance)
        np.testing.assert_allclose(there, z, atol=tolerance)
    np.testing.assert_array_equal(result["there"][-1], follower[-1])
    for before, after in zip(leader, result["first"], strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.timeout(600)
def test_a_backup_keeps_the_average_and_the_mean_momenta():
    first, second = results("backup")
    for kind in ("weights", "momenta"):
        for kept, restored in zip(first["end"][kind], second["begin"][kind], strict=True):
            np.testing.assert_allclose(restored, kept, atol=1e-6)
    assert second["begin"]["iterations"] == first["end"]["iterations"] == 2 * STEPS
    assert second["end"]["iterations"] == 3 * STEPS
    assert max(np.abs(m).max() for m in second["begin"]["momenta"]) > 0


@pytest.mark.multi_process
@pytest.mark.timeout(900)
@pytest.mark.slow
class TestRealProcesses:
    def test_a_slow_worker_does_not_slow_the_others(self):
        fast, slow = 0.05, 0.25
        paces = {"seconds": [[fast] * 4, [fast] * 3 + [slow]]}
        with (
            ServerProcesses(workers=4, parameter_servers=2) as cluster,
            start_workers(
                leader_runs.train_with_a_slow_worker,
                workers=1,
                args=paces,
                env=cluster.chief_environment,
            ) as chief,
        ):
            equal, uneven = chief.wait(timeout=PATIENCE)[0]
        assert sum(uneven["steps"]) == sum(equal["steps"]) == 4 * 100
        *quick, late = uneven["steps"]
        assert min(quick) > 2.5 * late  # 5, but for the ends of epochs
        # Three and a fifth workers share the steps of four: waiting would take 5 times as long.
        assert uneven["seconds"] < 2 * equal["seconds"]
        assert uneven["accuracy"] > equal["accuracy"] - 0.1
        assert uneven["workers"][3]["bytes_pulled"] > 0

    def test_a_killed_worker_is_done_without_until_it_is_back(self):
        with (
            ServerProcesses(workers=2, parameter_servers=2) as cluster,
            start_workers(
                leader_runs.train_through_faults, workers=1, env=cluster.chief_environment
            ) as chief,
        ):
            chief.wait_for_output(0, "epoch 2: 2 workers", timeout=PATIENCE)
            cluster.kill("worker", 1)
            chief.wait_for_output(0, ": 1 workers", timeout=PATIENCE)
            cluster.start("worker", 1)
            result = chief.wait(timeout=PATIENCE)[0]
        assert [worker["alive"] for worker in result["workers"]] == [True, True]
        assert result["accuracy"] > 0.8
        assert result["iterations"] == STEPS * result["epochs"]
        assert all(np.isfinite(weight).all() for weight in result["weights"])

    def test_a_killed_parameter_server_is_an_error(self):
        with (
            ServerProcesses(workers=2, parameter_servers=2) as cluster,
            start_workers(
                leader_runs.train_through_faults, workers=1, env=cluster.chief_environment
            ) as chief,
        ):
            chief.wait_for_output(0, "epoch 2: 2 workers", timeout=PATIENCE)
            cluster.kill("ps", 1)
            error = chief.wait(timeout=PATIENCE)[0]["error"]
        assert error.startswith("Parameter server 1 (127.0.0.1:")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"optimizer": "sgd"},
            "`optimizer` must be a `tfqcomm.optimizers.LeaderSGD`.*Received: optimizer=SGD",
        ),
        (
            {"optimizer": optimizers.LeaderSGD(leader_compressor="bfloat16")},
            r"`leader_compressor` of the optimizer must be None.*leader_compressor=BFloat16\(\)",
        ),
        (
            {"optimizer": optimizers.LeaderSGD(use_ema=True)},
            "`use_ema` of the optimizer is not supported",
        ),
        ({"workers": 0}, "`workers` must be a positive integer. Received: workers=0"),
        ({"weight_compressor": "zip"}, "`weight_compressor` must be None.*'zip'"),
        ({"min_size": -1}, "`min_size` must be a non-negative integer."),
    ],
)
def test_refuses(arguments, message):
    arguments = {"optimizer": optimizers.LeaderSGD(), **arguments}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        LeaderTrainer(lambda: keras.Sequential([keras.Input([2])]), **arguments)
