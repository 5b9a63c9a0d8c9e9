"""PowerSGD's exchange: the papers' algorithm in NumPy, and the laws of every aggregator."""

import math

import numpy as np
import pytest
import tensorflow as tf

from tests.aggregators import low_rank_reference as reference
from tests.aggregators.processes import run_processes
from tests.aggregators.runs import local_transport
from tfqcomm.aggregators import LowRankMean
from tfqcomm.aggregators.factors import Factors
from tfqcomm.compressors import PowerSGD
from tfqcomm.kernels import low_rank
from tfqcomm.state.ledger import Ledger
from tfqcomm.state.residuals import Residuals
from tfqcomm.step import ExchangeOptions
from tfqcomm.step.exchange import GradientExchange
from tfqcomm.step.message import Message
from tfqcomm.transport.local import LocalTransport

# Two matrices side by side, the rest, a kernel of the same form elsewhere, and one of another.
SHAPES = ((12, 10), (12, 10), (7,), (3, 3), (3, 4, 10), (5, 4, 6))
SIZES = [math.prod(shape) for shape in SHAPES]
KEYS = [f"tensor{t}" for t in range(len(SHAPES))]
REST = (2, 3)
BOTH = pytest.mark.parametrize("alternate", [False, True])


def draw(world, steps, seed=0, shapes=SHAPES):
    """For each step, for each replica, flat tensors; what they have in common is of low rank."""
    rng = np.random.default_rng(seed)
    common = [
        rng.normal(size=[math.prod(s[:-1]), 2]) @ rng.normal(size=[2, *s[-1:]]) for s in shapes
    ]
    return [
        [[np.float32(c + 0.3 * rng.normal(size=c.shape)).ravel() for c in common]
         for _ in range(world)]
        for _ in range(steps)
    ]  # fmt: skip


class Run:
    """An aggregator, its state, and what came out of it so far."""

    def __init__(self, transport, codec, *, feedback=True, shapes=SHAPES, factors=None):
        self.transport = transport
        self.residuals = Residuals(transport)
        self.factors = factors or Factors(codec.rank, 0, transport.device)
        keys = [f"tensor{t}" for t in range(len(shapes))]
        self.aggregator = LowRankMean(
            codec,
            transport,
            self.residuals if feedback else None,
            keys,
            [math.prod(shape) for shape in shapes],
            shapes=shapes,
            factors=self.factors,
        )
        self.means, self.sent, self.healthy = [], [], []

    def step(self, of_replicas, number, sick=()):
        local = [of_replicas[rank] for rank in self.transport.ranks]
        flags = [tf.constant(rank not in sick) for rank in self.transport.ranks]
        aggregate = self.aggregator.aggregate(local, flags, tf.constant(number))
        self.healthy.append(bool(aggregate.healthy))
        if self.healthy[-1]:
            for variable, value in aggregate.updates:
                variable.assign(value)
        self.means.append([mean.numpy() for mean in aggregate.means])
        self.sent.append(int(aggregate.bytes_sent))

    def steps(self, messages):
        for number, of_replicas in enumerate(messages):
            self.step(of_replicas, number)
        return self


def run(codec, messages, transport=None, **kwargs):
    return Run(transport or local_transport(len(messages[0])), codec, **kwargs).steps(messages)


# ---------------------------------------------------------------------------- the papers' algorithm


def least_squares(worker, weights, step):
    """A worker's gradient of the mean of |x W - y|^2, on data of its own."""
    rng = np.random.default_rng([worker, step])
    target = np.random.default_rng(7).normal(size=weights.shape)
    x = rng.normal(size=[16, weights.shape[0]]) * np.linspace(0.3, 1.5, weights.shape[0])
    return x.T @ (x @ (weights - target) + 0.1 * rng.normal(size=[16, weights.shape[1]])) / 16


def momentum_sgd(weights, momentum, update):
    """Algorithm 2: m = lambda m + d; x = x - gamma (d + m), with d the update that arrives."""
    momentum = 0.9 * momentum + update
    return weights - 0.02 * (update + momentum), momentum


