"""Learners that train alone with any optimizer, and fragments that servers merge."""

import functools
import tempfile

import keras
import numpy as np
import pytest

from tests.multi_process import run_workers, start_workers
from tests.parameter_server import diloco_runs
from tests.parameter_server.cluster import ServerProcesses
from tests.parameter_server.runs import STEPS
from tests.parameter_server.test_diloco_merge import Reference
from tfqcomm import optimizers
from tfqcomm.optimizers.local.pieces import deal
from tfqcomm.parameter_server import DiLoCoTrainer

SIZES = (20 * 64, 64, 64, 64, 64 * 4, 4)
EPOCHS = 6
PATIENCE = 240


@functools.cache
def results(name):
    with tempfile.TemporaryDirectory() as directory:
        args = {"name": name, "directory": directory}
        (result,) = run_workers(diloco_runs.found, workers=1, args=args, timeout=500)
    return result


@pytest.mark.multi_process
@pytest.mark.timeout(600)
class TestFit:
    def test_learns(self):
        history = results("fit")["history"]
        assert history["val_accuracy"][-1] > 0.85
        assert history["loss"][-1] < history["loss"][0] / 2

    def test_the_model_has_the_global_weights_and_learners_have_their_own(self):
        result = results("fit")
        for name, value in result["evaluated"].items():
            np.testing.assert_allclose(value, result["history"][f"val_{name}"][-1], rtol=1e-5)
        moving = np.concatenate(result["statistics"])
        np.testing.assert_allclose(moving, np.mean(result["each_statistics"], 0), rtol=1e-5)
        kernels = [each[0] for each in result["each"]]
        assert np.ptp(kernels, axis=0).max() > 1e-3
        # They are near to one another all the same: no further than one of them has come.
        apart = max(np.linalg.norm(kernel - result["weights"][0]) for kernel in kernels)
        assert 0 < apart < np.linalg.norm(result["weights"][0])

    def test_every_step_is_counted_once(self):
        result = results("fit")
        assert sum(worker["steps"] for worker in result["workers"]) == 4 * STEPS * EPOCHS
        assert result["iterations"] == STEPS * EPOCHS
        assert [record["steps"] for record in result["traffic"]] == [STEPS] * EPOCHS

    def test_rounds_come_as_often_as_they_are_to(self):
        result = results("fit")
        most = STEPS * EPOCHS // 4  # every / fragments
        assert most * 2 // 3 <= result["rounds"] <= most
        taken = sum(worker["taken"] for worker in result["workers"])
        assert 3 * result["rounds"] <= taken <= 4 * most  # a quorum: all but one

    def test_bytes_are_those_of_answers_and_fragments(self):
        result = results("fit")
        assert deal(SIZES, 2) == [[0], [1, 2, 3, 4, 5]]
        first = 1280 // 4 + 1280 // 256  # words: a byte for each entry, a scale for each block
        second = 256 // 4 + 1 + 3 * 64 + 4
        for worker in result["workers"]:
            answers = worker["taken"] + worker["dropped"]
            of_first = (worker["bytes_pushed"] / 4 - second * answers) / (first - second)
            assert of_first == int(of_first) and abs(of_first - answers / 2) <= answers / 4
            assert 0 < worker["bytes_pulled"] <= 4 * sum(SIZES) * (result["rounds"] + 1) / 2
            assert worker["bytes_pulled"] % 16 == 0
        sent = sum(record["bytes_sent"] for record in result["traffic"])
        pushed = sum(worker["bytes_pushed"] for worker in result["workers"])
        assert sent == pytest.approx(pushed / 4, abs=EPOCHS * STEPS)


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.timeout(600)
def test_one_learner_that_averages_itself_does_what_its_inner_optimizer_does():
    found, expected, (rounds,) = results("alone")
    assert rounds == 2 * STEPS // 2
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, other, atol=1e-5)


