"""`Trainer.fit` is Keras' `fit` to its callbacks, and learns whatever travels in whichever form."""

import functools

import numpy as np
import pytest

from tests.multi_process import run_workers
from tests.parameter_server import runs

pytestmark = [pytest.mark.multi_process, pytest.mark.timeout(600)]

PARAMETERS = 20 * 64 + 64 + 2 * 64 + 64 * 4 + 4
STATISTICS = 2 * 64


@functools.cache
def run(function, *args):
    (result,) = run_workers(function, workers=1, args=dict(args), timeout=400)
    return result


def fitted():
    return run(runs.fit_like_keras)


def test_callbacks_see_what_keras_shows_them():
    between = [f"epoch {i} {what}" for i in range(6) for what in ("begin", "end")]
    assert fitted()["events"] == ["train begin", *between, "train end"]
    assert len(fitted()["batches"]) == 6 * runs.STEPS
    assert fitted()["batches"][0].keys() == {"loss", "accuracy", "top_2"}
    np.testing.assert_allclose(fitted()["rates"], 1e-2 / 2.0 ** np.arange(6), rtol=1e-6)


def test_history_and_validation():
    history = fitted()["history"]
    assert fitted()["epochs"] == list(range(6))
    names = {"loss", "accuracy", "top_2"}
    assert history.keys() == names | {f"val_{name}" for name in names} | {"learning_rate"}
    assert history["loss"][-1] < history["loss"][0] / 2
    assert history["val_accuracy"][-1] > 0.85
    for name in names:
        np.testing.assert_allclose(fitted()["evaluated"][name], history[f"val_{name}"][-1], 1e-5)
        np.testing.assert_allclose(fitted()["batches"][-1][name], history[name][-1])


def test_a_second_fit_goes_on_and_stops_when_told():
    assert fitted()["stopped"] == ["train begin", "epoch 0 begin", "epoch 0 end", "train end"]
    assert fitted()["iterations"] == 6 * runs.STEPS + 3


def test_bytes_are_those_of_the_codecs():
    kernels = (20 * 64, 64 * 4)
    rest = PARAMETERS - sum(kernels) + STATISTICS
    up = sum(1 + n // 32 for n in kernels) + rest
    headers = 2 * 2 + len(kernels)  # two servers
    down = sum(1 + 8 * n // 32 for n in kernels) + rest + headers
    for record in fitted()["traffic"]:
        assert record["steps"] == runs.STEPS
        assert record["bytes_sent"] == 4 * up * runs.STEPS
        assert record["bytes_pulled"] == 4 * down * runs.STEPS
        assert record["dense_bytes"] == 4 * 2 * (PARAMETERS + STATISTICS) * runs.STEPS
        assert record["residual_norm_ratio"] > 0
    for worker in fitted()["totals"]:
        assert worker["messages"] == 6 * runs.STEPS + 3
        assert worker["bytes_pushed"] == 4 * up * worker["messages"]
        assert worker["bytes_pulled"] == 4 * down * worker["messages"]


def pulls():
    return run(runs.compare_pulls)


@pytest.mark.slow
@pytest.mark.parametrize("name", runs.PULLS)
def test_learns_from_encoded_weights(name):
    assert pulls()[name]["accuracy"] > 0.8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bits"), [("bfloat16", 16), ("block_int8", 8.2), ("uniform_grid", 8)]
)
def test_encoded_weights_are_shorter(name, bits):
    kernels = 20 * 64 + 64 * 4
    saved = pulls()["dense"]["pulled"][0] - pulls()[name]["pulled"][0]
    assert saved == pytest.approx(runs.STEPS * kernels * (32 - bits) / 8, rel=0.02)


@pytest.mark.slow
def test_sparse_weights_are_exact_and_shorter():
    sparse, dense = pulls()["sparse"], pulls()["dense"]
    for a, b in zip(sparse["weights"], dense["weights"], strict=True):
        np.testing.assert_array_equal(a, b)
    kernels = [sparse["weights"][i] for i in (0, 6)]
    assert [np.mean(kernel == 0) > 0.1 for kernel in kernels] == [True, True]
    assert sparse["pulled"][-1] < 0.8 * dense["pulled"][-1]


@pytest.mark.slow
def test_parts_of_a_variable_are_as_good_as_the_whole():
    whole, parts = run(runs.partition_or_not)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-6)


def test_backup_and_restore(tmp_path):
    found = run(runs.back_up_and_restore, ("directory", str(tmp_path)))
    assert list(found["first"]) == ["begin", "epoch 0", "epoch 1"]
    assert list(found["second"]) == ["begin", "epoch 2", "epoch 3"]
    saved, restored = found["first"]["epoch 1"], found["second"]["begin"]
    for kind in ("weights", "slots"):
        for a, b in zip(restored[kind], saved[kind], strict=True):
            np.testing.assert_array_equal(a, b)
    assert restored["memory"].keys() == saved["memory"].keys()
    assert {name.split("/")[0] for name in saved["memory"]} == {"residual", "worker"}
    for name, value in saved["memory"].items():
        np.testing.assert_allclose(restored["memory"][name], value, atol=1e-6)
        assert np.abs(value).max() > 0
    assert int(found["second"]["epoch 3"]["slots"][0]) == 4 * runs.STEPS


@pytest.mark.slow
def test_a_backup_within_an_epoch_has_the_weights_of_that_moment(tmp_path):
    found = run(runs.back_up_within_an_epoch, ("directory", str(tmp_path)))
    epoch, restored = found["restored"]
    assert epoch == 1  # begins again
    for a, b in zip(restored, found["saved"], strict=True):
        np.testing.assert_array_equal(a, b)
    assert found["iterations"] == 2 * runs.STEPS + 5
    assert np.abs(restored[0] - found["initial"][0]).max() > 0.01
