"""What was made outside a strategy's scope is named, before TensorFlow fails somewhere else."""

from __future__ import annotations

import contextlib

import keras
import pytest
import tensorflow as tf

from tfqcomm.distribute import scopes


@pytest.fixture
def strategy(mirrored_strategy):
    made = mirrored_strategy(2)
    scopes.expect_models_of(made)
    return made


def model(weights, optimizer, metrics):
    """Each part is made in the scope given for it."""
    with weights:
        built = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)], name="small")
    with optimizer:
        made = keras.optimizers.Adam(name="adam")
    with metrics:
        built.compile(made, "mse", metrics=[keras.metrics.MeanSquaredError(name="error")])
    return built


WRONG = [(i, o, m) for i in (0, 1) for o in (0, 1) for m in (0, 1) if i + o + m not in (0, 3)]


@pytest.mark.parametrize("inside", WRONG)
def test_parts_that_were_made_outside_are_named(strategy, inside):
    scope_of = [contextlib.nullcontext, strategy.scope]
    mixed = model(*(scope_of[i]() for i in inside))
    with pytest.raises(ValueError) as caught:
        scopes.check_scope(mixed)
    message = str(caught.value)
    assert "must be made in one `strategy.scope()`" in message
    assert "`with strategy.scope():`" in message
    names = ("the weights of model 'small'", "optimizer 'adam'", "metric 'loss'")
    for name, is_inside in zip(names, inside, strict=True):
        place = "in the scope of MirroredStrategy" if is_inside else "outside any scope"
        assert f"{name}: {place}" in message


def test_a_model_made_outside_and_trained_inside_is_named(strategy):
    nothing = contextlib.nullcontext()
    outside = model(nothing, nothing, nothing)
    with strategy.scope(), pytest.raises(ValueError) as caught:
        scopes.check_scope(outside)
    assert "the weights of model 'small': outside any scope" in str(caught.value)
    assert "this call of `fit`: in the scope of MirroredStrategy" in str(caught.value)


def test_scopes_of_two_strategies_are_told_apart(strategy, mirrored_strategy):
    other = mirrored_strategy(2)
    with pytest.raises(ValueError, match="optimizer 'adam': in the scope of MirroredStrategy at"):
        scopes.check_scope(model(strategy.scope(), other.scope(), other.scope()))


def test_a_model_made_in_the_scope_passes(strategy):
    inside = model(strategy.scope(), strategy.scope(), strategy.scope())
    scopes.check_scope(inside)
    with strategy.scope():
        scopes.check_scope(inside)


def test_models_that_are_not_built_pass(strategy):
    with strategy.scope():
        lazy = keras.Sequential([keras.layers.Dense(1)])
        lazy.compile("adam", "mse", metrics=["mae"])
    scopes.check_scope(lazy)


def test_a_model_made_and_trained_outside_is_warned_of_once(strategy, caplog):
    nothing = contextlib.nullcontext()
    for _ in range(2):
        scopes.check_scope(model(nothing, nothing, nothing))
    messages = [r.message for r in caplog.records if "outside `strategy.scope()`" in r.message]
    assert len(messages) == 1
    assert "Model 'small' was made outside" in messages[0]


def test_other_strategies_keep_their_own_rules(mirrored_strategy, strategy):
    other = mirrored_strategy(2)
    scopes.check_scope(model(other.scope(), contextlib.nullcontext(), other.scope()))
    assert tf.distribute.has_strategy() is False