def traced(exchange):
    @tf.function(autograph=False)
    def reduce(gradients, step):
        reduction = exchange.reduce([Message("kernel", tf.unstack(gradients))], step)
        reduction.commit()
        return reduction.means[0], reduction.healthy

    return lambda gradients, step: reduce(tf.constant(np.float32(gradients)), tf.constant(step))


def first_q(exchange):
    """What our first step starts with, as the paper has it: float32[15, 3]."""
    factors = exchange.ledger.keep("factors", lambda: Factors(3, 0, "CPU:0"))
    return factors.variable("right", ["kernel"], 15).numpy()[0].T


def state_of(exchange, side):
    """The columns of P or Q; those of Q are rows here."""
    columns = exchange.ledger.kept["factors"].state()[f"{side}/kernel"]
    return np.float64(columns.T if side == "right" else columns)


def memory_of(exchange, shape):
    residuals = exchange.ledger.residuals.variables()
    replicas = range(exchange.transport.local)
    found = {replica: v for (replica, _), v in residuals.items()}
    return [np.float64(found[replica]).reshape(shape) for replica in replicas]


@pytest.mark.parametrize("world", [2, 4])
@BOTH
def test_a_hundred_steps_of_momentum_sgd_are_those_of_the_paper(world, alternate):
    """Each from where we are: 1e-7 grows to 1e-2 within 70 steps in the reference by itself.

    The mean of what the workers owe is compared: see `LowRankMean`.
    """
    shape, rank, codec = (20, 15), 3, PowerSGD(3, alternate=alternate)
    exchange = GradientExchange(ExchangeOptions(codec, min_size=0), Ledger(local_transport(world)))
    algorithm = reference.AlternatePowerSGD if alternate else reference.PowerSGD
    expected = algorithm(first_q(exchange), world)
    assert expected.q.shape == (15, rank)
    reduce, state = traced(exchange), (np.zeros(shape), np.zeros(shape))
    losses = []
    for step in range(100):
        gradients = np.float32([least_squares(w, state[0], step) for w in range(world)])
        if step > 0:
            expected.e = memory_of(exchange, shape)
            expected.q = state_of(exchange, "right")
            expected.p = state_of(exchange, "left") if alternate else None
        update = expected.step(gradients)
        mean, healthy = reduce(gradients, step)
        assert healthy
        scale = np.abs(update).max()
        np.testing.assert_allclose(mean, update, atol=2e-5 * scale, err_msg=f"step {step}")
        owed = np.mean(memory_of(exchange, shape), axis=0)
        np.testing.assert_allclose(owed, np.mean(expected.e, axis=0), atol=2e-5 * scale)
        if not alternate:  # in any length
            q = expected.q / np.abs(expected.q).max(axis=0)
            np.testing.assert_allclose(state_of(exchange, "right"), q, atol=1e-4)
        state = momentum_sgd(*state, mean.numpy())
        losses.append(np.mean(np.square(gradients)))
    assert losses[-1] < 0.05 * losses[0]


@BOTH
def test_twenty_steps_on_its_own_are_those_of_the_paper(alternate):
    """Without a look at what is kept: the errors of both add up."""
    shape, codec = (20, 15), PowerSGD(3, alternate=alternate)
    exchange = GradientExchange(ExchangeOptions(codec, min_size=0), Ledger(local_transport(2)))
    algorithm = reference.AlternatePowerSGD if alternate else reference.PowerSGD
    expected = algorithm(first_q(exchange), 2)
    reduce, ours = traced(exchange), (np.zeros(shape), np.zeros(shape))
    theirs = ours
    for step in range(20):
        update = expected.step([least_squares(w, theirs[0], step) for w in range(2)])
        theirs = momentum_sgd(*theirs, update)
        mean, _ = reduce([least_squares(w, ours[0], step) for w in range(2)], step)
        ours = momentum_sgd(*ours, mean.numpy())
        np.testing.assert_allclose(ours, theirs, atol=3e-4, err_msg=f"step {step}")


