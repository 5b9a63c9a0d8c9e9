"""SparseLoCo: against NumPy, at its limits, and what it sends."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.multi_process import run_workers
from tests.optimizers.diloco_reference import DiLoCoReference
from tests.optimizers.local_runs import SHAPES, follow
from tests.optimizers.memory_functions import train_sparse_loco
from tests.replicas import build, plain
from tfqcomm.compressors import TopK
from tfqcomm.optimizers import DiLoCo, SparseLoCo
from tfqcomm.state.ledger import ledger_of

SIZES = [12, 5]
EVERY, DECAY, KEPT, CHUNK, OUTER = 5, 0.75, 0.5, 4, 1.25


def two_bits(values):
    """Four bins over six standard deviations around the mean; each is worth its mean."""
    mean, width = values.mean(), 1.5 * values.std()
    bins = np.digitize(values, [mean - width, mean, mean + width])
    return np.array([values[bins == b].mean() for b in bins])


def message_of(e):
    """What one worker sends of a tensor: the largest of each chunk, in two bits."""
    kept = []
    for start in range(0, len(e), CHUNK):
        chunk = np.abs(e[start : start + CHUNK])
        kept += [start + i for i in np.argsort(-chunk)[: max(1, round(KEPT * len(chunk)))]]
    kept, decoded = sorted(kept), np.zeros_like(e)
    decoded[kept] = two_bits(e[kept])
    return decoded


class Reference(DiLoCoReference):
    """arXiv 2508.15706, Algorithm 1, as PAPERS has it; there the outer rate is 1."""

    def exchange(self, part):
        e = DECAY * self.residual[:, part] + self.theta[part] - self.x[:, part]
        messages = np.array([message_of(one) for one in e])
        self.residual[:, part] = e - messages
        norms = np.linalg.norm(messages, axis=1, keepdims=True)
        self.clipped = self.clipped or (norms > 1.05 * np.median(norms)).any()
        clipped = messages * np.minimum(1, np.median(norms) / norms)
        self.theta[part] -= OUTER * clipped.mean(axis=0)
        self.x[:, part] = self.theta[part]

    clipped = False


def sparse(inner, **options):
    codec = TopK(KEPT, value_dtype="table2", chunk=CHUNK)
    return SparseLoCo(inner, EVERY, codec, DECAY, outer_learning_rate=OUTER, min_size=0, **options)


@pytest.mark.parametrize("world", [2, 3])
def test_hundred_steps_are_those_of_the_paper(world):
    optimizer, _, expected = follow(
        # With betas that float32 can hold: Keras computes its bias correction in float32.
        lambda: sparse(keras.optimizers.Adam(0.1, 0.875, 0.9375)),
        functools.partial(Reference, every=EVERY, sizes=SIZES, turns=(0, 0)),
        world,
    )
    assert expected.clipped
    state = ledger_of(optimizer).state()
    for index, part in enumerate(expected.parts):
        owed = expected.residual[:, part].mean(axis=0)
        assert np.abs(owed).max() > 1e-2
        np.testing.assert_allclose(state[f"residual/{index}"], owed, atol=2e-5)
    assert ledger_of(optimizer).meter.read().skipped_steps == 0


def test_without_decay_and_losses_it_is_diloco_that_averages():
    """All kept, float32, two replicas with equal norms: nothing is clipped."""
    gradients = [
        tf.constant(np.random.RandomState(0).randn(*shape), tf.float32) for shape in SHAPES
    ]
    found = []
    for make in (
        lambda: SparseLoCo(keras.optimizers.SGD(0.1), 2, TopK(1.0), 1.0, min_size=0),
        lambda: DiLoCo(keras.optimizers.SGD(0.1), 2, 1.0, 0.0),
    ):
        strategy = plain(2)
        optimizer, variables = build(strategy, make, SHAPES)
        for _ in range(6):
            strategy.run(lambda: optimizer.apply([g / 2 for g in gradients], variables))  # noqa: B023
        found.append([v.numpy() for v in variables])
    for left, right in zip(*found, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)


def test_bytes_of_an_exchange_are_a_hundredth_of_the_differences():
    strategy = plain(2)
    make = lambda: SparseLoCo(keras.optimizers.SGD(0.1), 2)  # noqa: E731
    optimizer, variables = build(strategy, make, [(256, 128)])
    ones = tf.random.stateless_normal([256, 128], [1, 2])
    for _ in range(4):
        strategy.run(lambda: optimizer.apply([ones], variables))
    sent = ledger_of(optimizer).meter.read().bytes_sent / 2  # exchanges
    assert 150 < 256 * 128 * 4 / sent < 210  # 10.2 bits of 1/64 of the entries, and the table


def test_config_keeps_all_arguments():
    optimizer = sparse(keras.optimizers.AdamW(1e-3), fragments=5)
    again = SparseLoCo.from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config()
    assert again.exchange_options == optimizer.exchange_options
    assert again.exchange_options.schedule == "all_gather"
    assert (again.global_weights.learning_rate, again.global_weights.momentum) == (OUTER, 0.0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"residual_decay": 0.0}, "`residual_decay` must be a number in .0, 1.*residual_decay=0.0"),
        ({"outer_learning_rate": 0.0}, "`outer_learning_rate` must be.*outer_learning_rate=0.0"),
        ({"schedule": "two_phase"}, "not recognized.*schedule"),
        ({"compressor": None}, "`schedule`.*without compression"),
    ],
)
def test_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        SparseLoCo(keras.optimizers.SGD(0.1), 2, **options)


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_processes_are_two_replicas():
    weights = [run_workers(train_sparse_loco, workers=2), [train_sparse_loco(plain(2))]]
    (first, second), (one,) = weights
    for a, b, c in zip(first, second, one, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, atol=1e-5)
