"""Any codec on any numbers: a step is finite or skipped, conserves or changes nothing, everywhere.

Hypothesis draws; what is drawn comes in one shape, so that each exchange is traced once.
"""

import functools

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from tests.aggregators.processes import run_processes
from tests.catalogue import COMPRESSORS
from tfqcomm.compressors import AdaptiveTopK, BlockSign, Float16, Ternary, TopK
from tfqcomm.state.ledger import Ledger
from tfqcomm.step import ExchangeOptions
from tfqcomm.step.exchange import GradientExchange
from tfqcomm.step.message import Message
from tfqcomm.transport.local import LocalTransport

SIZES = {"kernel": 96, "bias": 5}
LARGEST = float(np.finfo(np.float32).max)
NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1e-45, 1e-38, 1e-20, 1.0, 6e4, 1e20, 3e38, LARGEST]),
    st.sampled_from([np.nan, np.inf, -np.inf]),
    st.floats(-LARGEST, LARGEST, width=32),
)
TENSORS = st.builds(  # a bell, at some magnitude, with some entries that are anything
    lambda seed, scale, places: (seed, scale, tuple(places)),
    st.integers(0, 1000),
    st.sampled_from([0.0, 1e-45, 1e-38, 1e-10, 1.0, 1e4, 1e19, 1e37, 1e38]),
    st.lists(st.tuples(st.integers(0, 95), NUMBERS), max_size=3),
)


def tensor(drawn, n):
    seed, scale, places = drawn
    with np.errstate(over="ignore"):
        x = (scale * np.random.default_rng(seed).normal(size=n)).astype(np.float32)
        for place, number in places:
            x[place % n] = number
    return x


class Replicas:
    """An exchange among W replicas of one process, traced once: what has gone in and come out."""

    def __init__(self, compressor, schedule, world, feedback):
        options = ExchangeOptions(
            compressor, schedule=schedule, error_feedback=feedback, min_size=0, granularity="tensor"
        )
        self.exchange = GradientExchange(options, Ledger(LocalTransport(["CPU:0"] * world)))
        self.world = world
        self.feedback = options.feedback and not compressor.lossless
        signature = [tf.TensorSpec([world, n]) for n in SIZES.values()]
        self._step = tf.function(self._reduce, autograph=False).get_concrete_function(
            signature, tf.TensorSpec([], tf.int64)
        )

    def _reduce(self, values, step):
        messages = [
            Message(key, tf.unstack(value)) for key, value in zip(SIZES, values, strict=True)
        ]
        reduction = self.exchange.reduce(messages, step)
        tf.cond(
            reduction.healthy, lambda: (reduction.commit(), True)[1], lambda: tf.constant(False)
        )
        return reduction.healthy, reduction.means

    def reset(self):
        self.exchange.ledger.residuals.load_total({})

    def step(self, values, step):
        healthy, means = self._step([tf.constant(v) for v in values], tf.constant(step, tf.int64))
        return bool(healthy), [mean.numpy() for mean in means]


replicas = functools.cache(Replicas)


def check_step(run, values, step):
    """One step: finite or skipped; conserved or nothing changed."""
    before = run.exchange.ledger.residuals.total()
    healthy, means = run.step(values, step)
    after = run.exchange.ledger.residuals.total()
    if not all(np.isfinite(v).all() for v in values):
        assert not healthy
    if not healthy:
        np.testing.assert_equal(after, before)
        return
    for (key, n), value, mean in zip(SIZES.items(), values, means, strict=True):
        assert np.isfinite(mean).all()
        assert np.isfinite(after.get(key, np.zeros(n))).all()
        if run.feedback and key in before:
            conserved(run, value, mean, before[key], after[key])


def conserved(run, value, mean, before, after):
    """Mean message + owed before = mean decoded + owed after, up to rounding."""
    sent = value.astype(np.float64).mean(axis=0) + before
    found = mean.astype(np.float64) + after
    # Of float32, and of sums in half precision, which no residual sees.
    half = getattr(run.exchange.options.codec.sum_dtype, "size", 4) == 2
    roundoff = 2.0**-7 if half else 2.0**-20
    largest = max(np.abs(value).max(), np.abs(before).max(), np.abs(after).max(), 1e-30)
    np.testing.assert_allclose(found, sent, rtol=0, atol=float(run.world * roundoff * largest))


DEFAULT = [  # (codec, schedule, W, feedback)
    (TopK(0.1), "all_gather", 2, "auto"),
    (BlockSign(), "two_phase", 3, "auto"),
    (Float16(), "auto", 2, "auto"),
    (Ternary(shared_scale=True), "auto", 2, True),
    (AdaptiveTopK(0.1), "auto", 2, "auto"),
]
settings = functools.partial(
    hypothesis.settings,
    deadline=None,  # the first example traces
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def draws(world):
    """Values of some steps, for each of them those of all tensors on all replicas."""
    of_tensor = st.lists(TENSORS, min_size=world, max_size=world)
    return st.lists(st.tuples(*[of_tensor] * len(SIZES)), min_size=1, max_size=4)


def check_any_steps(setting, examples):
    run = replicas(*setting)

    @settings(max_examples=examples)
    @hypothesis.given(draws(run.world))
    def check(steps):
        run.reset()
        for number, drawn in enumerate(steps):
            values = [
                np.stack([tensor(one, n) for one in of_all])
                for of_all, n in zip(drawn, SIZES.values(), strict=True)
            ]
            check_step(run, values, number)

    check()


@pytest.mark.parametrize("setting", DEFAULT, ids=str)
def test_any_numbers_are_finite_or_skipped_and_conserved(setting):
    check_any_steps(setting, examples=20)


def all_settings():
    """Every codec on every schedule it can follow; feedback by default, and where it is damped."""
    for number, case in enumerate(case for case in COMPRESSORS if not case.slow):
        codec = case.compressor
        feedback = "auto" if codec.contracts else True
        own = codec.adaptive or codec.integer or codec.low_rank or codec.shared_support
        if codec.lossless or own:
            yield codec, "auto", 2, feedback
            continue
        yield codec, "dense" if codec.linear else "all_gather", 1 + number % 3, feedback
        yield codec, "two_phase", 2 + number % 2, feedback


@pytest.mark.slow
@pytest.mark.parametrize("setting", list(all_settings()), ids=str)
def test_any_codec_on_any_schedule_is_finite_or_skipped_and_conserves(setting):
    check_any_steps(setting, examples=20)


@settings(max_examples=5)
@hypothesis.given(draws(4))
def test_all_processes_are_equal_to_the_bit_whatever_the_numbers(steps):
    """Two processes of two replicas: the same means, flags and sum of residuals."""

    def one_process(transport):
        options = ExchangeOptions(BlockSign(), schedule="two_phase", min_size=0)
        exchange, found = GradientExchange(options, Ledger(transport)), []
        for number, drawn in enumerate(steps):
            messages = [
                Message(key, [tf.constant(tensor(of_all[rank], n)) for rank in transport.ranks])
                for (key, n), of_all in zip(SIZES.items(), drawn, strict=True)
            ]
            reduction = exchange.reduce(messages, tf.constant(number))
            if reduction.healthy:
                reduction.commit()
            found.append((bool(reduction.healthy), [mean.numpy() for mean in reduction.means]))
        return found, exchange.ledger.residuals.total()

    first, second = run_processes(2, 2, one_process)
    np.testing.assert_equal(first, second)
