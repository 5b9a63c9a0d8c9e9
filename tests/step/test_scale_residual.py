"""Residuals that follow the learning rate: what is owed moves the weights as it would have."""

import keras
import numpy as np
import pytest

from tests.replicas import apply_gradients, build, compressing, random_gradients
from tests.rungs import slow_unless
from tests.step.error_feedback_reference import means_of_messages, sgd
from tfqcomm.callbacks import BackupAndRestore
from tfqcomm.compressors import AdaptiveTopK, BlockSign, PowerSGD, Ternary, TopK
from tfqcomm.optimizers import CompAMS, DiLoCo, QAdam
from tfqcomm.parameter_server.optimizers import options_of
from tfqcomm.state.ledger import ledger_of, restore_state
from tfqcomm.step import ExchangeOptions

SHAPES = [(40, 30), (7,)]
STEPS = 20
RATES = [0.1] * 7 + [0.05] * 6 + [0.4] * 7
CODECS = [
    (TopK(0.1), {"schedule": "all_gather"}),
    (TopK(0.1), {"schedule": "two_phase"}),
    (BlockSign(), {"schedule": "two_phase"}),
    (BlockSign(), {"granularity": "model"}),
    (Ternary(clip=1.0, shared_scale=True), {"error_feedback": True}),
    ("float16", {}),
    (AdaptiveTopK(0.1), {}),
    (PowerSGD(2), {}),
]


def schedule(rates=RATES):
    """A rate for each step, as Keras' piecewise constants."""
    changes = [i for i in range(1, len(rates)) if rates[i] != rates[i - 1]]
    if not changes:
        return rates[0]
    values = [rates[0], *(rates[i] for i in changes)]
    boundaries = [i - 1 for i in changes]  # up to and including
    return keras.optimizers.schedules.PiecewiseConstantDecay(boundaries, values)


def run(compressor, gradients, rates=RATES, *, scale=True, **options):
    """SGD in one trace: itself, its start, and the values after each step."""
    strategy = compressing(2, compressor, scale_residual=scale, **options)
    optimizer, variables = build(strategy, lambda: keras.optimizers.SGD(schedule(rates)), SHAPES)
    start = [v.numpy() for v in variables]
    return optimizer, start, apply_gradients(strategy, optimizer, variables, gradients)


@pytest.mark.parametrize("codec", [TopK(0.1), BlockSign()], ids=str)
@pytest.mark.parametrize("scale", [True, False])
def test_steps_are_those_of_a_reference(codec, scale):
    gradients = random_gradients(STEPS, 2, SHAPES)
    _, start, found = run(codec, gradients, scale=scale, schedule="all_gather")
    means = means_of_messages([codec, codec], gradients, RATES if scale else None)
    for before, values, mean in zip(start, found, means, strict=True):
        np.testing.assert_allclose(values, sgd(before, mean, RATES), atol=2e-5)


@pytest.mark.parametrize(
    ("codec", "options"),
    slow_unless(
        lambda codec, options: options.get("schedule") == "two_phase" or codec == PowerSGD(2),
        CODECS,
    ),
    ids=str,
)
def test_every_gradient_moves_the_weights_at_its_own_rate(codec, options):
    """With what is still owed, at the last rate, nothing is lost and nothing counts more."""
    gradients = random_gradients(STEPS, 2, SHAPES)
    optimizer, start, found = run(codec, gradients, **options)
    owed = ledger_of(optimizer).residuals.total()
    for index, (before, values, g) in enumerate(zip(start, found, gradients, strict=True)):
        expected = sgd(before, g.mean(axis=1, dtype=np.float32), RATES)[-1]
        rest = owed.get(str(index), np.zeros(before.size, np.float32)).reshape(before.shape)
        np.testing.assert_allclose(values[-1] - RATES[-1] * rest, expected, atol=2e-3)
    unscaled, _, _ = run(codec, gradients, scale=False, **options)
    other = ledger_of(unscaled).residuals.total()["0"]
    assert np.abs(other - owed["0"]).max() > 1e-3 or codec == "float16"


def test_a_constant_rate_changes_no_bit():
    gradients = random_gradients(STEPS, 2, SHAPES)
    (_, _, scaled), (_, _, plain) = (
        run(BlockSign(), gradients, [0.1] * STEPS, scale=scale) for scale in (True, False)
    )
    np.testing.assert_array_equal(scaled[0], plain[0])


def test_a_rate_of_zero_leaves_open_what_a_residual_is_worth():
    """The reference, with the last rate above zero in its place."""
    rates = [0.0] * 3 + [0.2] * 4 + [0.0] * 3 + [0.1] * 10
    worth = [0.2] * 10 + [0.1] * 10
    gradients = random_gradients(STEPS, 2, SHAPES)
    _, start, found = run(TopK(0.1), gradients, rates, schedule="all_gather")
    means = means_of_messages([TopK(0.1)] * 2, gradients, worth)
    for before, values, mean in zip(start, found, means, strict=True):
        np.testing.assert_allclose(values, sgd(before, mean, rates), atol=2e-5)


