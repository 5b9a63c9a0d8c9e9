"""Workers that train alone: whose learning rate it is."""

import types

import keras
import pytest

from tfqcomm.optimizers import LeaderSGD
from tfqcomm.parameter_server.alone import pass_rate_on

OPTIMIZERS = [LeaderSGD, keras.optimizers.Adam]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_chief_leaves_a_schedule_to_the_workers(optimizer):
    """It lags behind them: what it would say now and then is the rate of the step before."""
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5)
    workers = [types.SimpleNamespace(learning_rate=0.05) for _ in range(2)]
    assert pass_rate_on(optimizer(schedule), workers) is None
    assert [worker.learning_rate for worker in workers] == [0.05, 0.05]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_a_callback_sets_reaches_all_workers(optimizer):
    made = optimizer(0.1)
    made.learning_rate = 0.025
    workers = [types.SimpleNamespace(learning_rate=0.1) for _ in range(2)]
    assert pass_rate_on(made, workers) == pytest.approx(0.025)
    assert [worker.learning_rate for worker in workers] == pytest.approx([0.025, 0.025])
