"""Index-free top-k: ScaleCom's rule in NumPy, who leads when, and what travels."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.aggregators.runs import local_transport, random_messages, run
from tests.catalogue import AggregatorCase
from tests.replicas import (
    apply_gradients,
    assert_replicas_equal,
    build,
    compressing,
    random_gradients,
)
from tfqcomm.aggregators.shared_support import SharedSupportMean
from tfqcomm.compressors import TopK
from tfqcomm.kernels import numerics
from tfqcomm.optimizers import DiLoCo
from tfqcomm.parameter_server.optimizers import options_of
from tfqcomm.state.ledger import ledger_of
from tfqcomm.state.residuals import Residuals

SHAPES = [(12, 10), (7,), ()]
RATE = 0.05


def scale_com(start, gradients, ratio, leaders):
    """SGD of cyclic local top-k with error feedback (arXiv 2104.11125), beta of its filter 1.

        p_i = g_i + e_i;  I = the k largest magnitudes of p_(t mod W)
        x = x - rate * mean of p_i at I;  e_i = p_i, but 0 at I

    Args:
        gradients: [steps, W, ...]
        leaders: who leads at each step.

    Returns:
        The variable after each step, and what is owed.
    """
    steps, world, *shape = gradients.shape
    x, owed, history = start.astype(np.float64).ravel(), np.zeros([world, start.size]), []
    k = max(1, round(ratio * start.size))
    for step in range(steps):
        target = gradients[step].reshape(world, -1) + owed
        support = np.argsort(-np.abs(target[leaders[step]]), kind="stable")[:k]
        sent = np.zeros_like(target)
        sent[:, support] = target[:, support]
        owed = target - sent
        x = x - RATE * sent.mean(axis=0)
        history.append(x.reshape(shape))
    return np.stack(history), owed


@pytest.mark.parametrize("world", [2, 3])
def test_hundred_steps_are_those_of_the_paper(world):
    gradients = random_gradients(100, world, SHAPES)
    strategy = compressing(world, TopK(0.1, support="shared"))
    optimizer, variables = build(strategy, lambda: keras.optimizers.SGD(RATE), SHAPES)
    start = [v.numpy() for v in variables]
    history = apply_gradients(strategy, optimizer, variables, gradients)
    assert_replicas_equal(strategy, variables)
    owed = ledger_of(optimizer).residuals.total()
    leaders = np.arange(100) % world
    for index, (x, of_variable) in enumerate(zip(start, gradients, strict=True)):
        expected, left = scale_com(x, of_variable, 0.1, leaders)
        for step in range(100):
            np.testing.assert_allclose(
                history[index][step], expected[step], rtol=0, atol=1e-5, err_msg=f"step {step}"
            )
        np.testing.assert_allclose(owed[str(index)], left.mean(axis=0), rtol=0, atol=1e-4)


def test_a_skipped_step_is_nobodys_turn_and_a_backup_knows_whose_it_is():
    """Whose turn it is follows from the optimizer's own count of steps."""
    gradients = random_gradients(7, 2, SHAPES)
    for of_variable in gradients:
        of_variable[3, 1] = np.nan
    strategy = compressing(2, TopK(0.1, support="shared"))
    optimizer, variables = build(strategy, lambda: keras.optimizers.SGD(RATE), SHAPES)
    start = [v.numpy() for v in variables]
    optimizer.iterations.assign(5)  # as of a backup
    history = apply_gradients(strategy, optimizer, variables, gradients)
    for index, (x, of_variable) in enumerate(zip(start, gradients, strict=True)):
        taken = np.delete(of_variable, 3, axis=0)
        expected, _ = scale_com(x, taken, 0.1, [1, 0, 1, 0, 1, 0])
        found = np.delete(history[index], 3, axis=0)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert optimizer.iterations.numpy() == 11


class Tap(type(local_transport(1))):
    """Keeps what is broadcast and summed, and from whom."""

    def __init__(self, world):
        super().__init__(["CPU:0"] * world)
        self.roots, self.broadcasts, self.summed = [], [], []

    def broadcast(self, values, roots):
        self.roots.append(int(roots[0]))
        self.broadcasts.append([v.numpy() for v in values])
        return super().broadcast(values, roots)

    def all_reduce(self, values):
        self.summed.append([v.numpy() for v in values])
        return super().all_reduce(values)


