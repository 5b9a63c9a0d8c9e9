"""DiLoCo: any optimizer on every replica, and an outer step on what they have in common."""

from __future__ import annotations

import functools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

from tests.multi_process import run_workers
from tests.optimizers.diloco_reference import DiLoCoReference, keep_largest
from tests.optimizers.local_runs import SHAPES, flat, follow, run
from tests.optimizers.memory_functions import train_diloco, train_diloco_twice
from tests.replicas import (
    apply_gradients,
    assert_replicas_equal,
    build,
    copies,
    plain,
    random_gradients,
)
from tfqcomm.callbacks import AverageReplicas, BackupAndRestore
from tfqcomm.compressors import AdaptiveTopK, PowerSGD, TopK
from tfqcomm.kernels.layout import Segment
from tfqcomm.optimizers import CompAMS, DiLoCo
from tfqcomm.optimizers.local.pieces import Piece, cut, deal, ranges
from tfqcomm.state.ledger import ledger_of, restore_state
from tfqcomm.step import ExchangeOptions

SIZES = [12, 5]
CUT = [8, 4, 5]  # into two fragments: the first variable is in both
VARIABLES = [slice(0, 12), slice(12, 17)]

INNER = {
    "Adam": functools.partial(keras.optimizers.Adam, 0.05, clipnorm=1.0),
    "AdamW": functools.partial(keras.optimizers.AdamW, 0.05, weight_decay=0.1),
    "SGD": functools.partial(keras.optimizers.SGD, 0.05, momentum=0.9, nesterov=True),
    "Nadam": functools.partial(keras.optimizers.Nadam, 0.05),
    "Adafactor": functools.partial(keras.optimizers.Adafactor, 0.05),
    "Muon": functools.partial(keras.optimizers.Muon, 0.05),
    "schedule": lambda: keras.optimizers.Lion(keras.optimizers.schedules.CosineDecay(0.05, 30)),
}


def averaging(inner, every=1, **options):
    """With an outer step that is no more than the mean."""
    return DiLoCo(inner(), every, outer_learning_rate=1.0, outer_momentum=0.0, **options)


# ------------------------------------------------------------------------------------ the algorithm


@pytest.mark.parametrize("name", INNER)
def test_one_replica_that_averages_itself_does_what_its_inner_optimizer_does(name):
    gradients = random_gradients(30, 1, SHAPES)
    histories = []
    for make in (INNER[name], functools.partial(averaging, INNER[name])):
        optimizer, variables = build(plain(), make, SHAPES)
        histories.append(flat(run(plain(), optimizer, variables, gradients)))
    np.testing.assert_allclose(histories[1], histories[0], atol=1e-6)
    assert ledger_of(optimizer).meter.read().bytes_sent == 0


def test_averaging_after_every_step_of_sgd_is_synchronous_sgd():
    gradients = random_gradients(30, 4, SHAPES)
    strategy = plain(4)
    make = functools.partial(averaging, lambda: keras.optimizers.SGD(0.1))
    optimizer, variables = build(strategy, make, SHAPES)
    run(strategy, optimizer, variables, gradients)
    assert_replicas_equal(strategy, variables)
    sgd, expected = build(plain(), lambda: keras.optimizers.SGD(0.1), SHAPES)
    for step in range(30):
        sgd.apply([tf.constant(g[step].mean(axis=0)) for g in gradients], expected)
    for variable, right in zip(variables, expected, strict=True):
        np.testing.assert_allclose(variable.numpy(), right.numpy(), atol=1e-5)


def adam(every, **options):
    """With betas that float32 can hold: Keras computes its bias correction in float32."""
    return DiLoCo(keras.optimizers.Adam(0.1, 0.875, 0.9375), every, min_size=0, **options)


CODEC = {"compressor": TopK(0.3), "schedule": "all_gather"}


