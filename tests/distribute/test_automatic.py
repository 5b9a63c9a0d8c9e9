"""`compressor="auto"`: dense where it is fast, 8 bits where the link is slow, for all the same."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.costs.slow_transport import Clock, SlowTransport
from tests.distribute import automatic_functions
from tests.multi_process import run_workers
from tests.network import network
from tfqcomm import compressors, distribute
from tfqcomm.costs import exchange
from tfqcomm.costs.simulated import SimulatedTransport
from tfqcomm.distribute import automatic
from tfqcomm.state.ledger import ledger_of
from tfqcomm.step.options import ExchangeOptions

OPTIONS = ExchangeOptions(compressors.Identity())


@pytest.fixture
def said(monkeypatch):
    """What is logged."""
    lines = []
    monkeypatch.setattr(automatic.logging, "info", lambda text, *args: lines.append(text % args))
    return lines


@pytest.fixture
def clock(monkeypatch):
    """Time that passes on the link alone: no machine is too slow, or too busy, for a test."""
    clock = Clock()
    monkeypatch.setattr(automatic.link, "time", clock)
    monkeypatch.setattr(automatic.link, "_long", lambda transport, collective: 2**17)
    return clock


def let_codecs_take(seconds: float, monkeypatch) -> None:
    """Every exchange is run once, and said to take so long beside the link."""
    monkeypatch.setattr(exchange, "best_seconds", lambda run, at_about: (run(), seconds)[1])


def test_a_slow_link_is_worth_eight_bits_and_the_log_says_why(said, clock, monkeypatch):
    let_codecs_take(1e-3, monkeypatch)
    transport = SlowTransport(2, clock.sleep)
    chosen = automatic.choose(transport, OPTIONS, [(500, 1000), (1000,)])  # 0.1 s
    assert chosen in (compressors.Float8(), compressors.BlockInt8())
    (line,) = said
    assert line.startswith(f"compressor='auto': {chosen}, of what was measured")
    assert all(str(candidate) in line for candidate in automatic.CANDIDATES)


def test_a_link_that_takes_no_time_is_worth_nothing(said, clock, monkeypatch):
    let_codecs_take(1e-3, monkeypatch)
    shapes = [(100, 200), (200,)]
    assert automatic.choose(SimulatedTransport(2), OPTIONS, shapes) == compressors.Identity()
    assert said[0].startswith("compressor='auto': Identity(), ")


def test_a_slow_processor_counts_against_eight_bits(said, clock, monkeypatch):
    def measure(options, gradients, seconds):
        let_codecs_take(0.05 * (options.compressor in automatic.CANDIDATES[2:]), monkeypatch)
        return measured(options, gradients, seconds)

    measured = exchange.measure
    monkeypatch.setattr(automatic.exchange, "measure", measure)
    transport = SlowTransport(2, clock.sleep)  # 100, 50 and 25 ms, and 50 more of the last
    assert automatic.choose(transport, OPTIONS, [(500, 1000)]) == compressors.BFloat16()


@pytest.mark.parametrize(
    ("gain", "expected"), [(1.03, compressors.Identity()), (1.07, compressors.BFloat16())]
)
def test_dense_stays_dense_for_less_than_five_percent(monkeypatch, said, gain, expected):
    times = {compressors.Identity(): 1.0, compressors.BFloat16(): 1 / gain}
    monkeypatch.setattr(automatic, "_seconds", lambda t, b, c, *rest: times.get(c, 2.0))
    monkeypatch.setattr(automatic.link, "measure", lambda transport: None)
    assert automatic.choose(SimulatedTransport(2), OPTIONS, [(4, 4)]) == expected


def test_what_is_chosen_loses_little():
    for candidate in automatic.CANDIDATES:
        assert not candidate.sparse and not candidate.low_rank
        assert 32 * candidate.num_words(10**6) / 10**6 >= 8
        assert candidate.lossless or ExchangeOptions(candidate).feedback


def test_devices_of_one_machine_are_trained_densely(mirrored_strategy, said):
    ops = distribute.CompressedAllReduce("auto")
    strategy = mirrored_strategy(2, cross_device_ops=ops)
    with strategy.scope():
        model = keras.Sequential([keras.Input([40]), keras.layers.Dense(50)])
        model.compile("sgd", "mse")
    model.fit(np.ones([4, 40]), np.ones([4, 50]), batch_size=4, epochs=2, verbose=0)
    assert [line.startswith("compressor='auto': none") for line in said] == [True]
    assert {route.codec for route in ledger_of(model.optimizer).routes} == {"float32"}


def test_what_is_chosen_for_an_optimizer_stays():
    ops = distribute.CompressedAllReduce("auto")
    optimizer = keras.optimizers.SGD()
    automatic._decided[optimizer] = OPTIONS
    assert automatic.options_for(ops, optimizer, [tf.ones([3])]) is OPTIONS


def test_a_schedule_is_a_choice_of_its_own():
    with pytest.raises(ValueError, match="`schedule` must be 'auto'.*: schedule='two_phase'"):
        distribute.CompressedAllReduce("auto", schedule="two_phase")
    assert not distribute.CompressedAllReduce("block_sign").automatic


@pytest.mark.multi_process
@pytest.mark.slow
def test_workers_choose_the_same():
    first, second = run_workers(automatic_functions.train, args={"units": 200})
    assert first == second
    assert first["routes"][0].startswith("sequential/dense/kernel [200, 200]: ")


@pytest.mark.multi_process
@pytest.mark.slow
def test_workers_of_two_devices_choose_in_loops_of_their_own():
    args = {"units": 50, "devices": 2}
    first, second = run_workers(automatic_functions.train_in_a_loop, args=args, devices=2)
    assert first == second
    # 1 less 0.1 times the sum over the ranks, 0 + 1 + 2 + 3; 8 bits are exact where all are equal.
    np.testing.assert_allclose(first["values"], 1 - 0.1 * 6, rtol=1e-5)


@pytest.mark.multi_process
@pytest.mark.slow
@pytest.mark.network
def test_workers_far_apart_choose_eight_bits():
    with network(2, rate=20 * 10**6) as namespaces:
        results = run_workers(automatic_functions.train, args={"units": 1000}, network=namespaces)
    assert results[0] == results[1]
    assert "Float8" in results[0]["routes"][0] or "BlockInt8" in results[0]["routes"][0]