@BOTH
def test_one_step_by_hand(alternate):
    """[[3, 0], [0, 4]] and the like in 4 x 4, of rank one: half of each worker's is the other's."""
    first, second = np.zeros([4, 4], np.float32), np.zeros([4, 4], np.float32)
    first[0], second[0] = [6, 0, 0, 0], [0, 0, 8, 0]
    factors = Factors(1, 0, "CPU:0")
    factors.load_state({"right/tensor0": np.float32([[0.6, 0, 0.8, 0]])})
    codec = PowerSGD(1, alternate=alternate)
    result = Run(local_transport(2), codec, shapes=[(4, 4)], factors=factors)
    result.step([[first.ravel()], [second.ravel()]], 0)
    # The first row is 3 0 4 0, five times what Q is: nothing is left out of the mean.
    np.testing.assert_allclose(result.means[0][0][:4], [3, 0, 4, 0], rtol=1e-6)
    assert not result.means[0][0][4:].any()
    np.testing.assert_allclose(result.residuals.total()["tensor0"], np.zeros(16), atol=1e-6)


@BOTH
def test_a_matrix_of_low_rank_arrives_within_a_few_steps(alternate):
    """The power method finds it; what stays behind are rounding errors."""
    rng = np.random.default_rng(0)
    matrix = (rng.normal(size=[30, 3]) @ rng.normal(size=[3, 20])).astype(np.float32)
    messages = [[[matrix.ravel()], [matrix.ravel()]]] * 5
    found = run(PowerSGD(3, alternate=alternate), messages, feedback=False, shapes=[(30, 20)])
    np.testing.assert_allclose(found.means[-1][0], matrix.ravel(), atol=1e-4)


def test_the_warm_start_finds_the_largest_singular_vectors():
    """Without it each step would have only one step of the power method, from random vectors."""
    rng = np.random.default_rng(0)
    u, _, v = np.linalg.svd(rng.normal(size=[40, 30]), full_matrices=False)
    matrix = np.float32(u * 0.8 ** np.arange(30) @ v)
    best = np.linalg.norm(0.8 ** np.arange(4, 30))
    result = run(PowerSGD(4), [[[matrix.ravel()]]] * 40, feedback=False, shapes=[(40, 30)])
    errors = [np.linalg.norm(mean[0] - matrix.ravel()) for mean in result.means]
    assert errors[0] > 1.1 * best
    assert errors[-1] < 1.001 * best


# ------------------------------------------------------------------------------------- the laws


@pytest.mark.parametrize("world", [1, 2, 3])
@BOTH
def test_nothing_is_lost(world, alternate):
    """Sum of means + mean of residuals = sum of mean messages."""
    messages = draw(world, steps=5)
    result = run(PowerSGD(2, alternate=alternate), messages)
    owed = result.residuals.total()
    for tensor, key in enumerate(KEYS):
        arrived = sum(of_step[tensor].astype(np.float64) for of_step in result.means)
        inputs = np.array([[m[tensor] for m in of_step] for of_step in messages], np.float64)
        right = inputs.mean(axis=1).sum(axis=0)
        np.testing.assert_allclose(arrived + owed[key], right, atol=1e-5)
        assert owed[key].any() == (tensor not in REST)


@BOTH
def test_the_rest_is_the_dense_mean(alternate):
    messages = draw(3, steps=2)
    result = run(PowerSGD(2, alternate=alternate), messages)
    for means, of_replicas in zip(result.means, messages, strict=True):
        for tensor in REST:
            expected = np.mean([m[tensor] for m in of_replicas], axis=0)
            np.testing.assert_allclose(means[tensor], expected, rtol=1e-5, atol=1e-6)


@BOTH
def test_without_error_feedback_nothing_is_kept(alternate):
    result = run(PowerSGD(2, alternate=alternate), draw(2, steps=2), feedback=False)
    assert result.residuals.total() == {}
    assert result.residuals.variables() == {}


@BOTH
def test_all_processes_hold_the_same_and_that_of_one_process(alternate):
    messages = draw(4, steps=5)
    codec = PowerSGD(2, alternate=alternate)

    def one_process(transport):
        result = run(codec, messages, transport)
        return result.means, result.factors.state(), result.residuals.total()

    first, second = run_processes(2, 2, one_process)
    np.testing.assert_equal(first, second)  # to the bit
    one = run(codec, messages)
    for means, expected in zip(first[0], one.means, strict=True):
        for mean, right in zip(means, expected, strict=True):
            np.testing.assert_allclose(mean, right, atol=1e-5)
    for key, right in one.residuals.total().items():
        np.testing.assert_allclose(first[2][key], right, atol=1e-5)


