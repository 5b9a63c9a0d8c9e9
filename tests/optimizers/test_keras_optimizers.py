"""Every optimizer of the installed Keras: two replicas do what one process does, or do nothing.

`docs/optimizers.md` shows the results as a table.
"""

import functools
import inspect
import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.replicas import assert_replicas_equal, compressing, copies, plain

WORLD, ROWS, STEPS = 2, 8, 3
WRAPPERS = {"LossScaleOptimizer", "MultiOptimizer"}
NAMES = sorted(
    name
    for name, value in vars(keras.optimizers).items()
    if isinstance(value, type)
    and issubclass(value, keras.optimizers.Optimizer)
    and value is not keras.optimizers.Optimizer
    and name not in WRAPPERS
)
# What else an optimizer keeps; decay acts on Muon's matrices and on its other variables apart.
OPTIONS = {"weight_decay": 0.1, "use_ema": True, "ema_momentum": 0.5, "clipnorm": 10.0}
MORE = {"Muon": {"adam_weight_decay": 0.2}}
NO_DECAY = {"Ftrl": "weight_decay"}  # its l2 is one
BY_DEFAULT = {"Adam", "ScheduleFreeAdamW"}  # the second overrides Keras' own step


def make(name):
    cls = getattr(keras.optimizers, name)
    options = {**OPTIONS, **MORE.get(name, {})}
    if not inspect.signature(cls).parameters.keys() >= MORE.get(name, {}).keys():
        pytest.skip("Muon of Keras 3.10 does not train on TensorFlow at all")
    options.pop(NO_DECAY.get(name), None)
    return cls(0.01, **options)


class Run:
    """A model with rows, matrices of both shapes, vectors and a constraint, and its optimizer."""

    def __init__(self, strategy, optimizer):
        keras.utils.set_random_seed(0)
        self.strategy = strategy
        with strategy.scope():
            self.model = keras.Sequential(
                [
                    keras.Input([2], dtype="int32"),
                    keras.layers.Embedding(7, 4),
                    keras.layers.Flatten(),
                    keras.layers.Dense(3, activation="tanh", kernel_constraint="max_norm"),
                    keras.layers.Dense(5),
                ]
            )
            self.optimizer = optimizer()
            self.optimizer.build(self.model.trainable_variables)

    @property
    def state(self):
        return [*self.model.variables, *self.optimizer.variables]

    def step(self, tokens, targets, factors):
        """One step on a batch, of which each replica has its part, and its factor of the loss."""
        self._run(*map(tf.constant, (tokens, targets, factors)))

    @functools.cached_property
    def _run(self):
        @tf.function
        def run(*batch):
            self.strategy.run(self._replica_step, args=batch)

        return run

    def loss(self, errors):
        return tf.reduce_mean(errors)

    def _replica_step(self, tokens, targets, factors):
        context = tf.distribute.get_replica_context()
        rank, world = context.replica_id_in_sync_group, context.num_replicas_in_sync
        start = rank * (ROWS // world)
        tokens, targets = (part[start : start + ROWS // world] for part in (tokens, targets))
        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            errors = tf.square(self.model(tokens, training=True) - targets)
            loss = self.loss(errors) * factors[rank] / world
        self.optimizer.apply(tape.gradient(loss, variables), variables)


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        yield rng.integers(0, 7, [ROWS, 2]).astype("int32"), rng.normal(size=[ROWS, 5])


def steps(run, world):
    for tokens, targets in batches():
        run.step(tokens, targets.astype("float32"), np.ones([world], "float32"))


over_keras_optimizers = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in BY_DEFAULT else [pytest.mark.slow]) for n in NAMES],
)


@over_keras_optimizers
def test_two_replicas_equal_one_process_and_a_skipped_step_changes_nothing(name):
    assert_equal_to_one_process(lambda: make(name))


def assert_equal_to_one_process(optimizer):
    one = Run(plain(), optimizer)
    steps(one, 1)

    two = Run(compressing(WORLD, "identity"), optimizer)
    tokens, targets = next(batches())
    bad = tokens, targets.astype("float32"), np.float32([1, np.nan])
    for moment in ("first", "last"):
        before = copies(two.strategy, two.state)
        two.step(*bad)
        np.testing.assert_equal(copies(two.strategy, two.state), before)
        if moment == "first":
            steps(two, WORLD)

    assert_replicas_equal(two.strategy, two.state)
    for mine, right in zip(two.state, one.state, strict=True):
        np.testing.assert_allclose(mine.numpy(), right.numpy(), atol=2e-5, err_msg=mine.path)


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="Keras 3.10 has none")
def test_the_parts_of_a_multi_optimizer_skip_together():
    """A NaN among the gradients of one part: the other part took its step, and all drifted."""

    def optimizer():
        adam, sgd = keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.01, momentum=0.9)
        return keras.optimizers.MultiOptimizer(lambda v: adam if len(v.shape) > 1 else sgd)

    assert_equal_to_one_process(optimizer)

    two = Run(compressing(WORLD, "identity"), optimizer)
    variables = two.model.trainable_variables
    before = copies(two.strategy, two.state)

    @tf.function
    def step():
        values = [tf.where(len(v.shape) > 1, 1.0, float("nan")) for v in variables]
        pairs = zip(values, variables, strict=True)
        two.optimizer.apply([tf.fill(v.shape, value) for value, v in pairs], variables)

    two.strategy.run(step)
    np.testing.assert_equal(copies(two.strategy, two.state), before)


@pytest.mark.slow
def test_a_scaled_loss_trains_as_the_optimizer_inside():
    def scaled():
        return keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01), initial_scale=8.0)

    class Scaling(Run):
        def loss(self, errors):
            return self.optimizer.scale_loss(super().loss(errors))

    one = Run(plain(), lambda: keras.optimizers.Adam(0.01))
    steps(one, 1)
    two = Scaling(compressing(WORLD, "identity"), scaled)
    steps(two, WORLD)
    state = [*two.model.variables, *two.optimizer.inner_optimizer.variables]
    for mine, right in zip(state, one.state, strict=True):
        np.testing.assert_allclose(mine.numpy(), right.numpy(), atol=2e-5, err_msg=mine.path)
    before = copies(two.strategy, state)
    tokens, targets = next(batches())
    two.step(tokens, targets.astype("float32"), np.float32([1, np.nan]))
    np.testing.assert_equal(copies(two.strategy, state), before)
    for replica in copies(two.strategy, [two.optimizer.dynamic_scale]):
        assert replica == [4.0]


def test_every_optimizer_of_keras_is_in_the_table():
    table = (pathlib.Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
    for name in [*NAMES, *WRAPPERS]:
        assert re.search(rf"^\|.*\b{name}\b.*\|$", table, re.MULTILINE), name
