"""What moves where, and what it costs: `LocalTransport`, and processes played by threads."""

import numpy as np
import pytest
import tensorflow as tf

from tests.aggregators.processes import run_processes
from tfqcomm.transport.local import LocalTransport
from tfqcomm.transport.of_strategy import transport_for

LAYOUTS = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (2, 2)]  # processes, replicas of each


def on_all_processes(processes, local, function):
    if processes == 1:
        return [function(LocalTransport([f"CPU:{i}" for i in range(local)]))]
    return run_processes(processes, local, function)


@pytest.fixture(params=LAYOUTS, ids=lambda layout: f"{layout[0]}x{layout[1]}")
def layout(request):
    return request.param


def values_of(ranks, shape, dtype=np.int32):
    """Different numbers for every replica."""
    size = int(np.prod(shape))
    return [tf.constant((np.arange(size) + 1000 * r).reshape(shape).astype(dtype)) for r in ranks]


def test_world_and_ranks(layout):
    processes, local = layout
    found = on_all_processes(processes, local, lambda t: (t.world, list(t.ranks), t.local))
    world = processes * local
    assert [f[0] for f in found] == [world] * processes
    assert sum((f[1] for f in found), []) == list(range(world))


def test_all_gather_gives_everyones_words_in_rank_order(layout):
    def gather(transport):
        return transport.all_gather(values_of(transport.ranks, [5]))

    for gathered in on_all_processes(*layout, gather):
        np.testing.assert_array_equal(gathered, values_of(range(layout[0] * layout[1]), [5]))


def test_all_reduce_sums(layout):
    def reduce(transport):
        return transport.all_reduce(values_of(transport.ranks, [5], np.float32))

    world = layout[0] * layout[1]
    for total in on_all_processes(*layout, reduce):
        np.testing.assert_array_equal(total, sum(values_of(range(world), [5], np.float32)))


def test_all_to_all_transposes(layout):
    world = layout[0] * layout[1]
    sent = values_of(range(world), [world, 3])  # row j of replica i is for replica j

    def exchange(transport):
        return transport.all_to_all([sent[rank] for rank in transport.ranks])

    received = sum(on_all_processes(*layout, exchange), [])
    for rank in range(world):
        np.testing.assert_array_equal(received[rank], [sent[i][rank] for i in range(world)])


def groups_that_fit(layout):
    world = layout[0] * layout[1]
    sizes = [size for size in range(1, world + 1) if world % size == 0]
    return [world // n for n in sizes if n % layout[1] == 0 or layout[1] % n == 0]


def test_broadcast_gives_every_group_the_vector_of_its_root(layout):
    world = layout[0] * layout[1]
    sent = values_of(range(world), [5])

    def broadcast(transport):
        received = []
        for groups in groups_that_fit(layout):
            for chosen in range(world // groups):  # the k-th of each group
                roots = tf.constant([g * world // groups + chosen for g in range(groups)])
                received.append(transport.broadcast([sent[r] for r in transport.ranks], roots))
        return received

    found = on_all_processes(*layout, broadcast)
    number = 0
    for groups in groups_that_fit(layout):
        size = world // groups
        for chosen in range(size):
            received = sum([of_process[number] for of_process in found], [])
            for rank, value in enumerate(received):
                np.testing.assert_array_equal(value, sent[rank // size * size + chosen])
            number += 1


def test_broadcast_refuses_groups_that_do_not_fit():
    transport = LocalTransport(["CPU:0"] * 4)
    with pytest.raises(ValueError, match="Argument `roots` must .* equal groups .*: 3 roots"):
        transport.broadcast([tf.zeros([1])] * 4, tf.constant([0, 1, 2]))


@pytest.mark.parametrize(
    ("processes", "local", "groups", "sent"),
    [
        (1, 1, 1, 0),
        (1, 4, 1, 3 * 40 // 4),  # every replica counts as a worker
        (1, 4, 2, 20),
        (1, 4, 4, 0),
        (2, 2, 1, 20),  # a process passes it on to its replicas
        (2, 2, 2, 0),
        (2, 2, 4, 0),
        (3, 1, 1, 26),
    ],
)
def test_bytes_of_a_broadcast_are_the_mean_over_workers(processes, local, groups, sent):
    def cost(transport):
        return transport.bytes_broadcast(10, groups)

    assert on_all_processes(processes, local, cost) == [sent] * processes


def test_all_gather_ragged_keeps_every_length(layout):
    world = layout[0] * layout[1]
    sent = [values_of([rank], [(rank + 1) % world, 2])[0] for rank in range(world)]  # one is empty

    def gather(transport):
        return transport.all_gather_ragged([sent[rank] for rank in transport.ranks])

    for gathered, sent_bytes in on_all_processes(*layout, gather):
        assert len(gathered) == world
        processes, local = layout if layout[0] > 1 else (layout[1], 1)  # who counts as a worker
        words = 1 + 2 * (world - 1)  # a length, and as many rows of two as the longest has
        assert int(sent_bytes) == (processes - 1) * local * 4 * words
        for value, right in zip(gathered, sent, strict=True):
            np.testing.assert_array_equal(value, right)


def test_share_bytes_gives_everyone_those_of_the_first(layout):
    def share(transport):
        return transport.share_bytes(b"seven b" if transport.process == 0 else b"else")

    assert on_all_processes(*layout, share) == [b"seven b"] * layout[0]


@pytest.mark.parametrize(
    ("processes", "local", "gather", "reduce", "to_all"),
    [
        # words = 10, elements = 10, chunk = 10 words per pair
        (1, 1, 0, 0, 0),
        (1, 2, 40, 40, 40),
        (1, 4, 3 * 40, 60, 3 * 40),  # every replica counts as a worker
        (2, 1, 40, 40, 40),
        (2, 2, 2 * 40, 40, 4 * 40),  # a worker is a process and speaks for its replicas
        (3, 2, 2 * 2 * 40, 53, 2 * 4 * 40),
    ],
)
def test_bytes_one_worker_sends(processes, local, gather, reduce, to_all):
    def costs(transport):
        return (
            transport.bytes_all_gather(10),
            transport.bytes_all_reduce(10),
            transport.bytes_all_to_all(10),
            transport.bytes_all_reduce(10, itemsize=2),
        )

    for found in on_all_processes(processes, local, costs):
        assert found == (gather, reduce, to_all, reduce // 2)


def test_a_strategy_has_one_transport(mirrored_strategy):
    strategy = mirrored_strategy(2)
    transport = transport_for(strategy)
    assert transport_for(strategy) is transport
    assert transport_for(mirrored_strategy(2)) is not transport
    assert transport.world == 2
    assert transport_for(tf.distribute.get_strategy()).world == 1
    assert transport_for(tf.distribute.OneDeviceStrategy("CPU:0")).world == 1


def test_other_strategies_are_refused():
    strategy = tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"])
    with strategy.scope(), pytest.raises(ValueError, match="Received: strategy=CentralStorage"):
        transport_for(strategy)