@pytest.mark.parametrize("codec", [None, "top_k"])
@pytest.mark.parametrize(
    ("every", "fragments", "sizes", "turns"), [(5, 1, SIZES, (0, 0)), (6, 2, CUT, (0, 3, 3))]
)
def test_hundred_steps_are_those_of_the_paper(every, fragments, sizes, turns, codec):
    options = CODEC if codec else {}
    optimizer, history, expected = follow(
        functools.partial(adam, every, fragments=fragments, **options),
        functools.partial(
            DiLoCoReference,
            every=every,
            sizes=sizes,
            turns=turns,
            codec=keep_largest(0.3) if codec else None,
        ),
        2,
    )
    exchanges = 0
    for turn, part in zip(turns, expected.parts, strict=True):
        after = [t for t in range(1, 101) if t % every == turn]
        exchanges += len(after)
        for t in after:
            np.testing.assert_array_equal(history[t - 1, 0, part], history[t - 1, 1, part])
            if t > every:
                assert (history[t - 2, 0, part] != history[t - 2, 1, part]).all()
    state = ledger_of(optimizer).state()
    for index, part in enumerate(VARIABLES):
        kept = [state[f"shared/{name}/{index}"] for name in ("global", "outer_momentum")]
        np.testing.assert_allclose(kept[0].ravel(), expected.theta[part], atol=2e-5)
        np.testing.assert_allclose(kept[1].ravel(), expected.buffer[part], atol=2e-5)
        moment = state[f"worker/inner/{2 * index}"].ravel()
        np.testing.assert_allclose(moment, expected.m[:, part].mean(axis=0), atol=2e-5)
        if codec:
            owed = expected.residual[:, part].mean(axis=0)
            assert np.abs(owed).max() > 1e-2
            np.testing.assert_allclose(state[f"residual/{index}"], owed, atol=2e-5)
    assert ledger_of(optimizer).meter.read().skipped_steps == 0


def test_two_rounds_by_hand():
    """Two workers at 1, inner SGD(0.1), H = 2, outer rate 0.5 and momentum 0.5."""
    gradients = [np.float32([[[1.0], [3.0]], [[1.0], [1.0]], [[0.0], [2.0]], [[0.0], [0.0]]])]
    strategy = plain(2)
    make = lambda: DiLoCo(keras.optimizers.SGD(0.1), 2, 0.5, 0.5)  # noqa: E731
    optimizer, variables = build(strategy, make, [(1,)])
    variables[0].assign([1.0])
    (history,) = run(strategy, optimizer, variables, gradients)
    np.testing.assert_allclose(history[0], [[0.9], [0.7]], rtol=1e-6)
    # 0.8 and 0.6: delta 0.3, buffer 0.3; 1 - 0.5 (0.3 + 0.5 * 0.3) = 0.775
    np.testing.assert_allclose(history[1], [[0.775], [0.775]], rtol=1e-6)
    # 0.775 and 0.575: delta 0.1, buffer 0.25; 0.775 - 0.5 (0.1 + 0.125) = 0.6625
    np.testing.assert_allclose(history[3], [[0.6625], [0.6625]], rtol=1e-6)


CNN = [(5, 5, 1, 10), (10,), (5, 5, 10, 20), (20,), (320, 50), (50,), (50, 10), (10,)]  # MNIST's


def elements(fragments):
    """How many elements each has; asserts that together they have all, in order, and once."""
    for place, shape in enumerate(CNN):
        own = [(p.start, p.stop) for f in fragments for p in f if p.place == place]
        assert [start for start, _ in own] == [0, *(stop for _, stop in own[:-1])]
        assert own[-1][1] == math.prod(shape)
    return [sum(p.stop - p.start for p in fragment) for fragment in fragments]


@pytest.mark.parametrize("fragments", range(1, 17))
def test_fragments_are_of_about_equal_size(fragments):
    variables = [keras.Variable(np.zeros(shape, "float32"), name="v") for shape in CNN]
    paths = [f"layer{i}" for i in range(8)]

    def cut_by(**options):
        return cut(variables, paths, ExchangeOptions(**options), fragments)

    counts = elements(cut_by(compressor=None))
    assert len(counts) == fragments and max(counts) <= 1.125 * 21840 / fragments
    # What is compressed, and what is too small to be, apart from each other.
    for fragment in cut_by(compressor="block_int8"):
        for places, total in (((2, 4), 21000), ((0, 1, 3, 5, 6, 7), 840)):
            own = sum(p.stop - p.start for p in fragment if p.place in places)
            assert 0.85 * total / fragments < own <= 1.125 * total / fragments
    # A matrix of low rank stays whole.
    policy = {"layer4": PowerSGD(2), "*": None}
    pieces = cut_by(compressor=policy, min_size=0)
    assert [p for f in pieces for p in f if p.place == 4] == [Piece(4, (320, 50), 0, 16000)]
    elements(pieces)


