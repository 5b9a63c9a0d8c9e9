"""The syncer's book of Decoupled DiLoCo: rounds, quorum, grace, and what comes too late."""

import collections

import numpy as np
import pytest

from tfqcomm.parameter_server.diloco.rounds import Rounds

SECONDS = 1.0  # of a step


class Clock:
    """Goes when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def make_rounds(learners=3, fragments=2, every=2, quorum=2, **arguments):
    clock = Clock()
    return Rounds(fragments, every, learners, quorum, clock=clock, **arguments), clock


def step(rounds, rank, examples=8):
    rounds.took_step(rank, examples, SECONDS)


def take_all(rounds, rank):
    """Takes what there is; returns (fragment, version, whole) of each."""
    taken = []
    while (delivery := rounds.delivery(rank)) is not None:
        rounds.delivered(rank, delivery)
        taken.append((delivery.fragment, delivery.version, delivery.whole))
    return taken


def answer(rounds, rank, finite=True):
    """Answers one round; returns its fragment and whether the answer counts."""
    one = rounds.to_answer(rank)
    return None if one is None else (one.fragment, rounds.answered(rank, one, finite))


def merge(rounds):
    """Merges what is over; returns its fragment and the weights of its answers."""
    one = rounds.to_merge()
    if one is None:
        return None
    rounds.end(one)
    return one.fragment, one.answers


def all_step(rounds, learners=3, times=1):
    for _ in range(times):
        for rank in range(learners):
            step(rounds, rank)


def test_a_round_asks_merges_and_is_delivered_at_steps_ends():
    rounds, _ = make_rounds()
    all_step(rounds)
    assert [answer(rounds, rank) for rank in range(3)] == [None] * 3  # it is not time yet
    all_step(rounds)  # two steps of an average learner
    assert [answer(rounds, rank) for rank in range(3)] == [(0, True)] * 3
    assert [answer(rounds, rank) for rank in range(3)] == [None] * 3  # once
    assert merge(rounds) == (0, dict.fromkeys(range(3), 16**2 / 2))
    assert merge(rounds) is None
    assert [take_all(rounds, rank) for rank in range(3)] == [[(0, 1, False)]] * 3
    assert [take_all(rounds, rank) for rank in range(3)] == [[]] * 3
    assert rounds.merged == 1
    assert [learner.taken for learner in rounds.learners] == [1, 1, 1]


def test_fragments_take_turns():
    rounds, _ = make_rounds(fragments=3)
    found = []
    for _ in range(5):
        all_step(rounds, times=2)
        found += [answer(rounds, rank)[0] for rank in range(3)][:1]
        merge(rounds)
        for rank in range(3):
            take_all(rounds, rank)
    assert found == [0, 1, 2, 0, 1]


def test_weights_are_squares_of_examples_by_steps_since_the_fragment_came():
    rounds, _ = make_rounds(learners=2, fragments=1, every=3)
    for rank, examples in [(0, 4), (0, 6), (0, 0), (1, 32), (0, 2), (0, 4)]:
        step(rounds, rank, examples)  # of none: the step was skipped
    assert answer(rounds, 0) == answer(rounds, 1) == (0, True)
    assert merge(rounds) == (0, {0: 16**2 / 4, 1: 32**2 / 1})
    take_all(rounds, 0)
    step(rounds, 0, 5)
    take_all(rounds, 1)
    for rank in [0, 1, 1, 0, 0]:
        step(rounds, rank, 5)
    assert answer(rounds, 0) == answer(rounds, 1) == (0, True)
    assert merge(rounds) == (0, {0: 20**2 / 4, 1: 10**2 / 2})


def test_a_learner_answers_only_after_a_step_from_the_newest_weights():
    rounds, _ = make_rounds(learners=2, fragments=1, quorum=1, grace=0.0)
    all_step(rounds, 2, times=2)
    assert answer(rounds, 0) == (0, True)
    assert merge(rounds) == (0, {0: 16**2 / 2})
    assert take_all(rounds, 0) == [(0, 1, False)]
    for _ in range(4):
        step(rounds, 0)
    assert answer(rounds, 1) is None  # its anchor is outdated
    assert take_all(rounds, 1) == [(0, 1, False)]
    assert answer(rounds, 1) is None  # it has not gone anywhere from there
    step(rounds, 1)
    assert answer(rounds, 1) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "grace"),
    [
        ({}, 10 * SECONDS - 3.0),  # tau t_step - t_quorum
        ({"grace": 0.5}, (10 * SECONDS - 3.0) / 2),
        ({"grace": 0.0}, 0.0),
        ({"grace_seconds": 2.0}, 2.0),
        ({"grace_seconds": 20.0}, 10 * SECONDS - 3.0),
    ],
)
def test_with_a_quorum_a_round_waits_for_its_grace_and_no_longer(arguments, grace):
    rounds, clock = make_rounds(every=10, **arguments)
    all_step(rounds, times=10)
    assert answer(rounds, 0) == (0, True)
    clock.now += 1000.0
    assert merge(rounds) is None  # without a quorum, however long it takes
    clock.now += 3.0 - 1000.0
    assert answer(rounds, 1) == (0, True)
    clock.now += grace - 0.01
    if grace:
        assert merge(rounds) is None
    clock.now += 0.02
    assert merge(rounds)[1].keys() == {0, 1}


def test_merging_takes_its_time_off_the_grace():
    rounds, clock = make_rounds(every=10)
    all_step(rounds, times=10)
    for rank in range(3):
        answer(rounds, rank)
    one = rounds.to_merge()
    clock.now += 4.0
    rounds.end(one)
    all_step(rounds, times=10)
    assert answer(rounds, 0) == answer(rounds, 1) == (1, True)
    clock.now += 10.0 - 4.0 - 0.01
    assert merge(rounds) is None
    clock.now += 0.02
    assert merge(rounds)[0] == 1


def test_an_answer_that_comes_late_is_dropped_and_counted():
    rounds, _ = make_rounds(grace=0.0)
    all_step(rounds, times=2)
    late = rounds.to_answer(2)
    assert answer(rounds, 0) == answer(rounds, 1) == (0, True)
    one = rounds.to_merge()
    assert not rounds.answered(2, late, finite=True)  # while servers merge
    rounds.end(one)
    assert rounds.learners[2].dropped == 1
    assert one.answers.keys() == {0, 1}
    assert rounds.to_answer(2) is None


def test_an_answer_from_before_a_restart_is_dropped():
    rounds, _ = make_rounds()
    all_step(rounds, times=2)
    one = rounds.to_answer(0)
    rounds.restart()
    assert not rounds.answered(0, one, finite=True)
    assert merge(rounds) is None
    assert [take_all(rounds, rank) for rank in range(3)] == [[]] * 3  # they have what there is


def test_no_fragment_is_delivered_while_servers_change_it():
    rounds, _ = make_rounds(learners=2, fragments=1, quorum=1, grace=0.0)
    all_step(rounds, 2, times=2)
    answer(rounds, 0)
    merge(rounds)
    slow = rounds.delivery(1)  # on its way while the next round comes to its end
    take_all(rounds, 0)
    for _ in range(4):
        step(rounds, 0)
    assert answer(rounds, 0) == (0, True)
    one = rounds.to_merge()
    assert rounds.delivery(0) is None
    rounds.delivered(1, slow)
    rounds.end(one)
    assert take_all(rounds, 1) == [(0, 2, False)]  # once more: it may have read half of each


def test_at_most_two_rounds_are_under_way_and_of_different_fragments():
    rounds, _ = make_rounds(fragments=3)
    all_step(rounds, times=20)
    assert [answer(rounds, 0), answer(rounds, 0), answer(rounds, 0)] == [
        (0, True),
        (1, True),
        None,
    ]
    alone, _ = make_rounds(fragments=1)
    all_step(alone, times=20)
    assert [answer(alone, 0), answer(alone, 0)] == [(0, True), None]
    # What could not begin in time begins as soon as it may, and once.
    for rank in (1, 2):
        assert answer(alone, rank) == (0, True)
    merge(alone)
    for rank in range(3):
        take_all(alone, rank)
        step(alone, rank)
    assert answer(alone, 0) == (0, True)


def test_a_quorum_is_of_those_who_are_alive():
    rounds, _ = make_rounds(learners=4, quorum=3, grace=0.0)
    all_step(rounds, 4, times=2)
    assert answer(rounds, 0) == answer(rounds, 1) == (0, True)
    assert merge(rounds) is None
    rounds.lose(2)
    assert merge(rounds) is None  # three are left
    rounds.lose(3)
    assert merge(rounds)[1].keys() == {0, 1}
    # The pace is that of those who are left.
    for rank in (0, 1):
        take_all(rounds, rank)
    all_step(rounds, 2, times=2)
    assert answer(rounds, 0) == answer(rounds, 1) == (1, True)
    assert merge(rounds) == (1, {0: 32**2 / 4, 1: 32**2 / 4})


def test_who_comes_back_takes_all_fragments_whole_and_answers_then():
    rounds, _ = make_rounds()
    rounds.lose(2)
    all_step(rounds, 2, times=2)
    one = rounds.to_answer(0)
    assert not rounds.rejoin(1, life=1)
    assert rounds.rejoin(2, life=2)
    assert not rounds.rejoin(2, life=2)
    assert answer(rounds, 2) is None  # it was not asked
    rounds.answered(0, one, finite=True)
    assert answer(rounds, 1) == (0, True)
    assert merge(rounds)[1].keys() == {0, 1}
    assert take_all(rounds, 2) == [(0, 1, True), (1, 0, True)]
    all_step(rounds, times=2)
    assert answer(rounds, 2) == (1, True)


def test_a_round_that_nobody_is_left_to_answer_is_forgotten():
    rounds, _ = make_rounds(learners=2)
    all_step(rounds, 2, times=2)
    rounds.lose(0)
    assert answer(rounds, 1, finite=False) == (0, False)
    assert merge(rounds) is None
    assert take_all(rounds, 1) == [(0, 0, True), (1, 0, True)]  # instead of what is not finite
    assert rounds.learners[1].dropped == 1
    for _ in range(2):
        step(rounds, 1)
    assert answer(rounds, 1) == (1, True)
    assert merge(rounds) == (1, {1: 16**2 / 2})


def test_ages_are_steps_of_all_since_the_merge():
    rounds, _ = make_rounds()
    all_step(rounds, times=2)
    for rank in range(3):
        answer(rounds, rank)
    merge(rounds)
    assert rounds.delivery(0).age == 0
    for _ in range(5):
        step(rounds, 1)
    assert rounds.delivery(0).age == 5
    rounds.rejoin(2, life=2)
    ages = []
    while (delivery := rounds.delivery(2)) is not None:
        ages.append(delivery.age)
        rounds.delivered(2, delivery)
    assert ages == [5, None]  # the other one was never merged


@pytest.mark.parametrize("fragments", [1, 3])
def test_in_any_order_every_answer_is_counted_from_the_right_weights(fragments):
    """Learners begin and end what they do whenever they like; some are lost and come back."""
    rng = np.random.default_rng(fragments)
    rounds, clock = make_rounds(learners=5, fragments=fragments, every=3, quorum=3)
    has = [[0] * fragments for _ in range(5)]  # versions that learners hold
    now = [0] * fragments  # that servers hold
    doing, lives, counted = {}, [1] * 5, collections.Counter()

    def begin(rank):
        """What the learner does next, until it is its turn again."""
        if (delivery := rounds.delivery(rank)) is not None:
            assert delivery.version == now[delivery.fragment]
            doing[rank] = "delivery", delivery, delivery.version
        elif (one := rounds.to_answer(rank)) is not None:
            assert has[rank][one.fragment] == now[one.fragment]
            doing[rank] = "answer", one, has[rank][one.fragment]
        elif (one := rounds.to_merge()) is not None:
            doing[rank] = "merge", one, None

    for _ in range(20_000):
        rank = int(rng.choice(5, p=[0.28, 0.27, 0.2, 0.15, 0.1]))
        clock.now += float(rng.exponential(0.3))
        if rank not in doing:
            if rng.random() < 0.002:
                rounds.lose(rank)
                lives[rank] += 1
            if rounds.rejoin(rank, lives[rank]):
                has[rank] = [None] * fragments
            step(rounds, rank)
            begin(rank)
            continue
        kind, what, seen = doing.pop(rank)
        if kind == "answer" and rounds.answered(rank, what, finite=rng.random() > 0.02):
            assert seen == now[what.fragment]
            counted[rank] += 1
        elif kind == "delivery":
            rounds.delivered(rank, what)
            has[rank][what.fragment] = seen
        elif kind == "merge":
            rounds.end(what)
            now[what.fragment] += 1
        begin(rank)
    assert rounds.merged > 300
    assert min(counted.values()) > 10  # also of who takes a step while others take three or more
    assert counted == collections.Counter(
        {rank: learner.taken for rank, learner in enumerate(rounds.learners)}
    )