@pytest.mark.slow
def test_a_step_that_is_skipped_scales_nothing_twice():
    gradients = random_gradients(STEPS, 2, SHAPES)
    bad = [np.insert(g, 8, np.nan, axis=0) for g in gradients]
    _, _, expected = run(TopK(0.1), gradients)
    _, _, found = run(TopK(0.1), bad)
    for values, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.delete(values, 8, axis=0), wanted)


def test_a_warm_up_leaves_residuals_as_they_are():
    gradients = random_gradients(STEPS, 2, SHAPES)
    rates = [0.4] * 5 + [0.1] * 15
    _, start, found = run(TopK(0.1), gradients, rates, warm_up=5, schedule="all_gather")
    for before, values, g in zip(start, found, gradients, strict=True):
        dense = g[:5].mean(axis=1, dtype=np.float32)
        (later,) = means_of_messages([TopK(0.1)], [g[5:]], rates[5:])
        np.testing.assert_allclose(
            values, sgd(before, np.concatenate([dense, later]), rates), atol=2e-5
        )


X = np.random.default_rng(0).normal(size=[32, 16]).astype("float32")


def compiled(optimizer, **options):
    keras.utils.set_random_seed(0)
    strategy = compressing(1, TopK(0.2), scale_residual=True, **options)
    with strategy.scope():
        model = keras.Sequential([keras.Input([16]), keras.layers.Dense(8)])
        model.compile(optimizer(), "mse")
    return model


def fit(model, epochs, *callbacks, **kwargs):
    halved = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 * 0.5**epoch)
    kwargs |= {"batch_size": 8, "epochs": epochs, "shuffle": False, "verbose": 0}
    model.fit(X, X[:, :8], callbacks=[halved, *callbacks], **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.SGD(0.1, momentum=0.9),
        lambda: CompAMS(0.1, compressor=TopK(0.2), min_size=0, scale_residual=True),
    ],
)
def test_callbacks_may_set_the_rate_and_backups_keep_it(optimizer, tmp_path, monkeypatch):
    traced = []
    kind = type(optimizer())
    update = kind.update_step
    monkeypatch.setattr(kind, "update_step", lambda *a: traced.append(1) or update(*a))
    expected, stopped, again = (compiled(optimizer) for _ in range(3))
    fit(expected, 1)
    traces = len(traced)
    for epoch in range(1, 4):
        fit(expected, epoch + 1, initial_epoch=epoch)
    assert len(traced) == traces
    assert ledger_of(expected.optimizer).state()["residual_rate/last"] == np.float32(0.1 / 8)
    fit(stopped, 2, BackupAndRestore(tmp_path, delete_checkpoint=False))
    fit(again, 4, BackupAndRestore(tmp_path))
    for a, b in zip(again.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_a_restored_run_owes_without_feedback_is_paid_at_its_own_rate():
    """A run of rate 0.4 owes e; the next one, of rate 0.1 and dense, moves 0.4 e for it."""
    gradients = random_gradients(6, 2, SHAPES)
    optimizer, start, found = run(TopK(0.1), gradients, [0.4] * 6)
    state = ledger_of(optimizer).state()
    strategy = compressing(2, None, scale_residual=True)
    other, variables = build(strategy, lambda: keras.optimizers.SGD(0.1), SHAPES)

    restore_state(other, state)
    for variable, values in zip(variables, found, strict=True):
        variable.assign(values[-1])
    nothing = [np.zeros([2, 2, *shape], np.float32) for shape in SHAPES]
    after = apply_gradients(strategy, other, variables, nothing)
    for before, values, g in zip(start, after, gradients, strict=True):
        expected = sgd(before, g.mean(axis=1, dtype=np.float32), [0.4] * 6)[-1]
        np.testing.assert_allclose(values[-1], expected, atol=2e-5)


def test_arguments():
    with pytest.raises(ValueError, match="`scale_residual` must be a bool. Received: scale_res"):
        ExchangeOptions("top_k", scale_residual=1)
    with pytest.raises(ValueError, match="`scale_residual` of the optimizer is not supported"):
        options_of(QAdam(scale_residual=True), 1)
    with pytest.raises(ValueError, match="not recognized: .*scale_residual"):
        DiLoCo(keras.optimizers.SGD(), 2, scale_residual=True)
    assert "scale_residual" not in DiLoCo(keras.optimizers.SGD(), 2).get_config()
    assert QAdam.from_config(QAdam(scale_residual=True).get_config()).options.scale_residual