@BOTH
def test_a_replica_owes_what_its_own_factors_leave_out(alternate):
    """M_w less its projection on what all have in common, and not less the mean."""
    (of_replicas,) = draw(3, steps=1, shapes=[(12, 10)])
    result = run(PowerSGD(2, alternate=alternate), [of_replicas], shapes=[(12, 10)])
    u, _, v = np.linalg.svd(result.means[0][0].reshape(12, 10))
    residuals = result.residuals.variables()
    for (replica, _), residual in residuals.items():
        message = of_replicas[replica][0].reshape(12, 10)
        if alternate:  # the right factor is what was there before
            projected = message - (message @ v[:2].T) @ v[:2]
        else:
            projected = message - u[:, :2] @ (u[:, :2].T @ message)
        np.testing.assert_allclose(residual, projected.ravel(), atol=1e-4)


@BOTH
def test_one_sick_replica_is_known_and_changes_nothing(alternate):
    first, second, third = draw(3, steps=3)
    result = run(PowerSGD(2, alternate=alternate), [first])
    before = result.residuals.total(), result.factors.state()
    for sick in range(3):
        result.step(second, 1, sick=[sick])
        assert not result.healthy[-1]
        second[sick][0][5] = np.inf
        result.step(second, 1)
        assert not result.healthy[-1]
        second[sick][0][5] = 0
    np.testing.assert_equal((result.residuals.total(), result.factors.state()), before)
    result.step(third, 1)
    expected = run(PowerSGD(2, alternate=alternate), [first, third])
    np.testing.assert_equal(result.means[-1], expected.means[-1])


@BOTH
def test_bytes_are_those_of_the_formula(alternate):
    """W = 3; batches of 12 x 10 three times and 20 x 6, sixteen numbers in full, a flag each."""
    codec = PowerSGD(2, alternate=alternate)
    left, right, rest = 2 * (3 * 12 + 20), 2 * (3 * 10 + 6), 7 + 9
    floats = [left + rest + 1, right + rest + 1] if alternate else [left + rest + right + 2] * 2
    result = run(codec, draw(3, steps=4))
    assert result.sent == [2 * 2 * 4 * n // 3 for n in floats * 2]
    counted = sum(codec.num_floats(shape) for shape in SHAPES)
    assert counted == left + right + (2 if alternate else 1) * rest


@BOTH
def test_all_zeros_stop_nothing(alternate):
    """They gave NaN; and a factor that is zero once would have been so for ever."""
    zeros = [[np.zeros(n, np.float32) for n in SIZES]] * 2
    messages = draw(2, steps=8)
    result = run(PowerSGD(2, alternate=alternate), [zeros, messages[0], zeros, zeros, *messages])
    assert all(result.healthy)
    assert not any(mean.any() for mean in result.means[0])
    owed = result.residuals.total()
    for tensor, key in enumerate(KEYS):
        inputs = np.mean([m[tensor] for m in messages[-1]], axis=0)
        assert np.linalg.norm(owed[key]) < 4 * np.linalg.norm(inputs)
        assert np.abs(result.means[-1][tensor]).max() > 0.1


@pytest.mark.slow
@BOTH
def test_zeros_after_something_send_what_is_owed(alternate):
    """All of it: the factors change from step to step."""
    (first,) = draw(2, steps=1)
    zeros = [[np.zeros(n, np.float32) for n in SIZES]] * 2
    result = run(PowerSGD(2, alternate=alternate), [first] + [zeros] * 40)
    norms = [np.linalg.norm(value) for value in result.residuals.total().values()]
    assert max(norms) < 1e-2


@BOTH
def test_gradients_of_rank_one_do_not_use_up_the_other_columns(alternate):
    """Columns that depend on one another would count twice, or be lost for later gradients."""
    rng = np.random.default_rng(0)
    ones = [np.outer(rng.normal(size=12), rng.normal(size=10)) for _ in range(6)]
    messages = [[[np.float32(m).ravel()]] * 2 for m in ones]
    full = draw(2, steps=30, shapes=[(12, 10)])
    result = run(PowerSGD(4, alternate=alternate), [*messages, *full], shapes=[(12, 10)])
    for number, of_replicas in enumerate(messages):
        sent = of_replicas[0][0]
        assert np.linalg.norm(result.means[number][0]) <= 6 * np.linalg.norm(sent)
    assert np.linalg.matrix_rank(result.means[-1][0].reshape(12, 10), tol=1e-3) == 4


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e15, 1e30])
@BOTH
def test_the_range_of_the_numbers_does_not_matter(scale, alternate):
    """The square of a gradient is what the power method multiplies with."""
    messages = draw(2, steps=4)
    scaled = [[[np.float32(scale) * m for m in r] for r in s] for s in messages]
    codec = PowerSGD(2, alternate=alternate)
    expected, found = run(codec, messages), run(codec, scaled)
    assert all(found.healthy)
    for means, right in zip(found.means, expected.means, strict=True):
        for mean, one in zip(means, right, strict=True):
            np.testing.assert_allclose(mean / np.float32(scale), one, rtol=1e-3, atol=1e-3)


