"""What people should not write: it works, or an error says what was received and what to do."""

from __future__ import annotations

import pytest

from tests.distribute import mistakes
from tests.multi_process import run_workers

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]


@pytest.fixture(scope="module")
def found():
    """For each mistake what each of two workers found."""
    workers = run_workers(mistakes.on_two_workers, timeout=240)
    return {name: [worker[name] for worker in workers] for name in workers[0]}


def errors(found, name):
    """The error of each worker, all of them ValueErrors with the same text after the first line."""
    texts = [worker["error"] for worker in found[name]]
    assert None not in texts, found[name]
    return texts


def test_a_model_made_outside_the_scope_is_named_with_the_lines_to_move(found):
    for text in errors(found, "model_made_outside_the_scope"):
        assert "the weights of model 'sequential': outside any scope" in text
        assert "in the scope of MultiWorkerMirroredStrategy" in text
        assert "`with strategy.scope():`" in text


def test_compiling_outside_the_scope_is_named(found):
    for text in errors(found, "compiled_outside_the_scope"):
        assert "optimizer 'sgd': outside any scope" in text
        assert "`compile` among them" in text


def test_a_model_of_each_workers_own_is_warned_of(found):
    for worker in found["all_made_outside_the_scope"]:
        assert worker["error"] is None
        (warning,) = worker["warnings"]
        assert "Model 'sequential' was made outside `strategy.scope()`" in warning
        assert "trains it alone" in warning


def test_a_learning_rate_of_the_chief_alone_is_an_error_that_gives_both(found):
    for text in errors(found, "scheduler_on_the_chief_alone"):
        assert text.startswith("ValueError")
        assert "learning_rate" in text
        assert "0.0001" in text or "1e-04" in text or "9.99" in text
        assert "worker 0 (127.0.0.1:" in text
        assert "worker 1 (127.0.0.1:" in text


def test_weights_that_drift_apart_are_an_error_at_the_next_epoch(found):
    for text in errors(found, "weights_changed_on_the_chief_alone"):
        assert text.startswith("ValueError")
        assert "weights" in text
        assert "worker 1 (127.0.0.1:" in text


@pytest.mark.parametrize(
    "name, epochs", [("early_stopping_on_the_chief_alone", 2), ("stopped_in_the_middle_by_one", 1)]
)
def test_who_stops_stops_all(found, name, epochs):
    first, second = (worker["returned"] for worker in found[name])
    assert first is not None, found[name]
    assert first == second
    assert first["epochs"] == epochs
    if name == "stopped_in_the_middle_by_one":
        assert first["iterations"] < 16  # at once, not at the end of the epoch


def test_an_epoch_ends_for_all_when_one_has_no_data_left(found):
    first, second = found["one_worker_has_less_data"]
    assert first["returned"] == second["returned"], (first, second)
    assert first["returned"]["steps"] == [0, 1, 2] * 2
    said = [text for text in first["warnings"] if "no data left" in text]  # it had more
    assert said
    assert "worker 1 (127.0.0.1:" in said[0]
    assert "after 3 steps" in said[0]
    assert "steps_per_epoch" in said[0]


def test_predict_on_the_chief_alone_says_who_does_what_and_what_to_do(found):
    for text in errors(found, "predict_on_the_chief_alone"):
        assert "worker 0 (127.0.0.1:" in text
        assert "worker 1 (127.0.0.1:" in text
        assert "predict" in text
        assert "fit" in text
        assert "on all workers" in text


def test_xla_which_would_replace_the_exchange_is_refused(found):
    for text in errors(found, "compiled_by_xla"):
        assert "Argument `jit_compile` of `compile` must not be True on several workers" in text
        assert "Received: jit_compile=True" in text
