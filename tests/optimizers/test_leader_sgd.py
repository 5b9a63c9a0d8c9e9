"""Leader SGD against NumPy, against steps worked by hand, and at the ends of its parameters."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.optimizers.local_runs import SHAPES, flat, follow, random_losses, run
from tests.optimizers.local_sgd_reference import LeaderReference
from tests.replicas import build, copies, plain, random_gradients
from tests.rungs import slow_unless
from tfqcomm.compressors import BlockSign, Identity, TopK
from tfqcomm.optimizers import LeaderSGD
from tfqcomm.optimizers.local.leader_sgd import leader_sgd_pull
from tfqcomm.optimizers.local.leader_vote import choose_leaders, mean_loss
from tfqcomm.state.ledger import ledger_of

STEPS = 40


def leader_sgd(**kwargs):
    return functools.partial(LeaderSGD, 0.1, **kwargs)


def leader_reference(lam, lam_g, tau, tau_g, **kwargs):
    return functools.partial(LeaderReference, lam=lam, lam_g=lam_g, tau=tau, tau_g=tau_g, **kwargs)


def one_run(make, world, steps=STEPS, losses=None, gradients=None, shapes=SHAPES):
    """The optimizer and [steps, W, d]."""
    strategy = plain(world)
    optimizer, variables = build(strategy, make, shapes)
    gradients = random_gradients(steps, world, shapes) if gradients is None else gradients
    losses = random_losses(steps, world) if losses is None else losses
    return optimizer, flat(run(strategy, optimizer, variables, gradients, losses))


# ------------------------------------------------------------------------------------ the algorithm


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_group_follows_the_paper(world, momentum):
    optimizer, _, expected = follow(
        leader_sgd(momentum=momentum, global_pull=0.3, global_period=3, local_pull=0.7),
        leader_reference(0.7, 0.3, 64, 3, momentum=momentum),
        world,
    )
    assert len(expected.leaders) == 33
    np.testing.assert_array_equal(
        optimizer.times_led, np.bincount(expected.leaders, minlength=world)
    )


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_follow_the_paper(groups):
    """Local pulls alone, global ones alone, and both at once: periods 2 and 3."""
    follow(
        leader_sgd(local_pull=0.2, global_pull=0.5, local_period=2, global_period=3, groups=groups),
        leader_reference(0.2, 0.5, 2, 3, groups=groups),
        4,
    )


def test_nesterov_weight_decay_and_schedule():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([30, 60], [0.1, 0.05, 0.01])
    make = functools.partial(
        LeaderSGD, schedule, 0.9, nesterov=True, weight_decay=0.2, global_period=2, loss_window=3
    )
    reference = leader_reference(
        0.1, 0.1, 64, 2, momentum=0.9, nesterov=True, weight_decay=0.2, window=3
    )
    follow(
        make, reference, 2, rate=lambda step: 0.1 if step <= 30 else 0.05 if step <= 60 else 0.01
    )


def test_three_steps_by_hand():
    """Two workers at 1, rate 0.1; worker 1 leads at step 2, of which the losses are 3 and 2.5."""
    gradients = [np.float32([[[1.0], [2.0]], [[1.0], [-1.0]], [[0.0], [4.0]]])]
    losses = np.float32([[2.0, 3.0], [4.0, 2.0], [9.0, 0.0]])
    strategy = plain(2)
    optimizer, variables = build(strategy, leader_sgd(global_pull=0.5, global_period=2), [(1,)])
    variables[0].assign([1.0])
    (history,) = run(strategy, optimizer, variables, gradients, losses)
    np.testing.assert_allclose(history[0], [[0.9], [0.8]], rtol=1e-6)
    # after the steps 0.8 and 0.9; then worker 0 goes half of the way, and worker 1 stays
    np.testing.assert_allclose(history[1], [[0.85], [0.9]], rtol=1e-6)
    np.testing.assert_allclose(history[2], [[0.85], [0.5]], rtol=1e-6)


def test_without_pull_replicas_are_independent_sgds():
    gradients = random_gradients(STEPS, 4, SHAPES)
    _, history = one_run(
        leader_sgd(momentum=0.9, global_pull=0.0, global_period=1), 4, gradients=gradients
    )
    for rank in range(4):
        strategy = plain()
        sgd, variables = build(strategy, lambda: keras.optimizers.SGD(0.1, momentum=0.9), SHAPES)
        for step in range(STEPS):
            sgd.apply([tf.constant(g[step, rank]) for g in gradients], variables)
        right = np.concatenate([v.numpy().ravel() for v in variables])
        np.testing.assert_allclose(history[-1, rank], right, atol=1e-6)


def test_full_pull_at_every_step_makes_all_equal_the_leader():
    losses = random_losses(STEPS, 4)
    _, history = one_run(leader_sgd(global_pull=1.0, global_period=1, loss_window=1), 4)
    gradients = flat(random_gradients(STEPS, 4, SHAPES))
    assert len(set(losses.argmin(axis=1))) == 4
    for step in range(1, STEPS):
        for rank in range(4):
            np.testing.assert_array_equal(history[step, rank], history[step, 0])
        leader = losses[step].argmin()
        right = history[step - 1, leader] - np.float32(0.1) * gradients[step, leader]
        np.testing.assert_allclose(history[step, 0], right, rtol=1e-6, atol=1e-7)


def test_the_leader_does_not_move():
    """Not even by a rounding error."""
    gradients = random_gradients(STEPS, 3, SHAPES)
    losses = np.float32([[2.0, 1.0, 3.0]] * STEPS)
    _, pulled = one_run(
        leader_sgd(momentum=0.9, global_pull=0.3, global_period=1),
        3,
        losses=losses,
        gradients=gradients,
    )
    _, alone = one_run(
        leader_sgd(momentum=0.9, global_pull=0.0), 3, losses=losses, gradients=gradients
    )
    np.testing.assert_array_equal(pulled[:, 1], alone[:, 1])
    assert not np.allclose(pulled[-1, 0], alone[-1, 0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.1, "clipnorm": 0.5},
        {"momentum": 0.9, "nesterov": True, "use_ema": True},
        {"momentum": 0.9, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_a_single_worker_is_plain_sgd(options):
    gradients = random_gradients(20, 1, SHAPES)
    results = []
    for make in (
        leader_sgd(global_period=1, **options),
        lambda: keras.optimizers.SGD(0.1, **options),
    ):
        optimizer, variables = build(plain(), make, SHAPES)
        for step in range(20):
            optimizer.apply([tf.constant(g[step, 0]) for g in gradients], variables)
        results.append(np.concatenate([v.numpy().ravel() for v in variables]))
    np.testing.assert_allclose(*results, rtol=1e-6, atol=1e-7)


def test_clipping_acts_on_a_replicas_own_gradient():
    gradients = [np.full([1, 2, 1], 4.0, np.float32)]
    strategy = plain(2)
    optimizer, variables = build(strategy, leader_sgd(clipvalue=3.0), [(1,)])
    variables[0].assign([1.0])
    (history,) = run(strategy, optimizer, variables, gradients)
    np.testing.assert_allclose(history[0], [[0.7], [0.7]], rtol=1e-6)


# ------------------------------------------------------------------------------------------ votes


def test_mean_loss_counts_what_was_seen():
    nan, inf = np.nan, np.inf
    for window, mean, count in [
        ([nan, nan, nan], inf, 0),
        ([nan, nan, 2.0], 2.0, 1),
        ([nan, 1.0, 4.0], 2.5, 2),
        ([1.0, inf, 4.0], inf, 3),
    ]:
        found, seen = mean_loss(tf.constant(window))
        assert (float(found), int(seen)) == (mean, count)


def test_choose_leaders():
    inf = np.inf
    for losses, groups, leaders, exist in [
        ([3.0, 1.0, 2.0, 1.0], 1, [1], [True]),  # ties: the lowest rank
        ([3.0, 1.0, 2.0, 1.0], 2, [1, 3], [True, True]),
        ([3.0, 1.0, 2.0, 2.0], 4, [0, 1, 2, 3], [True] * 4),
        ([inf, inf, inf, 5.0], 2, [0, 3], [False, True]),
    ]:
        found, there = choose_leaders(tf.constant(losses), groups)
        assert found.numpy().tolist() == leaders
        assert there.numpy().tolist() == exist


def test_pull_is_exact_at_its_ends():
    x, z = tf.constant([1e10, 0.1]), tf.constant([0.3, 7.0])
    np.testing.assert_array_equal(leader_sgd_pull(x, [(0.0, z)]), x)
    np.testing.assert_array_equal(leader_sgd_pull(x, [(1.0, z)]), z)
    np.testing.assert_allclose(
        leader_sgd_pull(tf.constant(1.0), [(0.25, 3.0), (0.5, 5.0)]), 1 + 0.25 * 2 + 0.5 * 4
    )


def test_only_the_last_losses_count():
    """Worker 0 was better for long, worker 1 is better now."""
    losses = np.float32([[1.0, 50.0]] * 6 + [[3.0, 2.0]] * 3)
    leads = {}
    for window in (3, 10):
        optimizer, _ = one_run(
            leader_sgd(global_period=9, loss_window=window), 2, steps=9, losses=losses
        )
        leads[window] = optimizer.times_led.tolist()
    assert leads == {3: [0, 1], 10: [1, 0]}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_counts_as_infinite(bad):
    losses = np.float32([[1.0, 2.0], [bad, 2.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    optimizer, _ = one_run(leader_sgd(global_period=1, loss_window=2), 2, steps=5, losses=losses)
    assert optimizer.times_led.tolist() == [3, 2]  # it leads again when it is out of the window


def test_nobody_leads_where_no_loss_is_finite():
    losses = np.full([5, 2], np.nan, np.float32)
    make = leader_sgd(global_period=1, global_pull=0.5)
    optimizer, history = one_run(make, 2, steps=5, losses=losses)
    _, alone = one_run(leader_sgd(global_pull=0.0), 2, steps=5)
    np.testing.assert_array_equal(history, alone)
    assert optimizer.times_led.tolist() == [0, 0]


def test_a_replica_that_has_gone_wrong_does_not_lead():
    strategy = plain(2)
    optimizer, variables = build(strategy, leader_sgd(global_period=1, global_pull=1.0), SHAPES)
    broken = copies_of(strategy, variables)[0][0]
    broken.assign(np.full([4, 3], np.inf, np.float32))
    gradients, losses = random_gradients(2, 2, SHAPES), np.float32([[1.0, 2.0]] * 2)
    run(strategy, optimizer, variables, gradients, losses)
    assert optimizer.times_led.tolist() == [0, 2]
    assert np.isfinite(copies(strategy, variables)[1][0]).all()


def copies_of(strategy, variables):
    """The variables of each replica."""
    return list(
        zip(*[strategy.experimental_local_results(v.value) for v in variables], strict=True)
    )


def test_a_first_pull_without_any_loss_is_an_error():
    strategy = plain(2)
    optimizer, variables = build(strategy, leader_sgd(global_period=3), SHAPES)
    run(strategy, optimizer, variables, random_gradients(2, 2, SHAPES))  # before the pull
    with pytest.raises(tf.errors.InvalidArgumentError, match="leader_sgd has seen no loss.*call"):
        run(strategy, optimizer, variables, random_gradients(1, 2, SHAPES))


# ---------------------------------------------------------------------------------- what goes wrong


def test_a_gradient_that_is_not_finite_skips_the_replicas_own_step():
    gradients = random_gradients(6, 2, SHAPES)
    make = leader_sgd(momentum=0.9, weight_decay=0.1, global_pull=0.0)
    _, right = one_run(make, 2, gradients=gradients, steps=6)
    gradients[0][3, 1, 2, 1] = np.nan
    optimizer, history = one_run(make, 2, gradients=gradients, steps=6)
    np.testing.assert_array_equal(history[:, 0], right[:, 0])
    np.testing.assert_array_equal(history[3, 1], history[2, 1])
    assert np.isfinite(history).all()
    assert optimizer.iterations.numpy() == 6
    traffic = ledger_of(optimizer).meter.read()
    assert (traffic.steps, traffic.skipped_steps) == (6, 1)
    # as if the step had never been, for its momentum too
    kept = [np.delete(g, 3, axis=0) for g in gradients]
    _, without = one_run(make, 2, gradients=kept, steps=5)
    np.testing.assert_array_equal(history[-1, 1], without[-1, 1])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"momentum": 1.0}, r"`momentum` must be a float in \[0, 1\). Received: momentum=1.0"),
        ({"local_pull": 1.5}, r"`local_pull` must be a float in \[0, 1\]. .*local_pull=1.5"),
        ({"global_pull": -1}, r"`global_pull` must be a float in \[0, 1\]. .*global_pull=-1"),
        ({"global_pull": "a"}, r"`global_pull` must be a float in \[0, 1\]. .*global_pull='a'"),
        ({"local_period": 0}, "`local_period` must be a positive integer. .*local_period=0"),
        ({"global_period": 1.5}, "`global_period` must be a positive integer. .*=1.5"),
        ({"groups": True}, "`groups` must be a positive integer. Received: groups=True"),
        ({"loss_window": -2}, "`loss_window` must be a positive integer. .*loss_window=-2"),
        ({"seed": -1}, "`seed` must be a non-negative 32-bit integer. Received: seed=-1"),
        ({"nesterov": 1}, "`nesterov` must be a bool. Received: nesterov=1"),
        ({"leader_compressor": "zip"}, "`compressor` must be None, a .*compressor='zip'"),
        (
            {"groups": 2, "local_pull": 0.6, "global_pull": 0.5},
            "`local_pull` and `global_pull` may act together .*local_pull=0.6, global_pull=0.5",
        ),
    ],
    ids=str,
)
def test_arguments_are_checked_at_construction(arguments, text):
    with pytest.raises(ValueError, match=f"Arguments? {text}"):
        LeaderSGD(**arguments)


def test_groups_must_divide_the_replicas():
    strategy = plain(4)
    optimizer, variables = build(strategy, leader_sgd(groups=3), SHAPES)
    with pytest.raises(ValueError, match="`groups` must divide .* replicas, 4. Received: groups=3"):
        run(strategy, optimizer, variables, random_gradients(1, 4, SHAPES))


@pytest.mark.parametrize(
    "options",
    [{"use_ema": True}, {"gradient_accumulation_steps": 2}],
    ids=lambda options: [*options][0],
)
def test_what_differing_replicas_cannot_do_is_refused(options):
    ((name, value),) = options.items()
    strategy = plain(2)
    optimizer, variables = build(strategy, leader_sgd(**options), SHAPES)
    with pytest.raises(ValueError, match=f"(?s)`{name}` is not supported.*{name}={value}"):
        run(strategy, optimizer, variables, random_gradients(1, 2, SHAPES))


def test_calls_outside_of_a_replica_are_refused():
    strategy = plain(2)
    optimizer, variables = build(strategy, leader_sgd(), [(3,)])
    text = "must be called in a replica context: inside `strategy.run"
    with strategy.scope(), pytest.raises(ValueError, match=f"`leader_sgd.apply` {text}"):
        optimizer.apply([tf.zeros([3])], variables)
    with strategy.scope(), pytest.raises(ValueError, match=f"`leader_sgd.observe_loss` {text}"):
        optimizer.observe_loss(tf.constant(1.0))


# -------------------------------------------------------------------------------- what is broadcast


def test_bytes_of_votes_and_pulls():
    """Four workers, 17 parameters: 3 x 12 for a vote, 3/4 x 68 for all, 1/2 x 68 for a group."""
    optimizer, _ = one_run(leader_sgd(groups=2, local_period=2, global_period=3), 4, steps=6)
    traffic = ledger_of(optimizer).meter.read()
    assert traffic.bytes_sent == 4 * 36 + 2 * 51 + 3 * 34  # pulls at 2, 3, 4 and 6
    assert traffic.dense_bytes == 6 * 2 * 3 * 68 // 4
    halved, _ = one_run(leader_sgd(global_period=3, leader_compressor="bfloat16"), 4, steps=6)
    assert ledger_of(halved).meter.read().bytes_sent == 2 * (36 + 27)  # 9 words


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("compressor", [BlockSign(), TopK(0.2)], ids=str)
def test_a_lossy_compressor_encodes_the_difference_to_the_last_leader(compressor, groups):
    """With a full pull everybody but the leader holds what was decoded."""
    losses = random_losses(STEPS, 4)
    optimizer, history = one_run(
        leader_sgd(
            local_pull=1.0 if groups > 1 else 0.0,
            global_pull=0.0 if groups > 1 else 1.0,
            local_period=1,
            global_period=1,
            groups=groups,
            loss_window=1,
            leader_compressor=compressor,
        ),
        4,
        losses=losses,
    )
    gradients = flat(random_gradients(STEPS, 4, SHAPES))
    strategy = plain(1)
    _, variables = build(strategy, leader_sgd(), SHAPES)
    start = np.concatenate([v.numpy().ravel() for v in variables])
    known, x, size = np.stack([start] * groups), np.stack([start] * 4), 4 // groups
    for step in range(STEPS):
        x = x - np.float32(0.1) * gradients[step]
        for group in range(groups):
            ranks = range(group * size, (group + 1) * size)
            leader = min(ranks, key=lambda r: losses[step, r])
            words = compressor.encode(x[leader] - known[group])
            known[group] += compressor.decode(words, n=17).numpy()
            for rank in ranks:
                x[rank] = x[rank] if rank == leader else known[group]
        np.testing.assert_allclose(history[step], x, atol=1e-5, err_msg=f"step {step}")


def test_bfloat16_stays_close_to_float32():
    options = {"momentum": 0.9, "global_pull": 0.5, "global_period": 2}
    _, exact = one_run(leader_sgd(**options), 3)
    _, rounded = one_run(leader_sgd(leader_compressor="bfloat16", **options), 3)
    assert 0 < np.abs(exact - rounded).max() < 0.02


# ----------------------------------------------------------------------------------------- in Keras


def test_config_round_trip():
    optimizer = LeaderSGD(
        0.3,
        0.8,
        groups=2,
        loss_window=5,
        leader_compressor=TopK(0.1),
        weight_decay=0.1,
        name="mine",
    )
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert type(again) is LeaderSGD
    assert again.get_config() == optimizer.get_config()
    assert (again.groups, again.leader_compressor) == (2, TopK(0.1))
    assert LeaderSGD().leader_compressor == Identity()
    with pytest.raises(TypeError):
        LeaderSGD(0.1, 0.9, 0.5)  # the rest is keyword-only


X = np.random.default_rng(0).normal(size=[2048, 6]).astype("float32")
Y = (X.sum(axis=1) > 0.3).astype("int32")


def compiled(strategy, optimizer, dtype="float32", **kwargs):
    keras.utils.set_random_seed(0)
    layers = keras.layers
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input([6]), layers.Dense(8, activation="tanh", dtype=dtype), layers.Dense(2)]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer(), loss=loss, **kwargs)
    return model


def fit(model, epochs=2, examples=2048, batch=64):
    x, y = X[:examples], Y[:examples]
    return model.fit(x, y, batch_size=batch, epochs=epochs, shuffle=False, verbose=0).history


def test_fit_learns_and_everybody_leads():
    strategy = plain(4)
    model = compiled(strategy, leader_sgd(momentum=0.5, global_period=2, loss_window=2))
    history = fit(model, epochs=4)
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    share = model.optimizer.times_led / 64
    assert share.sum() == 1
    assert (share >= 0.15).all() and (share <= 0.40).all(), share
    first, *others = copies(strategy, model.trainable_variables)
    assert not any(np.array_equal(first[0], other[0]) for other in others)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    slow_unless(
        lambda options: "run_eagerly" not in options,
        [{"run_eagerly": True}, {"steps_per_execution": 4}],
    ),
    ids=str,
)
def test_fit_does_the_same_in_other_ways(options):
    make = leader_sgd(
        momentum=0.9, groups=2, local_period=2, global_period=3, leader_compressor="bfloat16"
    )
    results = []
    for kwargs in ({}, options):
        strategy = plain(2)
        model = compiled(strategy, make, **kwargs)
        fit(model, examples=8 * 64, epochs=1)
        results.append(copies(strategy, model.weights))
    for a, b in zip(*results, strict=True):
        for one, two in zip(a, b, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-6)


def test_losses_reach_the_optimizer_inside_of_a_loss_scale_optimizer():
    keras.config.set_dtype_policy("mixed_float16")  # the `fresh_session` fixture puts it back
    model = compiled(
        plain(2),
        lambda: keras.optimizers.LossScaleOptimizer(LeaderSGD(0.1, global_period=2)),
        dtype=None,
    )
    history = fit(model, examples=8 * 64)
    assert history["loss"][-1] < history["loss"][0]
    assert model.optimizer.inner_optimizer.times_led.sum() == 8


def test_xla_and_constraints_are_refused():
    model = compiled(plain(2), leader_sgd(), jit_compile=True)
    with pytest.raises(ValueError, match="cannot be compiled by XLA.*`model.compile.*jit_compile"):
        fit(model)
    strategy = plain(2)
    with strategy.scope():
        constraint = keras.constraints.NonNeg()
        model = keras.Sequential(
            [keras.Input([6]), keras.layers.Dense(2, bias_constraint=constraint)]
        )
        model.compile(LeaderSGD(), loss="mse")
    with pytest.raises(ValueError, match="Constraints of weights are not .*dense.*/bias"):
        model.fit(X[:8], np.zeros([8, 2]), batch_size=4, verbose=0)