def test_a_step_by_hand():
    """Two workers, two of eight entries: the leader's are at 1 and 6."""
    transport = Tap(2)
    codec = TopK(0.25, support="shared")
    residuals = Residuals(transport)
    aggregator = SharedSupportMean(codec, transport, residuals, ["a"], [8])
    messages = [
        [np.float32([9, 8, 7, 0, 0, 0, 1, 2])],
        [np.float32([0, 4, 0, 1, 0, 2, -6, 3])],
    ]
    found = aggregator.aggregate(messages, [tf.constant(True)] * 2, tf.constant(3))
    np.testing.assert_array_equal(found.means[0], [0, 6, 0, 0, 0, 0, -2.5, 0])
    assert transport.roots == [1]
    # Two low bits each, 01 and 10; a bit for each high part, 0 and 1, plus rank.
    words = transport.broadcasts[0][1].view(np.uint32)
    assert [f"{w:032b}" for w in words] == ["0110" + "0" * 28, "101" + "0" * 29]
    assert not transport.broadcasts[0][0].any()  # who does not lead selects nothing
    np.testing.assert_array_equal(transport.summed[0], [[4, 0.5, 0], [2, -3, 0]])
    assert found.bytes_sent == 2 * 4 // 2 + 2 * 3 * 4 // 2
    np.testing.assert_array_equal(found.left_out[0], [9, 0, 7, 0, 0, 0, 0, 2])
    np.testing.assert_array_equal(found.left_out[1], [0, 0, 0, 1, 0, 2, 0, 3])


@pytest.mark.slow
@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16"])
def test_kernels_for_a_gpu_do_the_same(value_dtype, monkeypatch):
    codec = TopK(0.1, value_dtype=value_dtype, support="shared")
    messages, found = random_messages((31, 400), world=2, steps=1), []
    for compiled in (False, True):
        monkeypatch.setattr(numerics, "on_gpu", lambda tensor, there=compiled: there)
        found.append(run(AggregatorCase(SharedSupportMean, codec), messages))
    plain, fused = found
    for mean, right in zip(fused.means[0], plain.means[0], strict=True):
        np.testing.assert_array_equal(mean, right)
    np.testing.assert_equal(fused.residuals.total(), plain.residuals.total())


def test_bytes_hardly_grow_with_the_number_of_workers():
    """At 1%: 8.6 bits for a position, 64 for a value at most; others send W - 1 times 40.6."""
    sent = {}
    for world in (2, 4, 16, 1024):
        transport = local_transport(world)
        for dtype in ("float32", "bfloat16"):
            codec = TopK(0.01, value_dtype=dtype, support="shared")
            words, size = codec.support_words(_layout(100_000)), tf.as_dtype(dtype).size
            of_entry = transport.bytes_broadcast(words) + transport.bytes_all_reduce(1001, size)
            sent[world, dtype] = 8 * of_entry / 1000
    assert sent[1024, "float32"] == pytest.approx(72.6, rel=0.01)
    assert sent[1024, "bfloat16"] == pytest.approx(40.6, rel=0.01)
    assert sent[4, "float32"] == pytest.approx(3 / 4 * 72.6, rel=0.01)
    assert 3 * 40.6 / sent[4, "float32"] > 2.2
    assert 15 * 40.6 / sent[16, "float32"] > 8.9


def _layout(n):
    return SharedSupportMean(TopK(0.01), local_transport(1), None, ["a"], [n]).layout


def test_rounds_of_diloco_take_turns(monkeypatch):
    """Exchanged every two steps, the steps' numbers would be those of one leader alone."""
    leaders = []
    exchange = SharedSupportMean.exchange

    def spy(self, messages, healthy, step):
        tf.py_function(lambda s: leaders.append(int(s) % 2), [step], [])
        return exchange(self, messages, healthy, step)

    monkeypatch.setattr(SharedSupportMean, "exchange", spy)
    strategy = compressing(2, "identity")

    def optimizer():
        return DiLoCo(
            keras.optimizers.SGD(RATE), every=2, compressor=TopK(0.1, support="shared"), min_size=0
        )

    optimizer, variables = build(strategy, optimizer, SHAPES[:1])
    apply_gradients(strategy, optimizer, variables, random_gradients(8, 2, SHAPES[:1]))
    assert leaders == [0, 1, 0, 1]


@pytest.mark.parametrize("value_dtype", ["int8", "int4", "table2"])
def test_values_that_cannot_be_summed_are_refused(value_dtype):
    text = f"must be one of .'float32', 'bfloat16'. where the .* value_dtype='{value_dtype}'"
    with pytest.raises(ValueError, match=text):
        TopK(0.1, value_dtype=value_dtype, support="shared")


@pytest.mark.parametrize("support", ["all", None, True])
def test_other_supports_are_refused(support):
    with pytest.raises(
        ValueError, match=f"`support` must be one of .* Received: support={support!r}"
    ):
        TopK(0.1, support=support)


def test_configs_of_before_are_written_alike():
    assert TopK(0.1).get_config() == {"ratio": 0.1, "value_dtype": "float32"}
    assert TopK(0.1, support="shared").get_config()["support"] == "shared"


def test_servers_decode_each_message_by_itself():
    options = options_of(keras.optimizers.SGD(), 100, compressor=TopK(0.1, support="shared"))
    assert options.compressor == TopK(0.1)
