"""The parts of the slow rung: together they are all of it, and no file is in two of them."""

import pathlib

import pytest

from tests.rungs import outside_of, processes_first


class Item:
    """As much of a test as a part asks for."""

    def __init__(self, file: int, mark: str | None):
        self.path = pathlib.Path(f"test_{file}.py")
        self.mark = mark

    def get_closest_marker(self, name: str) -> str | None:
        return self.mark if name == self.mark else None


ITEMS = [Item(file, mark) for file in range(11) for mark in (None, "slow", "network")]


def test_every_file_is_in_one_part():
    parts = [set(ITEMS) - outside_of(f"{number}/4", ITEMS) for number in range(1, 5)]
    files = [{item.path for item in part} for part in parts]
    assert [len(part) for part in files] == [3, 3, 3, 2]
    assert set.union(*files) == {item.path for item in ITEMS}
    assert set.union(*parts) == set(ITEMS) and sum(map(len, parts)) == len(ITEMS)


def test_files_without_slow_tests_do_not_count():
    quick = [Item(file, None) for file in range(11, 20)]
    assert outside_of("1/1", [*ITEMS, *quick]) == set(quick)


def test_files_with_processes_come_first_and_stay_whole():
    items = [
        Item(file, mark) for file, mark in [(0, None), (1, None), (1, "multi_process"), (2, None)]
    ]
    files = [item.path.stem for item in processes_first(items)]
    assert files == ["test_1", "test_1", "test_0", "test_2"]


@pytest.mark.parametrize("part", ["0/4", "5/4", "4", "/4", "a/b", "1/0", "-1/4"])
def test_a_part_that_is_none_is_refused(part):
    with pytest.raises(pytest.UsageError, match=f"from 1/4 to 4/4. Received: {part}"):
        outside_of(part, ITEMS)
