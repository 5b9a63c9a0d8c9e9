"""Which schedule is chosen, restated from the formulas of what each sends."""

import pytest

from tests.aggregators.processes import ThreadTransport
from tfqcomm.aggregators import schedule as schedules
from tfqcomm.compressors import BFloat16, BlockSign, Float16, Identity, RandomK, Ternary, TopK
from tfqcomm.step import ExchangeOptions


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("dense", 2 * 3 / 4 * 4 * 1000),
        ("all_gather", 3 * 100),
        ("two_phase", 2 * 3 / 4 * 100),
    ],
)
def test_bytes_per_worker(schedule, expected):
    assert schedules.bytes_per_worker(schedule, payload=100, elements=1000, world=4) == expected


@pytest.mark.parametrize("schedule", ["dense", "all_gather", "two_phase"])
def test_one_worker_sends_nothing(schedule):
    assert schedules.bytes_per_worker(schedule, payload=100, elements=1000, world=1) == 0


@pytest.mark.parametrize(
    ("compressor", "world", "expected"),
    [
        (Identity(), 8, "dense"),
        (Float16(), 2, "dense"),
        (BFloat16(), 16, "dense"),
        (RandomK(0.01), 16, "dense"),
        (Ternary(), 2, "all_gather"),
        (Ternary(), 16, "two_phase"),
        (BlockSign(), 1, "all_gather"),
        (BlockSign(), 2, "all_gather"),  # p against p: one round and one lossy step
        (BlockSign(), 3, "two_phase"),  # 2p against 4/3 p
        (BlockSign(), 16, "two_phase"),
        (BlockSign(block=32), 3, "two_phase"),
        (TopK(0.01), 2, "all_gather"),
        (TopK(0.01), 16, "all_gather"),
        # (W - 1) * 40.6 / 8 * 0.01 d < 8 (W - 1) / W d  where  W < 158
        (TopK(0.01), 157, "all_gather"),
        (TopK(0.01), 159, "dense"),
        (TopK(0.5), 3, "all_gather"),  # 2 * 35 / 8 / 2 d against 16/3 d
        (TopK(0.5), 4, "dense"),
        (TopK(1.0), 2, "dense"),  # 34 / 8 d against 4 d
        (TopK(0.01, support="shared"), 2, "shared_support"),
        (TopK(0.5, support="shared"), 1024, "shared_support"),
        (TopK(1.0, support="shared"), 1024, "dense"),
    ],
    ids=str,
)
def test_auto_sends_the_fewest_bytes(compressor, world, expected):
    sizes = [60000, 40000]
    chosen = schedules.choose("auto", compressor, sizes, world)
    assert chosen == expected
    payload = 4 * sum(compressor.num_words(n) for n in sizes)
    if not compressor.linear:
        others = ("all_gather", "dense") if compressor.sparse else ("all_gather", "two_phase")
        if compressor.shared_support:
            others = ("shared_support", "dense")
        costs = [schedules.bytes_per_worker(s, payload, sum(sizes), world) for s in others]
        assert schedules.bytes_per_worker(chosen, payload, sum(sizes), world) == min(costs)


@pytest.mark.parametrize("processes", [2, 3, 8])
@pytest.mark.parametrize("local", [1, 2, 8])
def test_devices_of_a_process_change_what_is_sent_but_not_what_is_cheapest(processes, local):
    """The formulas count every device as a worker; a transport counts what a process sends."""
    transport = ThreadTransport(None, processes, 0, ["CPU:0"] * local)
    world, sizes = processes * local, [600_000]
    for compressor in (BlockSign(), Ternary(), TopK(0.01), TopK(0.07), TopK(0.2), TopK(0.6)):
        words = compressor.num_words(sizes[0])
        costs = {
            "all_gather": transport.bytes_all_gather(words),
            "dense": transport.bytes_all_reduce(sizes[0]),
            "two_phase": transport.bytes_all_to_all(words // world)
            + transport.bytes_all_gather(words // world),
        }
        del costs["two_phase" if compressor.sparse else "dense"]
        chosen = schedules.choose("auto", compressor, sizes, world)
        assert costs[chosen] <= 1.001 * min(costs.values()), (compressor, costs)


@pytest.mark.parametrize("world", [1, 2, 16])
def test_a_shared_scale_means_sums_of_integers(world):
    assert schedules.choose("auto", Ternary(shared_scale=True), [1000], world) == "integer"


@pytest.mark.parametrize("schedule", ["dense", "all_gather", "two_phase"])
def test_a_shared_scale_admits_nothing_else(schedule):
    text = f"must be 'auto' for .* share. Received: schedule='{schedule}', .*shared_scale=True"
    with pytest.raises(ValueError, match=text):
        ExchangeOptions(Ternary(shared_scale=True), schedule=schedule)


@pytest.mark.parametrize("schedule", ["dense", "all_gather", "two_phase"])
def test_a_shared_support_admits_nothing_else(schedule):
    text = f"'auto' for .* support all .* Received: schedule='{schedule}', .*support='shared'"
    with pytest.raises(ValueError, match=text):
        ExchangeOptions(TopK(0.1, support="shared"), schedule=schedule)


@pytest.mark.parametrize("schedule", ["dense", "all_gather", "two_phase"])
def test_the_users_word_counts(schedule):
    assert schedules.choose(schedule, Float16(), [1000], 4) == schedule


@pytest.mark.parametrize(
    ("schedule", "compressor", "text"),
    [
        (
            "ring",
            "top_k",
            r"Argument `schedule` must be one of .*'auto'.*Received: schedule='ring'",
        ),
        (None, "top_k", "Argument `schedule` must be one of .*Received: schedule=None"),
        ("dense", "top_k", r"must be 'auto', 'all_gather' or 'two_phase'.*compressor=TopK\("),
        ("dense", "block_sign", "words cannot be summed .*Received: schedule='dense'"),
        ("all_gather", "identity", "must be 'auto' or 'dense' without .*schedule='all_gather'"),
        ("two_phase", None, "must be 'auto' or 'dense' without .*schedule='two_phase'"),
    ],
)
def test_what_does_not_fit_is_refused(schedule, compressor, text):
    with pytest.raises(ValueError, match=text):
        ExchangeOptions(compressor, schedule=schedule)