@pytest.mark.multi_process
@pytest.mark.timeout(600)
def test_servers_merge_as_the_paper_says():
    result = results("merge")
    before, first, second = result["theta"]
    learners = result["learners"]
    sizes = [80, 12 * 8, 8, 8 * 4, 4]
    assert [weight.size for weight in before] == sizes
    assert sorted(place for places in deal(sizes, 2) for place in places) == [*range(5)]
    for place in range(5):
        reference = Reference(before[place], rate=0.7, momentum=0.9)
        # Both answers are differences to what the learners took last: `before`.
        deltas = [before[place] - learners[rank][place] for rank in (0, 2)]
        assert all(np.abs(delta).max() > 1e-3 for delta in deltas)
        for found in (first, second):
            expected = reference.round(deltas, [3.0, 1.0], embedding=place == 0)
            np.testing.assert_allclose(found[place], expected, atol=1e-5)
        mixed = 0.75 * learners[1][place] + 0.25 * second[place]
        np.testing.assert_allclose(result["mixed"][place], mixed, atol=1e-5)


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.timeout(600)
def test_a_learner_whose_weights_are_not_finite_begins_again_from_the_global_ones():
    result = results("spoiled")
    assert result["workers"][1]["taken"] > result["before"][1]["taken"]
    for weights in (*result["each"], result["weights"]):
        assert all(np.isfinite(weight).all() for weight in weights)


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.timeout(600)
def test_a_backup_keeps_global_weights_outer_momenta_and_inner_states():
    first, second = results("backup")
    kept, restored = first["end"]["kept"], second["begin"]["kept"]
    assert kept.keys() == restored.keys()
    parts = {key.rpartition("/")[0] for key in kept}
    assert {"worker/inner", "shared/global", "shared/outer_momentum"} <= parts
    for key in kept:
        np.testing.assert_allclose(restored[key], kept[key], atol=1e-6, err_msg=key)
    assert max(np.abs(v).max() for k, v in kept.items() if "outer_momentum" in k) > 0
    for one, other in zip(second["begin"]["servers"], first["end"]["servers"], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert second["begin"]["iterations"] == first["end"]["iterations"] == 2 * STEPS
    assert second["begin"]["steps"] == [2 * STEPS] * 2
    assert second["end"]["iterations"] == 4 * STEPS  # it began its last epoch again


@pytest.mark.multi_process
@pytest.mark.timeout(900)
@pytest.mark.slow
class TestRealProcesses:
    def test_a_slow_worker_does_not_slow_the_others(self):
        fast, slow = 0.05, 0.15
        paces = {"seconds": [[fast] * 4, [fast] * 3 + [slow]]}
        with (
            ServerProcesses(workers=4, parameter_servers=2) as cluster,
            start_workers(
                diloco_runs.train_with_a_slow_worker,
                workers=1,
                args=paces,
                env=cluster.chief_environment,
            ) as chief,
        ):
            equal, uneven = chief.wait(timeout=PATIENCE)[0]
        assert sum(uneven["steps"]) == sum(equal["steps"]) == 4 * 100
        *quick, late = uneven["steps"]
        assert min(quick) > 2 * late  # 3, but for the ends of epochs
        # Three and a third workers share the steps of four: waiting would take 3 times as long.
        assert uneven["seconds"] < 1.8 * equal["seconds"]
        assert uneven["accuracy"] > equal["accuracy"] - 0.1
        assert uneven["workers"][3]["taken"] > 0

    def test_a_killed_worker_is_done_without_until_it_is_back(self):
        with (
            ServerProcesses(workers=3, parameter_servers=2) as cluster,
            start_workers(
                diloco_runs.train_through_faults, workers=1, env=cluster.chief_environment
            ) as chief,
        ):
            chief.wait_for_output(0, "epoch 2: 3 workers", timeout=PATIENCE)
            cluster.kill("worker", 1)
            chief.wait_for_output(0, ": 2 workers", timeout=PATIENCE)
            cluster.start("worker", 1)
            result = chief.wait(timeout=PATIENCE)[0]
        assert [worker["alive"] for worker in result["workers"]] == [True] * 3
        assert result["accuracy"] > 0.8
        assert result["iterations"] == STEPS * result["epochs"]
        assert all(np.isfinite(weight).all() for weight in result["weights"])

    def test_a_killed_parameter_server_is_an_error(self):
        with (
            ServerProcesses(workers=3, parameter_servers=2) as cluster,
            start_workers(
                diloco_runs.train_through_faults, workers=1, env=cluster.chief_environment
            ) as chief,
        ):
            chief.wait_for_output(0, "epoch 2: 3 workers", timeout=PATIENCE)
            cluster.kill("ps", 1)
            error = chief.wait(timeout=PATIENCE)[0]["error"]
        assert error.startswith("Parameter server 1 (127.0.0.1:")


def diloco(inner=None, **arguments):
    return {"optimizer": optimizers.DiLoCo(inner or keras.optimizers.SGD(0.1), 4, **arguments)}


def excluding():
    inner = keras.optimizers.AdamW(0.1)
    inner.exclude_from_weight_decay(var_names=["bias"])
    return inner


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"optimizer": "sgd"},
            "`optimizer` must be a `tfqcomm.optimizers.DiLoCo`.*Received: optimizer=SGD",
        ),
        (
            {"optimizer": optimizers.SparseLoCo(keras.optimizers.SGD(0.1))},
            "`optimizer` must be a `tfqcomm.optimizers.DiLoCo`.*Received: optimizer=SparseLoCo",
        ),
        (diloco(overlap=1), "`overlap` of the optimizer must be 0.*Received: overlap=1"),
        (diloco(merge=0.5), "`merge` of the optimizer must be 1: use `mixing`.*merge=0.5"),
        (diloco(error_feedback=True), "`error_feedback` of the optimizer must be 'auto' or False"),
        (diloco(schedule="dense"), "`schedule` of the optimizer must be 'auto'.*='dense'"),
        (diloco(granularity="model"), "`granularity` of the optimizer must be 'tensor'"),
        (diloco(warm_up=3), "`warm_up` of the optimizer is not supported.*warm_up=3"),
        (diloco(compressor="power_sgd"), "`compressor` must be one whose messages a server"),
        (diloco(compressor={"*": None}), "`compressor` must be one compressor with parameter"),
        (
            diloco(keras.optimizers.SGD(lambda: 0.1)),
            "`learning_rate` of `inner` must be a float.*Received: inner=SGD with a callable",
        ),
        (diloco(excluding()), "`inner` must not exclude variables from weight decay yet"),
        ({"mixing": 0.0}, r"`mixing` must be a number in \(0, 1\]. Received: mixing=0.0"),
        ({"quorum": 0}, "`quorum` must be.*Received: quorum=0"),
        ({"grace": -1.0}, "`grace` must be.*Received: grace=-1.0"),
        ({"grace_seconds": -1.0}, "`grace_seconds` must be.*Received: grace_seconds=-1.0"),
        ({"workers": 0}, "`workers` must be a positive integer. Received: workers=0"),
    ],
)
def test_refuses(arguments, message):
    arguments = {**diloco(), **arguments}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        DiLoCoTrainer(lambda: keras.Sequential([keras.Input([2])]), **arguments)
