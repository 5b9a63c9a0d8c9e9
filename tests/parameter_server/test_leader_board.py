"""Elections and errands of asynchronous Leader SGD, whatever the order of the workers' steps."""

import collections
import math

import numpy as np
import pytest

from tfqcomm.optimizers import LeaderSGD
from tfqcomm.parameter_server.leader.board import Buffer, LeaderBoard


def make_board(workers=4, **arguments):
    optimizer = LeaderSGD(**{"global_period": 2, **arguments})
    return LeaderBoard(optimizer.levels, workers, lambda: Buffer([]))


def go(board, rank, loss=1.0):
    """A step and its errand, at once: whom it was pulled to, as (weight, leader)."""
    errand = board.after_step(rank, loss)
    leaders = {id(s.shown): s.leader for _, slots in board.slots for s in slots}
    pulls = [(weight, leaders[id(buffer)]) for weight, buffer in errand.pulls]
    board.done(rank, errand, shown=errand.show is not None)
    return pulls, errand


def test_the_lowest_loss_leads_and_each_of_the_others_is_pulled_once():
    board = make_board(workers=3, global_pull=0.5)
    for rank, loss in [(0, 3.0), (1, 1.0), (2, 2.0), (0, 3.0), (1, 1.5)]:
        assert go(board, rank, loss)[1].show is None
    assert go(board, 2, 2.0)[1].show is None  # step 6 of 3 * 2: elects 1
    assert go(board, 0)[0] == []  # nothing is shown yet
    pulls, errand = go(board, 1, 0.9)
    assert errand.show is board.buffers[0] and pulls == []
    assert go(board, 1)[0] == []  # the leader does not move
    assert go(board, 0)[0] == [(0.5, 1)]
    assert go(board, 0)[0] == []  # once
    assert board.times_led == [0, 1, 0]
    pulls, errand = go(board, 2)  # steps 8 to 11 came in between
    assert pulls == [(0.5, 1)]
    assert errand.ages == (board.total - 8,)


@pytest.mark.parametrize(
    ("losses", "leader"),
    [
        ([2.0, 1.0, 1.0, 3.0], 1),  # ties: the lowest rank
        ([math.inf, math.nan, 5.0, -math.inf], 2),  # what is not finite does not lead
    ],
)
def test_who_leads(losses, leader):
    board = make_board(global_period=1)
    for rank, loss in enumerate(losses):
        go(board, rank, loss)
    assert [slot.elected for slot in board.slots[0][1]] == [leader]


def test_nobody_leads_before_the_first_finite_loss():
    board = make_board(global_period=1)
    errands = [go(board, rank, math.inf)[1] for rank in (0, 1, 2, 3, 0, 1, 2, 3)]
    assert not any(errand.show or errand.pulls for errand in errands)


def test_groups_have_leaders_of_their_own_and_one_of_all():
    board = make_board(
        workers=4, groups=2, local_period=1, global_period=2, local_pull=0.3, global_pull=0.2
    )
    losses = [4.0, 3.0, 2.0, 1.0]
    for rank in range(4):
        go(board, rank, losses[rank])
    first = [go(board, rank, losses[rank])[0] for rank in (1, 3, 0, 2)]  # 1 and 3 show
    assert first == [[], [], [(0.3, 1)], [(0.3, 3)]]
    # Step 8: elections in both groups and of all; 3 shows its weights once for both.
    second = [go(board, rank, losses[rank])[0] for rank in (1, 3, 0, 2)]
    assert second[:2] == [[], []]
    assert second[2] == [(0.3, 1), (0.2, 3)]
    assert second[3] == [(pytest.approx(0.5), 3)]
    assert go(board, 1, 3.0)[0] == [(0.2, 3)]  # leads its group, not all
    assert board.times_led == [0, 0, 0, 1]


def test_a_lost_worker_leads_nobody():
    board = make_board(workers=3, global_period=1)
    for rank, loss in enumerate([2.0, 1.0, 3.0]):
        go(board, rank, loss)
    board.lose(1)
    assert go(board, 2, 3.0)[1].show is None
    assert go(board, 0, 2.0)[1].show is not None
    assert go(board, 2, 3.0)[0] == [(0.1, 0)]


def test_weights_that_could_not_be_shown_are_not_pulled():
    board = make_board(workers=2, global_period=1)
    go(board, 0, 1.0)
    go(board, 1, 2.0)
    errand = board.after_step(0, 1.0)
    board.done(0, errand, shown=False)  # it was lost on its errand
    assert go(board, 1, 2.0)[0] == []
    assert board.buffers[0].users == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_in_any_order_no_weights_are_overwritten_while_somebody_reads_them(groups):
    """Errands overlap as they may: each worker begins and ends its own whenever it likes."""
    rng = np.random.default_rng(groups)
    board = make_board(workers=6, groups=groups, local_period=3, global_period=6)
    content = {}  # buffer -> what was last put there
    away = {}  # rank -> its errand, and what it read at the beginning
    pulled = collections.Counter()
    for number in range(5000):
        rank = int(rng.choice(6, p=[0.3, 0.3, 0.2, 0.1, 0.08, 0.02]))
        if rank in away:
            errand, seen = away.pop(rank)
            assert [content[buffer] for _, buffer in errand.pulls] == seen
            board.done(rank, errand, shown=errand.show is not None)
            continue
        errand = board.after_step(rank, float(rng.random()))
        if errand.show is not None:
            content[errand.show] = (rank, number)
        seen = [content[buffer] for _, buffer in errand.pulls]
        assert all(leader != rank for leader, _ in seen)
        pulled[rank] += len(seen)
        away[rank] = errand, seen
    assert len(board.buffers) <= 2 * groups + 6
    assert min(pulled.values()) > 10  # the slowest, with one step in fifty, is pulled as well
    assert min(board.times_led) > 0