def test_cuts_are_where_blocks_begin_if_these_are_small_for_a_fragment():
    assert [len(fragment) for fragment in ranges([1000, 100_000, 77], 4)] == [2, 1, 1, 2]
    starts = [s.start for fragment in ranges([1000, 100_000, 77], 4) for s in fragment]
    assert all(start % 256 == 0 for start in starts)
    assert ranges([12, 5], 2) == [[Segment(0, 0, 8)], [Segment(0, 8, 12), Segment(1, 0, 5)]]
    assert [len(fragment) for fragment in ranges([2], 3)] == [0, 1, 1]


def test_whole_variables_are_dealt():
    assert deal([5, 9, 1, 4, 1], 2) == [[1, 2], [0, 3, 4]]
    assert deal([3, 3], 1) == [[0, 1]]
    assert deal([3], 2) == [[0], []]
    sizes = np.random.default_rng(0).integers(1, 100, 50)
    dealt = deal(list(sizes), 4)
    assert sorted(sum(dealt, [])) == list(range(50))
    sums = [sizes[fragment].sum() for fragment in dealt]
    assert max(sums) < 1.02 * min(sums)


# ------------------------------------------------------------------------------------ what it sends


@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("world", [2, 3])
def test_bytes_are_those_of_synchronous_training_divided_by_h(fragments, world):
    strategy = plain(world)
    make = functools.partial(adam, 4, fragments=fragments)
    optimizer, variables = build(strategy, make, [(6, 5), (30,)])
    run(strategy, optimizer, variables, random_gradients(40, world, [(6, 5), (30,)]))
    traffic = ledger_of(optimizer).meter.read()
    assert traffic.dense_bytes == 40 * (2 * (world - 1) * 240 // world)
    assert traffic.bytes_sent == traffic.dense_bytes // 4
    routes = ledger_of(optimizer).routes
    assert [r.path for r in routes] == [v.path for v in variables]
    assert {r.codec for r in routes} == {"float32 every 4 steps"}


def test_a_compressed_exchange_sends_its_payload():
    strategy = plain(2)
    make = functools.partial(adam, 4, compressor="block_int8", schedule="all_gather")
    optimizer, variables = build(strategy, make, [(32, 32)])
    run(strategy, optimizer, variables, random_gradients(40, 2, [(32, 32)]))
    # Four scales, four entries a word, and a word that tells whether all of it was finite.
    assert ledger_of(optimizer).meter.read().bytes_sent == 10 * 4 * (4 + 256 + 1)


def bytes_by_step(steps, shapes, make, world=2):
    """What one worker sends in each of so many steps."""
    strategy = plain(world)
    optimizer, variables = build(strategy, make, shapes)
    gradients = [tf.ones(shape) for shape in shapes]
    step = tf.function(lambda: strategy.run(optimizer.apply, (gradients, variables)))
    sent = [0]
    for _ in range(steps):
        step()
        sent.append(ledger_of(optimizer).meter.read().bytes_sent)
    return np.diff(sent)


def test_fragments_lower_the_peak_to_the_mean():
    make = functools.partial(adam, 4, fragments=4)
    np.testing.assert_array_equal(bytes_by_step(8, [(5, 2)] * 4, make), 4 * 10)


@pytest.mark.parametrize(
    ("fragments", "options"),
    [(8, {}), pytest.param(8, {"compressor": "block_int8"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_one_large_variable_does_not_make_a_peak(fragments, options):
    """Three quarters of this model are one kernel."""
    make = lambda: DiLoCo(keras.optimizers.SGD(0.1), 16, fragments=fragments, **options)  # noqa: E731
    sent = bytes_by_step(16, CNN, make)
    assert np.count_nonzero(sent) == fragments
    assert sent.max() <= 1.15 * sent[sent > 0].mean()


# ------------------------------------------------------------------------------- what is not finite


def test_a_bad_gradient_costs_a_step_of_this_process_and_no_more():
    gradients = random_gradients(8, 2, SHAPES)
    gradients[0][2, 1, 0, 0] = np.nan
    strategy = plain(2)
    optimizer, variables = build(strategy, functools.partial(adam, 4), SHAPES)
    history = flat(run(strategy, optimizer, variables, gradients))
    np.testing.assert_array_equal(history[2], history[1])
    assert np.isfinite(history).all() and (history[3] != history[2]).all()
    assert optimizer.iterations.numpy() == 8  # so that exchanges stay together
    assert optimizer.inner.iterations.numpy() == 7
    assert ledger_of(optimizer).meter.read().skipped_steps == 1


def test_a_replica_that_has_gone_wrong_costs_a_round_and_all_go_on():
    strategy = plain(2)
    optimizer, variables = build(strategy, functools.partial(adam, 4, **CODEC), SHAPES)
    gradients = random_gradients(16, 2, SHAPES)
    first = run(strategy, optimizer, variables, [g[:6] for g in gradients])
    before = ledger_of(optimizer).state()
    strategy.experimental_local_results(variables[0].value)[1].assign(np.full([4, 3], np.inf))
    history = flat(run(strategy, optimizer, variables, [g[6:] for g in gradients]))
    np.testing.assert_array_equal(history[1], flat(first)[3])  # the end of the round before
    assert np.isfinite(history[1:]).all()
    after = ledger_of(optimizer).state()
    assert ledger_of(optimizer).meter.read().skipped_steps == 1
    moved = [name for name in before if not np.array_equal(before[name], after[name])]
    assert len(moved) == len(before)  # two rounds have been taken since then


# ------------------------------------------------------------------------------------------ backups

X = np.random.default_rng(0).normal(size=[96, 6]).astype("float32")
Y = X[:, :2] ** 2


def compiled(world=1, every=5, rate=0.02, **options):
    keras.utils.set_random_seed(0)
    options = {"compressor": TopK(0.3), "schedule": "all_gather", "min_size": 0, **options}
    with plain(world).scope():
        layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(2)]
        model = keras.Sequential([keras.Input([6]), *layers])
        model.compile(DiLoCo(keras.optimizers.Adam(rate), every, **options), "mse")
    return model


def fit(model, epochs=1, **options):
    return model.fit(X, Y, batch_size=12, epochs=epochs, shuffle=False, verbose=0, **options)


@pytest.mark.parametrize("fragments", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_that_was_interrupted_goes_on_to_the_bit(fragments, tmp_path):
    """Eight steps an epoch, five a round: in the middle of one."""
    expected = compiled(fragments=fragments)
    fit(expected, 3)
    stopped = compiled(fragments=fragments)
    fit(stopped, 1, callbacks=[BackupAndRestore(tmp_path, delete_checkpoint=False)])
    again = compiled(fragments=fragments)
    fit(again, 3, callbacks=[BackupAndRestore(tmp_path)])
    for a, b in zip(again.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for name, value in ledger_of(expected.optimizer).state().items():
        np.testing.assert_array_equal(ledger_of(again.optimizer).state()[name], value, name)


@pytest.mark.slow
def test_every_slot_is_kept_also_under_a_schedule_which_is_no_variable():
    found = []
    for rate in (0.02, keras.optimizers.schedules.CosineDecay(0.02, 100)):
        model = compiled(world=2, rate=rate)
        fit(model)
        found.append({k: v.shape for k, v in ledger_of(model.optimizer).state().items()})
    assert found[0] == found[1]
    assert sum(name.startswith("worker/inner") for name in found[0]) == 2 * 4  # m and v of each


@pytest.mark.slow
def test_another_number_of_replicas_owes_the_same_and_starts_from_the_same_weights():
    """And with another number of fragments, that are made of other parts of the variables."""
    model = compiled(world=2)
    fit(model, 2)
    saved = ledger_of(model.optimizer).state()
    assert any(np.abs(v).max() > 1e-3 for k, v in saved.items() if k.startswith("residual"))
    more = compiled(world=4, every=1000, fragments=2)
    restore_state(more.optimizer, saved)
    optimizer = more.optimizer
    fit(more)  # no round of a thousand steps comes to its end
    state = ledger_of(optimizer).state()
    assert state.keys() == saved.keys()
    for name in saved:
        if name.startswith(("residual/", "shared/")):
            np.testing.assert_allclose(state[name], saved[name], rtol=1e-6, atol=1e-7)
    restore_state(optimizer, saved)  # also into one that has begun
    state = ledger_of(optimizer).state()
    for name, value in saved.items():
        np.testing.assert_allclose(state[name], value, rtol=1e-6, atol=1e-7, err_msg=name)


def test_what_the_inner_optimizer_remembers_is_each_replicas_own():
    model = compiled(world=2)
    fit(model)
    moments = copies(plain(2), model.optimizer.inner.variables[2:])
    assert not any(np.array_equal(a, b) for a, b in zip(*moments, strict=True))
    state = ledger_of(model.optimizer).state()
    for number, (a, b) in enumerate(zip(*moments, strict=True)):
        np.testing.assert_allclose(state[f"worker/inner/{number}"], (a + b) / 2, rtol=1e-6)


# ----------------------------------------------------------------------------------------- in `fit`


@pytest.mark.slow
def test_neither_an_exchange_nor_a_new_epoch_traces_again(monkeypatch):
    traced = []
    step = DiLoCo.distributed_step
    monkeypatch.setattr(DiLoCo, "distributed_step", lambda *a: traced.append(1) or step(*a))
    model = compiled(world=2, fragments=5)
    fit(model)
    traces = len(traced)
    fit(model, 3)
    assert len(traced) == traces > 0


@pytest.mark.slow
def test_eager_steps_are_those_of_the_graph():
    models = [compiled(2, fragments=5), compiled(2, fragments=5)]
    models[1].compile(models[1].optimizer, "mse", run_eagerly=True)
    for model in models:
        fit(model, 2)
    assert models[0].optimizer.iterations.numpy() == 16
    for a, b in zip(*(copies(plain(2), m.weights) for m in models), strict=True):
        for one, two in zip(a, b, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-5)
    sent = [ledger_of(model.optimizer).meter.read().bytes_sent for model in models]
    assert sent[0] == sent[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"compressor": AdaptiveTopK(0.3), "granularity": "model"},
        {"compressor": "ternary", "fragments": 2},
        {"compressor": "float16", "fragments": 2},
        {"compressor": PowerSGD(1), "fragments": 2},
        {"compressor": PowerSGD(1, alternate=True)},
        {"compressor": "block_sign", "fragments": 2, "schedule": "two_phase"},
    ],
    ids=lambda options: str(options["compressor"]),
)
def test_other_compressors_go_through(options):
    model = compiled(2, 4, outer_momentum=0.5, **{"schedule": "auto", **options})
    losses = fit(model, 6).history["loss"]
    assert losses[-1] < losses[0]
    assert ledger_of(model.optimizer).meter.read().skipped_steps == 0


def test_fragments_of_one_round_draw_apart():
    """Of two variables alike each keeps entries of its own, in step 2 and in step 1."""
    shape = (20, 15)
    options = {"every": 2, "fragments": 2, "compressor": "random_k", "min_size": 0}
    strategy = plain(2)
    optimizer, variables = build(
        strategy,
        lambda: DiLoCo(keras.optimizers.SGD(0.1), outer_momentum=0.0, **options),
        [shape, shape],
    )
    start = [v.numpy() for v in variables]
    found = apply_gradients(
        strategy, optimizer, variables, [np.ones([2, 2, *shape], "float32")] * 2
    )
    kept = [found[0][1] != start[0], found[1][0] != start[1]]
    assert kept[0].sum() == kept[1].sum() == 0.01 * 300
    assert (kept[0] != kept[1]).any()


class Watcher(keras.callbacks.Callback):
    """Notes what an evaluation sees, and with what weights the next epoch goes on."""

    def on_train_batch_end(self, batch, logs=None):
        self.own = copies(self.model.distribute_strategy, self.model.trainable_variables)

    def on_epoch_end(self, epoch, logs=None):
        self.shown = copies(self.model.distribute_strategy, self.model.trainable_variables)
        self.at_the_end = self.own

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            self.begun = copies(self.model.distribute_strategy, self.model.trainable_variables)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_average_replicas_shows_the_global_weights(world):
    model = compiled(world)
    watcher = Watcher()
    fit(model, 1, callbacks=[AverageReplicas(), watcher])
    state = ledger_of(model.optimizer).state()
    weights = [state[f"shared/global/{i}"] for i in range(4)]
    for replica in [*watcher.shown, model.get_weights()]:
        for shown, right in zip(replica, weights, strict=True):
            np.testing.assert_array_equal(shown, right)
    assert not np.array_equal(watcher.at_the_end[0][0], weights[0])


@pytest.mark.slow
def test_looking_does_not_change_the_training():
    results = []
    for callbacks in ([], [AverageReplicas()]):
        model, watcher = compiled(2), Watcher()
        fit(model, 3, callbacks=[*callbacks, watcher])
        results.append(watcher.own)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_learning_rate_is_that_of_the_inner_optimizer():
    model = compiled()
    model.optimizer.learning_rate = 0.5
    assert float(model.optimizer.inner.learning_rate) == 0.5
    rates = keras.callbacks.LearningRateScheduler(lambda epoch: 0.25)
    fit(model, callbacks=[rates])
    assert float(model.optimizer.learning_rate) == 0.25


def test_loss_scaling_goes_around_it():
    keras.utils.set_random_seed(0)
    strategy = plain(2)
    with strategy.scope():
        model = keras.Sequential([keras.Input([6]), keras.layers.Dense(2)])
        inner = DiLoCo(keras.optimizers.Adam(0.02), 4)
        model.compile(keras.optimizers.LossScaleOptimizer(inner), "mse")
    losses = fit(model, 3).history["loss"]
    assert losses[-1] < losses[0]
    assert ledger_of(inner).meter.read().steps == 24
    assert_replicas_equal(strategy, model.trainable_variables)


@pytest.mark.slow
def test_digits_are_learnt_as_by_synchronous_adam():
    """H = 16 and differences in int8: a fiftieth of the bytes."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype("float32"), y[order].astype("int32")
    accuracies = []
    for make in (
        lambda: keras.optimizers.Adam(2e-3),
        lambda: DiLoCo(keras.optimizers.Adam(2e-3), 16, compressor="block_int8", min_size=0),
    ):
        keras.utils.set_random_seed(0)
        with plain(2).scope():
            layers = [keras.layers.Dense(n, activation="relu") for n in (64, 32)]
            model = keras.Sequential([keras.Input([64]), *layers, keras.layers.Dense(10)])
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(make(), loss, metrics=["accuracy"])
        options = {"batch_size": 32, "epochs": 24, "verbose": 0}
        model.fit(x[:1280], y[:1280], callbacks=[AverageReplicas()], **options)
        accuracies.append(model.evaluate(x[1280:1792], y[1280:1792], batch_size=64, verbose=0)[1])
    traffic = ledger_of(model.optimizer).meter.read()
    assert accuracies[0] > 0.95
    assert accuracies[1] > accuracies[0] - 0.02
    assert traffic.dense_bytes / traffic.bytes_sent > 50


# ---------------------------------------------------------------------------------------- arguments


def test_config_round_trip():
    inner = keras.optimizers.AdamW(1e-3, weight_decay=0.1)
    optimizer = DiLoCo(inner, 8, 0.5, 0.8, "block_int8", 4, min_size=3, name="mine")
    config = keras.saving.serialize_keras_object(optimizer)
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == optimizer.get_config()
    assert type(again.inner) is keras.optimizers.AdamW
    assert (again.every, again.fragments, again.exchange_options.min_size) == (8, 4, 3)
    assert (again.global_weights.learning_rate, again.global_weights.momentum) == (0.5, 0.8)
    assert isinstance(DiLoCo("adam", 4).inner, keras.optimizers.Adam)


def built():
    optimizer = keras.optimizers.SGD()
    optimizer.build([keras.Variable(np.zeros(2, "float32"))])
    return optimizer


@pytest.mark.parametrize(
    ("inner", "text"),
    [
        (lambda: CompAMS(), "it exchanges what replicas do itself. Received: inner=CompAMS"),
        (lambda: DiLoCo("sgd", 2), "it exchanges what replicas do itself. Received: inner=DiLoCo"),
        (lambda: keras.optimizers.Ftrl(), "it computes weights from its own sums alone"),
        (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), "put it around"),
        (lambda: keras.optimizers.SGD(use_ema=True), r"`use_ema` is not .*inner=SGD\(use_ema=True"),
        (
            lambda: keras.optimizers.SGD(gradient_accumulation_steps=2),
            r"`gradient_accumulation_steps` is not supported.*SGD\(gradient_accumulation_steps=2\)",
        ),
        (built, "it has been built already, for variables of its own. Received: inner=SGD"),
    ],
)
def test_what_cannot_be_inside_is_refused_with_the_reason(inner, text):
    with pytest.raises(ValueError, match=f"(?s)Argument `inner` cannot be this one: .*{text}"):
        DiLoCo(inner(), 4)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"every": 0}, "`every` must be a positive integer. Received: every=0"),
        ({"outer_learning_rate": 0}, "`outer_learning_rate` must be a positive float. .*=0"),
        ({"outer_momentum": 1.0}, r"`outer_momentum` must be a float in \[0, 1\). .*=1.0"),
        ({"fragments": 0}, "`fragments` must be a positive integer. Received: fragments=0"),
        ({"fragments": 3}, "`fragments` must divide `every`.*Received: fragments=3, every=4"),
        ({"fragments": 2, "compressor": AdaptiveTopK(0.1)}, "`fragments` must be 1 with a comp"),
        ({"fragments": 2, "compressor": PowerSGD(1, alternate=True)}, "`fragments` must be 1"),
        ({"weight_decay": 0.1}, r"not recognized: \{'weight_decay': 0.1\}. Those of DiLoCo are"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(arguments, text):
    with pytest.raises(ValueError, match=text):
        DiLoCo(**{"inner": "adam", "every": 4, **arguments})


def test_constraints_are_refused():
    kernel = keras.Variable(np.zeros([2, 2], "float32"), name="kernel")
    kernel.constraint = keras.constraints.NonNeg()
    optimizer = DiLoCo("sgd", 4)
    optimizer.build([kernel])
    with pytest.raises(ValueError, match=r"outer optimizer.*Received: constraints on \['kernel'\]"):
        optimizer.apply([np.zeros([2, 2], "float32")], [kernel])


def test_it_must_be_made_in_the_scope_under_which_it_trains():
    """The inner optimizer, too: its state would be that of no replica."""
    inner = keras.optimizers.SGD(0.1)
    strategy = plain(2)
    optimizer, variables = build(strategy, lambda: DiLoCo(inner, 2), SHAPES)
    with pytest.raises(ValueError, match=r"(?s)`sgd` must be created in the scope.*Received: SGD"):
        run(strategy, optimizer, variables, random_gradients(2, 2, SHAPES))


# ---------------------------------------------------------------------------------- real processes


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_processes_do_what_two_devices_do():
    (one, scaled), (two, _) = run_workers(train_diloco_twice)
    assert scaled["steps"] == 16 and scaled["loss"][1] < scaled["loss"][0]
    alone = train_diloco(plain(2))
    for a, b in zip(one["global"], two["global"], strict=True):
        np.testing.assert_array_equal(a, b)
    assert not any(np.array_equal(a, b) for a, b in zip(one["own"][0], two["own"][0], strict=True))
    for worker, own in ((one, alone["own"][0]), (two, alone["own"][1])):
        for a, b in zip(
            [*worker["global"], *worker["own"][0]], [*alone["global"], *own], strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-6)
        assert worker["bytes"] == alone["bytes"] > 0
        for name, value in alone["state"].items():
            np.testing.assert_allclose(worker["state"][name], value, atol=1e-6, err_msg=name)