@BOTH
def test_at_the_end_of_the_range_a_step_is_finite_or_skipped(alternate):
    largest = np.finfo(np.float32).max
    rng = np.random.default_rng(0)
    result = Run(local_transport(2), PowerSGD(2, alternate=alternate), shapes=[(12, 10)])
    for number in range(60):
        numbers = largest * rng.choice([0, 1e-8, 0.01, 0.5, 1], size=[2, 1, 1])
        values = numbers * rng.choice([-1, 1, 0.3], size=[2, 1, 120])
        result.step(np.float32(values), number)
        assert np.isfinite(result.residuals.total()["tensor0"]).all()
        assert all(np.isfinite(v).all() for v in result.factors.state().values())
        assert not result.healthy[-1] or np.isfinite(result.means[-1][0]).all()
    assert sum(result.healthy) > 0


def test_a_rank_that_is_too_large_sends_in_full():
    messages = draw(2, steps=2)
    result = run(PowerSGD(200), messages)
    for means, of_replicas in zip(result.means, messages, strict=True):
        for mean, *values in zip(means, *of_replicas, strict=True):
            np.testing.assert_allclose(mean, np.mean(values, axis=0), atol=1e-6)
    assert result.sent == [2 * 4 * (sum(SIZES) + 1) // 2] * 2


def test_nothing_at_all():
    assert run(PowerSGD(2), [[[]] * 2], shapes=[]).means == [[]]


# ------------------------------------------------------------------------------- graph and state


def operations(layers, alternate, feedback):
    """In the graph of an exchange, functions within it included."""
    shapes = [(24, 16)] * layers
    result = Run(LocalTransport(["CPU:0"] * 2), PowerSGD(2, alternate=alternate), shapes=shapes)
    if not feedback:
        result.aggregator.residuals = None

    def exchange(vectors, step):
        flags = [tf.constant(True)] * 2
        found = result.aggregator.exchange(vectors, flags, step)
        return found.mean, found.healthy, [value for _, value in found.updates]

    spec = tf.TensorSpec([layers * 24 * 16])
    graph = (
        tf.function(exchange, autograph=False)
        .get_concrete_function([spec, spec], tf.TensorSpec([], tf.int32))
        .graph
    )
    inner = [f.node_def for f in graph.as_graph_def().library.function]
    kinds = [op.type for op in graph.get_operations()] + [n.op for nodes in inner for n in nodes]
    return [kind for kind in kinds if kind not in ("Const", "ReadVariableOp", "Placeholder")]


@pytest.mark.parametrize("feedback", [True, False])
@BOTH
def test_the_graph_does_not_grow_with_the_number_of_equal_matrices(alternate, feedback):
    two, twenty = (operations(layers, alternate, feedback) for layers in (2, 20))
    assert sorted(two) == sorted(twenty)
    assert two.count("BatchMatMulV2") + two.count("MatMul") <= 14


def factors_of(ledger):
    return {k: v for k, v in ledger.state().items() if k.startswith("factors/")}


def exchange_of(world, codec):
    return GradientExchange(ExchangeOptions(codec, min_size=0), Ledger(local_transport(world)))


def reduce(exchange, of_replicas, step):
    messages = [
        Message(key, [tf.constant(r[t].reshape(shape)) for r in of_replicas])
        for t, (key, shape) in enumerate(zip(KEYS, SHAPES, strict=True))
    ]
    reduction = exchange.reduce(messages, tf.constant(step))
    reduction.record()
    reduction.commit()
    return [mean.numpy() for mean in reduction.means]


@BOTH
def test_a_run_goes_on_with_another_number_of_replicas(alternate):
    """Two replicas with equal messages are one with these: means and factors are the same."""
    codec = PowerSGD(2, alternate=alternate)
    messages = draw(1, steps=7)
    begun, expected = exchange_of(1, codec), exchange_of(1, codec)
    for step, of_replicas in enumerate(messages[:3]):
        reduce(begun, of_replicas, step)
        reduce(expected, of_replicas, step)
    again = exchange_of(3, codec)
    again.ledger.load_state(begun.ledger.state())
    np.testing.assert_equal(factors_of(again.ledger), factors_of(begun.ledger))
    for step, of_replicas in enumerate(messages[3:], start=3):
        means = reduce(again, of_replicas * 3, step)
        for mean, right in zip(means, reduce(expected, of_replicas, step), strict=True):
            np.testing.assert_allclose(mean, right, atol=1e-4)


def test_the_warm_start_is_kept_by_tensor():
    exchange = exchange_of(2, PowerSGD(2))
    reduce(exchange, draw(2, steps=1)[0], 0)
    state = factors_of(exchange.ledger)
    matrices = [key for t, key in enumerate(KEYS) if t not in REST]
    assert state.keys() == {"factors/step", *(f"factors/right/{key}" for key in matrices)}
    assert {v.shape for k, v in state.items() if "right" in k} == {(2, 10), (2, 6)}
    routes = {route.path: (route.schedule, route.codec) for route in exchange.ledger.routes}
    for tensor, key in enumerate(KEYS):
        in_full = "float32 (less than PowerSGD(rank=2, alternate=False))"
        description = in_full if tensor in REST else "PowerSGD(rank=2, alternate=False)"
        assert routes[key] == ("low_rank", description)


def test_factors_of_another_rank_begin_anew():
    saved = Factors(2, 0, None)
    saved.variable("right", ["a", "b"], 10)
    other = Factors(3, 0, None)
    other.load_state(saved.state())
    fresh = Factors(3, 0, None)
    for factors in (other, fresh):
        assert factors.variable("right", ["a", "b"], 10).shape == [2, 3, 10]
    np.testing.assert_equal(other.state(), fresh.state())


def test_factors_begin_with_the_same_and_not_all_alike():
    one, two = Factors(2, 0, None), Factors(2, 0, None)
    values = [f.variable("right", ["a", "b"], 10).numpy() for f in (one, two)]
    np.testing.assert_array_equal(*values)
    assert (values[0][0] != values[0][1]).all()
    other = Factors(2, 1, None).variable("right", ["a"], 10).numpy()[0]
    assert (values[0][0] != other).all()


def test_a_tensor_keeps_its_factor_in_another_bucket():
    factors = Factors(2, 0, None)
    before = factors.variable("right", ["a", "b"], 10)
    before.assign_add(tf.ones_like(before))
    after = factors.variable("right", ["b", "c"], 10)
    np.testing.assert_array_equal(after[0], before[1])


def test_matrices_are_of_all_axes_but_the_last():
    """A kernel of height, width, channels and filters: its filters are columns."""
    assert PowerSGD(2).reduces((3, 3, 8, 16))
    assert low_rank.matrix_shape((3, 3, 8, 16)) == (72, 16)
    result = run(PowerSGD(1), draw(1, 1, shapes=[(3, 3, 8, 16)]), shapes=[(3, 3, 8, 16)])
    assert result.factors.state()["right/tensor0"].shape == (1, 16)
