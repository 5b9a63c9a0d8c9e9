"""What a user of one process expects: the same model, or an error that says why not."""

import functools

import numpy as np
import pytest

from tests.multi_process import run_workers
from tests.parameter_server import one_process_runs as runs

pytestmark = [pytest.mark.multi_process, pytest.mark.slow, pytest.mark.timeout(900)]

SAME = 1e-6


@functools.cache
def found():
    (result,) = run_workers(runs.everything, workers=1, timeout=600)
    return result


def assert_same(compared, tolerance=SAME):
    compared = dict(compared)
    assert compared.pop("moved") > 1e-2
    assert max(compared.values()) <= tolerance, compared


def test_a_loss_scale_of_compile_does_not_shrink_gradients():
    """They were divided by 2 ** 15, never having been multiplied: the loss did not move."""
    assert_same(found()["mixed precision"]["default"])


@pytest.mark.parametrize("way", ["sync 1", "sync 2", "async 1", "leader 1"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_loss_scale_is_that_of_one_process(kind, way):
    weights, scale = found()["mixed precision"][kind][way]
    # Of two halves of a batch each is rounded to float16.
    assert weights <= (1e-3 if way == "sync 2" else SAME)
    if kind == "dynamic":
        assert scale == found()["mixed precision"]["scale"]


def test_a_loss_scale_leaves_an_optimizer_its_compressor_and_its_workers_half():
    result = found()["mixed precision"]["qadam"]
    slots = {name.rpartition("/")[0] for name in result["memory"]}
    assert slots == {"residual", "worker/m", "worker/v"}
    assert result["loss"][-1] < 0.8 * result["loss"][0]
    parameters = 6 * 16 + 16 + 16 + 1
    assert result["pushed"] < 0.6 * 4 * parameters * 8 * runs.STEPS


@pytest.mark.parametrize("name", ["NonNeg", "UnitNorm", "MaxNorm"])
def test_constraints_are_not_ignored(name):
    assert_same(found()["constraints"][name])


def test_frozen_weights_that_are_set_between_two_fits_reach_the_workers():
    assert found()["frozen weights"] <= SAME


def test_the_optimizers_copy_knows_what_not_to_decay():
    assert_same(found()["excluded"])


def test_metrics_of_an_evaluate_before_do_not_stay_in_those_of_fit():
    one, servers = found()["evaluated first"]
    np.testing.assert_allclose(servers, one, rtol=1e-6)


def test_what_has_no_gradient_does_not_decay():
    assert_same(found()["unused"])


def test_workers_draw_different_dropout_masks():
    kernel = found()["dropped"]
    assert set(kernel) == {0.0, -1.0, -2.0}  # -1: one of two workers has dropped the input


def test_one_worker_draws_the_dropout_masks_of_one_process():
    assert_same(found()["dropout"])


def test_extremes_of_two_workers_are_not_added_up():
    extremes = found()["extremes"]
    for name, extreme in (("maximum", np.max), ("minimum", np.min)):
        np.testing.assert_allclose(extremes["two"][name], [extreme(extremes["y"])] * 2, rtol=1e-6)


def test_a_metric_that_cannot_be_combined_is_refused_by_name():
    extremes = found()["extremes"]
    assert extremes["last"] == pytest.approx(float(extremes["y"][-1, 0, 0, 0]))
    assert "must add to its states" in extremes["error"]
    assert "Received: last/value, with workers=2" in extremes["error"]


def test_tensors_that_travel_alone_arrive_as_those_in_a_row():
    result = found()["long tensors"]
    assert_same(result["weights"])
    assert result["change"] == dict.fromkeys(["up", "up, in rounds", "down"], 0)


def test_a_worker_that_pulls_ahead_computes_at_the_weights_of_a_step_before():
    far = found()["pulled ahead"]
    assert far == pytest.approx(dict.fromkeys(["in a row", "alone", "of any length"], 0), abs=1e-5)


def test_a_server_without_pieces_does_not_hold_the_version_back():
    """RandomK sent the same coordinates for ever, and all messages were called stale."""
    result = found()["more servers than pieces"]
    assert result["reached"] > 0.15
    assert max(result["staleness"]) <= 1


def test_several_outputs_regularizers_and_weights_are_those_of_one_process():
    compiled = found()["compiled"]
    assert_same(compiled["weights"])
    assert compiled["servers"].keys() == compiled["one"].keys()
    for name, values in compiled["one"].items():
        np.testing.assert_allclose(compiled["servers"][name], values, rtol=1e-5)


def test_class_weights_are_those_of_one_process():
    assert found()["class weights"] <= SAME


def test_an_override_of_compute_loss_without_training_works():
    assert_same(found()["compiled"]["old loss"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("freeze", "The optimizer and the layers to train must stay as they were in the first"),
        ("split", "must leave variable 0 whole: a step of Lamb depends on the whole of a"),
        ("all_frozen", "The model must have trainable weights."),
        ("assigned", "must not assign weights that are trained, as `SpectralNormalization` does"),
    ],
)
def test_refuses(name, message):
    assert message in found()["refusals"][name]


@pytest.mark.parametrize("name", runs.LAYERS)
def test_layers_and_their_states_are_those_of_one_process(name):
    assert found()["layers"][name] <= 1e-5


def test_backups_within_an_asynchronous_epoch_are_of_one_version():
    """Variables of one backup were of different steps, and residuals of yet another."""
    result = found()["torn backups"]
    assert max(result["errors"]) == 0.0
    assert result["versions"] == sorted(result["versions"])


@pytest.mark.parametrize("name", ["CompAMS", "QAdam", "LeaderSGD"])
def test_a_trainer_and_its_model_may_train_by_turns(name):
    """`model.fit` after `fit` ended in an AttributeError: what workers have was no use to it."""
    result = dict(found()["taking turns"][name])
    assert result.pop("keys")
    assert_same(result)


def test_trainers_are_freed():
    assert found()["freed"] == 0


def test_many_servers_and_trainers_do_not_warn_of_retracing():
    assert not [line for line in found()["warnings"] if "retracing" in line]


def test_a_long_run_does_not_grow_by_what_each_step_reports():
    """Every tensor that the chief fetched left 3 KB behind: 6 to 8 KB a round of two workers."""
    (bytes_a_round,) = run_workers(runs.growth, workers=1, args={"mode": "sync"}, timeout=300)
    assert bytes_a_round < 2500
