"""DeMo: against NumPy, by hand, and what it sends."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest

from tests.multi_process import run_workers
from tests.optimizers.local_runs import follow, run
from tests.optimizers.memory_functions import train_demo
from tests.replicas import assert_replicas_equal, build, plain, random_gradients
from tfqcomm.callbacks import BackupAndRestore
from tfqcomm.optimizers import DeMo
from tfqcomm.state.ledger import ledger_of

SHAPES = [(8, 6), (12,), (2, 2, 3), (5,)]
BLOCKS = [(8, 6, 4, 3), (1, 12, 1, 4), (4, 3, 4, 3), (1, 5, 1, 1)]  # as a matrix; largest blocks
CHUNK, TOP, DECAY = 4, 3, 0.9


def cosines(n):
    """The orthonormal transform of type II, a frequency a row."""
    rows = [[np.cos(np.pi * (j + 0.5) * k / n) for j in range(n)] for k in range(n)]
    weights = [np.sqrt((1 if k == 0 else 2) / n) for k in range(n)]
    return np.array(rows) * np.array(weights)[:, None]


def message_of(delta, rows, columns, height, width):
    """What is sent of one worker's momentum, and back from frequencies: block by block."""
    matrix = delta.reshape(rows, columns)
    sent = np.zeros_like(matrix)
    left, right = cosines(height), cosines(width)
    for y in range(0, rows, height):
        for x in range(0, columns, width):
            found = left @ matrix[y : y + height, x : x + width] @ right.T
            if found.size > TOP:
                found[np.abs(found) < np.sort(np.abs(found), axis=None)[-TOP]] = 0
            sent[y : y + height, x : x + width] = left.T @ found @ right
    return sent.ravel()


class Reference:
    """arXiv 2411.19870, Algorithm 1, as its authors' code has it: momenta are those of weights."""

    def __init__(self, x, weight_decay=0.0):
        self.x, self.weight_decay = x.astype(np.float64), weight_decay
        self.delta = np.zeros_like(self.x)
        ends = np.cumsum([rows * columns for rows, columns, _, _ in BLOCKS])
        self.parts = [slice(e - b[0] * b[1], e) for e, b in zip(ends, BLOCKS, strict=True)]

    def step(self, gradients, losses, rate):
        self.delta = DECAY * self.delta + rate * gradients
        sent = np.zeros_like(self.delta)
        for part, block in zip(self.parts, BLOCKS, strict=True):
            for own, delta in zip(sent, self.delta, strict=True):
                own[part] = message_of(delta[part], *block)
        self.delta -= sent
        self.x *= 1 - rate * self.weight_decay
        direction = sent.mean(axis=0)
        self.x = self.x - rate * np.sign(np.where(abs(direction) < 1e-12, 0, direction))
        return self.x


@pytest.mark.parametrize(("world", "weight_decay"), [(1, 0.1), (3, None)])
def test_hundred_steps_are_those_of_the_paper(world, weight_decay):
    """With a rate that changes: old momenta have been multiplied by the old one."""
    rates = keras.optimizers.schedules.PiecewiseConstantDecay([49], [0.125, 0.03125])
    make = functools.partial(DeMo, rates, DECAY, TOP, CHUNK, weight_decay=weight_decay)
    optimizer, history, expected = follow(
        make,
        functools.partial(Reference, weight_decay=weight_decay or 0.0),
        world,
        rate=lambda step: 0.125 if step <= 49 else 0.03125,
        shapes=SHAPES,
    )
    assert (history == history[:, :1]).all()
    state = ledger_of(optimizer).state()
    for index, (part, block) in enumerate(zip(expected.parts, BLOCKS, strict=True)):
        rows, columns, height, width = block
        if height * width <= TOP:  # all of it is sent
            assert f"residual/{index}" not in state
            continue
        owed = np.linalg.norm(expected.delta[:, part].mean(axis=0))
        assert owed > 1e-3  # the transform keeps norms
        np.testing.assert_allclose(np.linalg.norm(state[f"residual/{index}"]), owed, rtol=1e-3)
    assert ledger_of(optimizer).meter.read().skipped_steps == 0


