"""DiLoCo whose exchanges are merged some steps after they were sent."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest

from tests.multi_process import run_workers, start_workers
from tests.optimizers import overlap_functions as functions
from tests.optimizers.diloco_reference import DiLoCoReference, keep_largest
from tests.optimizers.local_runs import SHAPES, flat, follow, run
from tests.replicas import build, plain, random_gradients
from tfqcomm.callbacks import BackupAndRestore
from tfqcomm.compressors import TopK
from tfqcomm.optimizers import DiLoCo, SparseLoCo
from tfqcomm.state.ledger import ledger_of, restore_state
from tfqcomm.transport.in_flight import Flights

SIZES = [12, 5]
CUT = [8, 4, 5]  # into two fragments: the first variable is in both
VARIABLES = [slice(0, 12), slice(12, 17)]
CODEC = {"compressor": TopK(0.3), "schedule": "all_gather"}
PATIENCE = 60  # seconds from a fault to its error

# ------------------------------------------------------------------------------------ the algorithm


class Reference(DiLoCoReference):
    """arXiv 2501.18512, Algorithm 2: sent at t, merged at t + overlap; alpha is 1 - merge."""

    def __init__(self, x, *, overlap, merge, **options):
        super().__init__(x, **options)
        self.overlap, self.merge = overlap, merge
        self.sent = {}

    def step(self, gradients, losses, learning_rate):
        self.t += 1
        self.adam(gradients.astype(np.float64), learning_rate)
        for index, (part, turn) in enumerate(zip(self.parts, self.turns, strict=True)):
            if self.t % self.every == turn:
                self.sent[index] = self.t, self.theta[part] - self.x[:, part]
            if index in self.sent and self.t == self.sent[index][0] + self.overlap:
                own = self.x[:, part].copy()
                self.exchange_of(part, self.sent[index][1])
                self.x[:, part] = (1 - self.merge) * own + self.merge * self.theta[part]
        return self.x

    def exchange_of(self, part, differences):
        """What the other reference does with the differences of now."""
        now = self.x[:, part].copy()
        self.x[:, part] = self.theta[part] - differences
        self.exchange(part)
        self.x[:, part] = now


def adam(every, **options):
    """With betas that float32 can hold: Keras computes its bias correction in float32."""
    return DiLoCo(keras.optimizers.Adam(0.1, 0.875, 0.9375), every, min_size=0, **options)


@pytest.mark.parametrize(
    ("world", "every", "turns", "overlap", "merge", "codec"),
    [
        (2, 6, (0, 3, 3), 2, 0.25, True),
        (2, 5, (0, 0), 4, 1.0, True),
        (2, 5, (0, 0), 0, 0.5, False),
        (1, 4, (0, 2, 2), 1, 0.5, False),
    ],
)
def test_hundred_steps_are_those_of_the_paper(world, every, turns, overlap, merge, codec):
    fragments = len(set(turns))
    more = {"overlap": overlap, "merge": merge}
    optimizer, history, expected = follow(
        functools.partial(adam, every, fragments=fragments, **more, **(CODEC if codec else {})),
        functools.partial(
            Reference,
            every=every,
            sizes=CUT if fragments == 2 else SIZES,
            turns=turns,
            codec=keep_largest(0.3) if codec else None,
            **more,
        ),
        world,
    )
    state = ledger_of(optimizer).state()
    for index, part in enumerate(VARIABLES):
        kept = [state[f"shared/{name}/{index}"] for name in ("global", "outer_momentum")]
        np.testing.assert_allclose(kept[0].ravel(), expected.theta[part], atol=2e-5)
        np.testing.assert_allclose(kept[1].ravel(), expected.buffer[part], atol=2e-5)
        if codec:
            owed = expected.residual[:, part].mean(axis=0)
            assert np.abs(owed).max() > 1e-2
            np.testing.assert_allclose(state[f"residual/{index}"], owed, atol=2e-5)
    if world == 2 and merge < 1:
        assert (history[:, 0] != history[:, 1]).any(axis=1).all()
    assert ledger_of(optimizer).meter.read().skipped_steps == 0


def test_a_round_by_hand():
    """Two workers at 1, inner SGD(0.1), H = 2, merged a step later, by a half; outer SGD(1)."""
    gradients = [np.float32([[[1.0], [3.0]], [[1.0], [1.0]], [[0.0], [2.0]], [[0.0], [0.0]]])]
    strategy = plain(2)
    make = lambda: DiLoCo(keras.optimizers.SGD(0.1), 2, 1.0, 0.0, None, 1, 1, 0.5)  # noqa: E731
    optimizer, variables = build(strategy, make, [(1,)])
    variables[0].assign([1.0])
    (history,) = run(strategy, optimizer, variables, gradients)
    # Sent: 0.2 and 0.4. In the step after that Theta = 1 - 0.3; half of it, half of 0.8 and 0.4.
    np.testing.assert_allclose(history[1], [[0.8], [0.6]], rtol=1e-6)
    np.testing.assert_allclose(history[2], [[0.75], [0.55]], rtol=1e-6)
    np.testing.assert_allclose(history[3], [[0.75], [0.55]], rtol=1e-6)


def test_sparse_messages_may_be_merged_later_too():
    """All kept, float32, two replicas with equal norms: DiLoCo that averages."""
    more = {"overlap": 1, "merge": 0.5, "min_size": 0}
    gradients = [np.repeat(g, 2, axis=1) for g in random_gradients(9, 1, SHAPES)]
    strategy, found = plain(2), []
    for make in (
        lambda: SparseLoCo(keras.optimizers.SGD(0.1), 2, TopK(1.0), 1.0, **more),
        lambda: DiLoCo(keras.optimizers.SGD(0.1), 2, 1.0, 0.0, **more),
    ):
        optimizer, variables = build(strategy, make, SHAPES)
        found.append(flat(run(strategy, optimizer, variables, gradients)))
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


@pytest.mark.slow
def test_a_round_that_is_lost_brings_all_back_to_the_global_weights():
    """Also the replica that has gone wrong, of which nothing may be merged."""
    strategy = plain(2)
    make = functools.partial(adam, 4, overlap=2, merge=0.5, **CODEC)
    optimizer, variables = build(strategy, make, SHAPES)
    gradients = random_gradients(12, 2, SHAPES)
    run(strategy, optimizer, variables, [g[:7] for g in gradients])
    strategy.experimental_local_results(variables[0].value)[1].assign(np.full([4, 3], np.inf))
    before = ledger_of(optimizer).state()["shared/global/0"]
    history = flat(run(strategy, optimizer, variables, [g[7:] for g in gradients]))
    assert not np.isfinite(history[1]).all()  # sent with step 8, not yet merged
    for replica in history[2]:
        np.testing.assert_array_equal(replica[:12], before.ravel())
    assert np.isfinite(history[2:]).all()
    assert ledger_of(optimizer).meter.read().skipped_steps == 1


# ------------------------------------------------------------------------------------------ backups


def interrupted(make, tmp_path, before=1, after=3):
    """A run of `after` epochs, and one that stops after `before` of them and goes on."""
    expected = functions.fit(make(), after)
    functions.fit(make(), before, BackupAndRestore(tmp_path, delete_checkpoint=False))
    return expected, functions.fit(make(), after, BackupAndRestore(tmp_path))


@pytest.mark.slow
def test_a_run_that_was_interrupted_before_it_merged_goes_on_to_the_bit(tmp_path):
    """Eight steps an epoch: sent with step 5, merged with step 9."""
    make = functools.partial(functions.compiled, plain(), 5, overlap=4, merge=0.5, **CODEC)
    expected, again = interrupted(make, tmp_path)
    for a, b in zip(again.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    state = ledger_of(expected.optimizer).state()
    assert state["shared/sent_at/0_of_1"] == 20
    for name, value in state.items():
        np.testing.assert_array_equal(ledger_of(again.optimizer).state()[name], value, name)


@pytest.mark.slow
def test_another_number_of_replicas_merges_the_same_mean():
    """Sent by two with step 5, merged by four with step 9."""
    make = functools.partial(functions.compiled, every=5, overlap=4)
    saved = ledger_of(functions.fit(make(plain(2)), 1).optimizer).state()
    model = make(plain(4))
    restore_state(model.optimizer, saved)
    model.optimizer.iterations.assign(8)  # as a backup does
    model.fit(functions.X[:12], functions.Y[:12], batch_size=12, verbose=0)
    state = ledger_of(model.optimizer).state()
    for index in range(4):
        weights, buffer, delta = (
            saved[f"{kind}/{index}"]
            for kind in ("shared/global", "shared/outer_momentum", "worker/sent")
        )
        assert np.abs(delta).max() > 1e-3
        moved = weights - 0.7 * (delta + 0.9 * (0.9 * buffer + delta))
        np.testing.assert_allclose(state[f"shared/global/{index}"], moved, atol=1e-6)


# ---------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"overlap": -1}, "`overlap` must be a non-negative integer. Received: overlap=-1"),
        ({"overlap": 2}, r"`overlap` must be below every / fragments.*=2, every=4, fragments=2"),
        ({"merge": 0.0}, r"`merge` must be a number in \(0, 1\]. Received: merge=0.0"),
        ({"merge": 1.5}, r"`merge` must be a number in \(0, 1\]. Received: merge=1.5"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(arguments, text):
    with pytest.raises(ValueError, match=text):
        DiLoCo("adam", 4, fragments=2, **arguments)
    with pytest.raises(ValueError, match=text):
        SparseLoCo("adam", 4, fragments=2, **arguments)


def test_config_round_trip():
    optimizer = DiLoCo("adam", 8, fragments=2, overlap=3, merge=0.5)
    again = DiLoCo.from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config()
    assert (again.turns.overlap, again.global_weights.merge) == (3, 0.5)


# -------------------------------------------------------------------------------- what is in flight


class Fake:
    """Collectives that note what they are given."""

    def __init__(self):
        self.given = []

    def all_gather(self, value):
        self.given.append(value.numpy())
        return value + 1


def test_flights_are_taken_once_and_those_of_another_step_are_not():
    collectives = Fake()
    flights = Flights(collectives, None)
    flights.start("all_gather", "a", np.float32([1]), 3)
    assert flights.take("all_gather", "a", np.float32([5]), 3) == 2
    assert flights.take("all_gather", "a", np.float32([5]), 3) == 6  # none was under way
    flights.start("all_gather", "a", np.float32([1]), 7)
    assert flights.take("all_gather", "a", np.float32([8]), 4) == 9
    flights.start("all_gather", "a", np.float32([1]), 4)
    flights.load_state({})
    assert flights.take("all_gather", "a", np.float32([8]), 4) == 9
    assert [int(value[0]) for value in collectives.given] == [1, 5, 1, 8, 1, 8]
    assert flights.state() == {}


def test_a_flight_that_fails_tells_who_takes_it():
    broken = type("Broken", (), {"all_gather": lambda self, value: 1 / 0})()
    flights = Flights(broken, None)
    flights.start("all_gather", "a", np.float32([1]), 3)
    with pytest.raises(ZeroDivisionError):
        flights.take("all_gather", "a", np.float32([1]), 3)


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize(("devices", "names"), [(1, list(functions.RUNS)), (2, ["all_gather"])])
def test_two_processes_do_what_one_does_and_go_on_meanwhile(devices, names):
    args = {"names": names, "devices": devices}
    workers = run_workers(functions.train_overlapped, args=args, devices=devices, timeout=300)
    for name in names:
        alone = functions.results(plain(2 * devices), **functions.RUNS[name])
        for rank, worker in enumerate(workers):
            found = worker[name]
            # TensorFlow deals the parts of a batch to the workers in turn.
            for own, right in zip(found["own"], alone["own"][rank::2], strict=True):
                for a, b in zip(own, right, strict=True):
                    np.testing.assert_allclose(a, b, atol=1e-6, err_msg=name)
            for key, value in alone["state"].items():
                np.testing.assert_allclose(found["state"][key], value, atol=1e-6, err_msg=name)
            # Each of two fragments is sent five times in 32 steps, and nothing a second time.
            assert found["started"] == (10 if name in functions.ONE_ROUND else 0)
            if devices == 1:
                assert found["bytes"] == alone["bytes"] > 0


@pytest.mark.slow
@pytest.mark.multi_process
def test_steps_go_on_while_an_exchange_is_under_way():
    for events in run_workers(functions.train_beside_a_slow_exchange):
        sent = events.index("sent")
        assert events[sent : sent + 4] == ["sent", "step 4", "step 5", "step 6"]
        assert events.index("arrived") < events.index("step 7")
        assert events[events.index("step 7") - 1] == "arrived"


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_run_that_is_put_back_drops_what_is_under_way():
    one, two = run_workers(functions.train_and_go_back)
    for a, b in zip(one["weights"], two["weights"], strict=True):
        np.testing.assert_array_equal(a, b)
    assert one["sent_at"] == two["sent_at"] == 28


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_dies_meanwhile_is_named(victim):
    with start_workers(functions.train_for_ever) as running:
        for i in range(2):
            running.wait_for_output(i, "training", timeout=240)
        running.kill(victim)
        running.wait_for_output(1 - victim, "ended", timeout=2 * PATIENCE)
        message, seconds = running.wait()[1 - victim]
    assert f"task:{victim}" in message
    assert seconds < PATIENCE
