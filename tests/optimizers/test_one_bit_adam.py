"""OneBitAdam against a NumPy reference written from the paper, by hand, and around its switch."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import logging

from tests.multi_process import run_workers
from tests.optimizers import reference
from tests.optimizers.memory_functions import train_one_bit_adam
from tests.optimizers.reference import OneBitAdamReference
from tests.replicas import (
    apply_gradients,
    assert_replicas_equal,
    build,
    compressing,
    plain,
    random_gradients,
)
from tfqcomm.callbacks import BackupAndRestore
from tfqcomm.compressors import TopK
from tfqcomm.optimizers import OneBitAdam
from tfqcomm.state.ledger import ledger_of

SHAPES = [(12, 10), (7,), ()]
CODECS = {
    "identity": ("identity", reference.identity),
    "block_sign": ("block_sign", reference.block_sign),
    "top_k": (TopK(0.1), reference.top_k),
}


def run(world, gradients, codec="block_sign", **kwargs):
    """The optimizer, its variables, their values at the start, and after each step."""

    def optimizer():
        schedule = "auto" if codec == "identity" else "all_gather"  # the reference's server
        arguments = {"compressor": CODECS[codec][0], "min_size": 0, "schedule": schedule}
        return OneBitAdam(1e-2, **(arguments | kwargs))

    strategy = plain(world)
    shapes = [g.shape[2:] for g in gradients]
    optimizer, variables = build(strategy, optimizer, shapes)
    start = [v.numpy() for v in variables]
    history = apply_gradients(strategy, optimizer, variables, gradients)
    assert_replicas_equal(strategy, variables + optimizer.variables)
    return optimizer, variables, start, history


def slots(optimizer, name):
    """The values of the slots `name`, in the order of the variables."""
    return [v.numpy() for v in optimizer.variables if v.path.endswith(f"_{name}")]


def assert_follows(start, actual, gradients, codec="block_sign", *, feedback=True, **kwargs):
    """Compares with the reference, step by step; returns the references."""
    references = []
    for x, history, of_variable in zip(start, actual, gradients, strict=True):
        expected = OneBitAdamReference(x, of_variable.shape[1], CODECS[codec][1], **kwargs)
        for step, of_workers in enumerate(of_variable):
            if not feedback:
                expected.delta[:] = 0
            np.testing.assert_allclose(
                history[step],
                expected.step(of_workers, 1e-2),
                rtol=0,
                atol=2e-5,
                err_msg=f"shape {x.shape} diverged from the reference at step {step}",
            )
        references.append(expected)
    return references


@pytest.mark.parametrize(
    ("world", "codec"),
    [
        (3, "block_sign"),
        pytest.param(1, "block_sign", marks=pytest.mark.slow),
        pytest.param(3, "top_k", marks=pytest.mark.slow),
    ],
)
def test_hundred_steps_are_those_of_the_paper(world, codec):
    """Both stages, the switch after 30 steps: 1 - beta_2^30 is 0.26 there."""
    gradients = random_gradients(100, world, SHAPES)
    options = {"warm_up": 30, "beta_1": 0.8, "beta_2": 0.99, "epsilon": 1e-4}
    optimizer, _, start, actual = run(world, gradients, codec, **options)
    references = assert_follows(start, actual, gradients, codec, **options)
    for i, expected in enumerate(references):
        np.testing.assert_allclose(slots(optimizer, "velocity")[i], expected.v, rtol=1e-5)
        np.testing.assert_allclose(slots(optimizer, "momentum")[i], expected.m, atol=2e-5)


@pytest.mark.slow
def test_without_error_feedback_what_is_left_out_is_lost():
    gradients = random_gradients(30, 2, SHAPES)
    _, _, start, actual = run(2, gradients, warm_up=10, error_feedback=False)
    assert_follows(start, actual, gradients, warm_up=10, feedback=False)


@pytest.mark.slow
def test_the_warm_up_is_keras_adam():
    """But for the place of epsilon."""
    gradients = random_gradients(20, 2, SHAPES)
    _, _, _, actual = run(2, gradients, warm_up=1000, epsilon=1e-16)
    strategy = compressing(2, "identity")
    adam, variables = build(strategy, lambda: keras.optimizers.Adam(1e-2, epsilon=1e-8), SHAPES)
    expected = apply_gradients(strategy, adam, variables, gradients)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_three_steps_by_hand():
    """Two workers, one step of warm-up, beta_1 = 1/2, learning rate 1.

    step  g_1    g_2     m/2 + g/2      with residuals  sent           m       x
    1     8  0   0   2   mean 4 1; without bias m = 4 1, v = 16 1             -1  -1
    2     4  2   0  -4   4 1.5|2 -1.5   the same        2.75 2.75|1.75 -1.75
                                                        m = 2.25 .5           -1.5625  -1.5
    3     0  0   0   0   1.125 .25; e = 1.25 -1.25 | .25 .25
                         2.375 -1 | 1.375 .5  ->  1.6875 -1.6875 | .9375 .9375
                                                        m = 1.3125 -.375      -1.890625  -1.125
    """
    strategy = plain(2)
    optimizer, (variable,) = build(
        strategy,
        lambda: OneBitAdam(1.0, 0.5, epsilon=1e-12, warm_up=1, min_size=0),
        [(2,)],
    )
    variable.assign([0.0, 0.0])
    gradients = np.float32([[[8, 0], [0, 2]], [[4, 2], [0, -4]], [[0, 0], [0, 0]]])
    (history,) = apply_gradients(strategy, optimizer, [variable], [gradients])
    expected = [[-1, -1], [-1.5625, -1.5], [-1.890625, -1.125]]
    np.testing.assert_allclose(history, expected, rtol=1e-5)


def shrinking(steps, world, shapes):
    """Gradients of random signs that shrink for 20 steps, and then keep their size."""
    factors = np.maximum(0.9 ** np.arange(steps), 0.9**20)
    signs = [np.sign(g[:, :1]) for g in random_gradients(steps, 1, shapes)]
    gradients = [np.repeat(g, world, axis=1) for g in signs]
    return [g * factors.reshape([-1, *[1] * (g.ndim - 1)]).astype("float32") for g in gradients]


@pytest.mark.parametrize("world", [1, 2])
def test_auto_switches_when_the_variance_has_settled(world):
    gradients = shrinking(100, world, [(40, 30)])
    options = {"warm_up": "auto", "beta_2": 0.9}
    optimizer, _, start, actual = run(world, gradients, **options)
    (expected,) = assert_follows(start, actual, gradients, **options)
    assert optimizer.switched_after == expected.warm_up
    assert 40 < expected.warm_up < 100


def test_auto_looks_at_all_variables_together():
    """A small one whose variance still falls does not hold back the switch."""
    (small,), (large,) = shrinking(20, 1, [(3,)]), random_gradients(20, 1, [(40, 30)])
    optimizer, *_ = run(1, [small, large], warm_up="auto", beta_2=0.8)
    assert optimizer.switched_after == 10  # 2 delta
    optimizer, *_ = run(1, [small], warm_up="auto", beta_2=0.8)
    assert optimizer.switched_after is None


def test_a_step_that_is_skipped_when_the_variance_is_looked_at_is_no_second_look():
    """Compared with itself it would have settled."""
    gradients = shrinking(12, 2, [(40, 30)])
    gradients[0] = np.insert(gradients[0], 5, np.nan, axis=0)  # v_5 was looked at just before
    optimizer, *_ = run(2, gradients, warm_up="auto", beta_2=0.8)
    assert optimizer.iterations.numpy() == 12
    assert optimizer.switched_after is None


def test_a_variable_whose_first_gradient_comes_late_loses_its_own_bias():
    """Its v, frozen with the bias of two steps of 30, would be a fifteenth of itself."""
    optimizer, (early, late) = build(plain(), lambda: OneBitAdam(1e-2, warm_up=30), [(2,), (2,)])
    for step in range(31):
        if step < 28:
            optimizer.apply([np.float32([1, 1])], [early])
        else:
            optimizer.apply([np.float32([1, 1]), np.float32([3, -5])], [early, late])
    np.testing.assert_allclose(slots(optimizer, "velocity")[1], [9, 25], rtol=1e-5)


@pytest.mark.slow
def test_entries_without_a_gradient_in_the_warm_up_stay_finite():
    """Beside the root 1e-8 would make their steps 10,000 times as long."""
    gradients = random_gradients(60, 2, [(8, 8)])
    gradients[0][..., 0] = 0
    _, _, _, (history,) = run(2, gradients, warm_up=20, epsilon=1e-2)
    assert np.abs(history).max() < 10


X = np.random.default_rng(0).normal(size=[64, 40]).astype("float32")
Y = X[:, :1] ** 2


def compiled(world=2, compressor="block_sign", run_eagerly=False, **options):
    keras.utils.set_random_seed(0)
    with plain(world).scope():
        layers = [keras.layers.Dense(40, activation="tanh"), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input([40]), *layers])
        optimizer = OneBitAdam(0.01, compressor=compressor, min_size=0, **options)
        model.compile(optimizer, "mse", run_eagerly=run_eagerly)
    return model


def fit(model, epochs=1, **options):
    return model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, **options)


def sent(model):
    return ledger_of(model.optimizer).meter.read().bytes_sent


def test_switches_without_a_new_trace_and_sends_dense_until_then(monkeypatch):
    traced = []
    step = OneBitAdam.worker_step
    monkeypatch.setattr(OneBitAdam, "worker_step", lambda *a: traced.append(1) or step(*a))
    model = compiled(warm_up=8)
    fit(model)
    elements, traces = model.count_params(), len(traced)
    assert sent(model) == 8 * 4 * elements  # 2 (W - 1) / W = 1
    assert ledger_of(model.optimizer).residuals.norm() == 0
    before = sent(model)
    fit(model, 2)
    assert sent(model) - before < 16 * elements / 8 * 1.2
    assert ledger_of(model.optimizer).residuals.norm() > 0
    assert len(traced) == traces


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["two_phase", "all_gather"])
def test_eager_steps_are_those_of_the_graph(schedule):
    models = [compiled(warm_up=5, schedule=schedule, run_eagerly=e) for e in (False, True)]
    for model in models:
        fit(model)
    for a, b in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("compressor", ["adaptive_top_k", "ternary", "float16", "power_sgd"])
def test_other_compressors_go_through_the_switch(compressor):
    model = compiled(warm_up=4, compressor=compressor)
    losses = fit(model, 3).history["loss"]
    assert losses[-1] < losses[0]
    assert ledger_of(model.optimizer).meter.read().skipped_steps == 0


@pytest.mark.slow
@pytest.mark.parametrize("warm_up", [12, "auto"])
def test_a_run_that_was_interrupted_goes_on_to_the_bit(warm_up, tmp_path):
    """In the warm-up, and behind it: neither starts anew."""
    options = {"world": 1, "warm_up": warm_up, "beta_2": 0.75}
    expected = compiled(**options)
    fit(expected, 4)
    for begun in (1, 3):
        folder = tmp_path / str(begun)
        stopped = compiled(**options)
        backup = BackupAndRestore(folder, delete_checkpoint=False)
        fit(stopped, begun, callbacks=[backup])
        again = compiled(**options)
        fit(again, 4, callbacks=[BackupAndRestore(folder)])
        for a, b in zip(again.get_weights(), expected.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_saved_model_does_not_warm_up_again(tmp_path):
    model = compiled(world=1, warm_up="auto", beta_2=0.5)
    fit(model, 2)
    assert model.optimizer.switched_after is not None
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.switched_after == model.optimizer.switched_after
    fit(loaded)
    frozen = [slots(one.optimizer, "velocity") for one in (loaded, model)]
    for a, b in zip(*frozen, strict=True):
        np.testing.assert_array_equal(a, b)


def logged(monkeypatch, level):
    lines = []
    monkeypatch.setattr(logging, level, lambda text, *values: lines.append(text % values))
    return lines


def test_the_switch_is_logged_once(monkeypatch):
    lines, warnings = logged(monkeypatch, "info"), logged(monkeypatch, "warning")
    fit(compiled(warm_up=5), 2)
    assert not [line for line in warnings if "warm_up" in line]
    (line,) = [line for line in lines if "warm-up" in line]
    assert "over after 5 steps; from now on momenta travel as BlockSign(block=None)" in line


@pytest.mark.slow
def test_a_warm_up_that_outlasts_the_run_is_warned_of_once(monkeypatch):
    lines = logged(monkeypatch, "warning")
    model = compiled(warm_up=1000)
    fit(model, 2)
    model.optimizer.finalize_variable_values(model.trainable_variables)
    (line,) = [line for line in lines if "warm_up" in line]
    assert "`fit` ended after 16 steps within the warm-up (`warm_up=1000`)" in line


def steps_on_one_gradient(world):
    """The variable after four steps on a gradient that was computed outside of `strategy.run`."""
    strategy = plain(world)
    optimizer, (variable,) = build(
        strategy, lambda: OneBitAdam(0.1, warm_up=2, compressor="identity"), [(4, 4)]
    )
    gradient = tf.reshape(tf.range(16.0), [4, 4])

    @tf.function
    def step():
        strategy.run(lambda: optimizer.apply([gradient], [variable]))

    for _ in range(4):
        step()
    return variable.numpy()


def test_gradients_from_outside_of_the_replicas_count_once():
    """One tensor for all: the momentum must not be made of it once for each replica."""
    np.testing.assert_allclose(steps_on_one_gradient(2), steps_on_one_gradient(1), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"beta_1": 1.0}, r"`beta_1` must be a float in \[0, 1\). Received: beta_1=1.0"),
        ({"beta_2": -0.1}, r"`beta_2` must be a float in \[0, 1\). Received: beta_2=-0.1"),
        ({"epsilon": 0.0}, r"`epsilon` must be a positive float. Received: epsilon=0.0"),
        ({"warm_up": 0}, r"`warm_up` must be a positive integer.* or 'auto'. Received: warm_up=0"),
        ({"warm_up": True}, r"`warm_up` must be a positive integer.*Received: warm_up=True"),
        ({"warm_up": "long"}, r"`warm_up` must be .* or 'auto'. Received: warm_up='long'"),
    ],
)
def test_arguments_that_do_not_fit(arguments, text):
    with pytest.raises(ValueError, match=text):
        OneBitAdam(**arguments)


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_processes_switch_at_the_same_step_and_agree_with_one():
    one, two = run_workers(train_one_bit_adam)
    for a, b in zip(one["weights"], two["weights"], strict=True):
        np.testing.assert_array_equal(a, b)
    alone = train_one_bit_adam(plain(2))
    assert one["switched_after"] == two["switched_after"] == alone["switched_after"] > 0
    for a, b in zip(one["weights"], alone["weights"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert one["bytes"] == alone["bytes"]