def test_two_steps_by_hand():
    """One block of two entries, of whose two frequencies, (a + b) and (a - b), one is sent."""
    gradients = [np.float32([[[1.0, 0.2]], [[0.0, -1.0]]])]
    optimizer, variables = build(plain(), lambda: DeMo(0.1, 0.5, 1, 2), [(2,)])
    variables[0].assign([0.0, 0.0])
    (history,) = run(plain(), optimizer, variables, gradients)
    # 0.1, 0.02: sent is the mean, 0.06, 0.06; left is 0.04, -0.04
    np.testing.assert_allclose(history[0, 0], [-0.1, -0.1], rtol=1e-6)
    # 0.02, -0.02 and the gradient's 0, -0.1: sent is the difference, 0.07, -0.07
    np.testing.assert_allclose(history[1, 0], [-0.2, 0.0], atol=1e-7)


def test_bytes_of_a_step_are_those_of_the_largest_frequencies():
    """Three shapes of blocks, and so three messages: [health] [positions] [values]."""
    strategy = plain(2)
    shapes = [(128, 128), (128, 10), (64,)]
    optimizer, variables = build(strategy, lambda: DeMo(0.01), shapes)
    run(strategy, optimizer, variables, random_gradients(4, 2, shapes))
    assert_replicas_equal(strategy, variables)
    words = 0
    for n, kept in ((128 * 128, 4 * 32), (128 * 10, 2 * 32), (64, 32)):
        low = int(np.log2(n / kept))
        words += 1 + kept + -(-kept * low // 32) + -(-(kept + ((n - 1) >> low)) // 32)
    assert ledger_of(optimizer).meter.read().bytes_sent == 4 * 4 * words
    routes = ledger_of(optimizer).routes
    assert [r.codec for r in routes] == [
        "TopK(ratio=0.0078125, value_dtype='float32', chunk=4096)",
        "TopK(ratio=0.05, value_dtype='float32', chunk=640)",
        "TopK(ratio=0.5, value_dtype='float32', chunk=64)",
    ]


def compiled():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input([6]), *layers])
    model.compile(DeMo(0.01, 0.9, 3, 4), "mse")
    return model


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on_to_the_bit(tmp_path):
    """The momenta are residuals, and a backup has them."""
    x = np.random.default_rng(0).normal(size=[96, 6]).astype("float32")
    data = {"x": x, "y": x[:, :2] ** 2, "batch_size": 12, "shuffle": False, "verbose": 0}
    whole, stopped, again = compiled(), compiled(), compiled()
    whole.fit(**data, epochs=2)
    backup = BackupAndRestore(tmp_path, delete_checkpoint=False)
    stopped.fit(**data, epochs=1, callbacks=[backup])
    assert np.abs(ledger_of(stopped.optimizer).state()["residual/0"]).max() > 1e-4
    history = again.fit(**data, epochs=2, callbacks=[BackupAndRestore(tmp_path)])
    assert history.epoch == [1]
    for a, b in zip(again.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_config_round_trip():
    optimizer = DeMo(0.01, 0.99, 16, 32, value_dtype="int8", weight_decay=0.1, bucket_mb=4.0)
    config = optimizer.get_config()
    again = DeMo.from_config(config)
    assert again.get_config() == config
    assert again.options == optimizer.options
    assert (config["decay"], config["top"], config["chunk"]) == (0.99, 16, 32)
    assert not {"compressor", "min_size", "residual_decay", "schedule"} & set(config)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"decay": 0.0}, r"`decay` must be a number in \(0, 1\]. Received: decay=0.0"),
        ({"top": 0}, "`top` must be a positive integer. Received: top=0"),
        ({"chunk": 0}, "`chunk` must be a positive integer. Received: chunk=0"),
        ({"top": 16, "chunk": 4}, "`top` must be below chunk.*Received: top=16, chunk=4"),
        ({"compressor": "top_k"}, r"not recognized: \{'compressor': 'top_k'\}. Those of DeMo are"),
        ({"min_size": 0}, r"not recognized: \{'min_size': 0\}. Those of DeMo are"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(arguments, text):
    with pytest.raises(ValueError, match=text):
        DeMo(**arguments)


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_processes_are_two_replicas():
    (first, second), one = run_workers(train_demo), train_demo(plain(2))
    for a, b, c in zip(first["weights"], second["weights"], one["weights"], strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, atol=1e-6)
    assert first["bytes"] == one["bytes"] > 0
    for name, value in one["state"].items():
        np.testing.assert_allclose(first["state"][name], value, atol=1e-6, err_msg=name)
