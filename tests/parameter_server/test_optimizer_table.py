"""`docs/optimizers.md` says of every optimizer of Keras what parameter servers make of it."""

import functools
import pathlib
import re

import pytest

from tests.multi_process import run_workers
from tests.parameter_server import optimizer_runs as runs

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "optimizers.md"


@functools.cache
def table() -> dict[str, dict[str, str]]:
    """Optimizer -> column -> cell, of the one table that has columns of parameter servers."""
    text = DOCUMENT.read_text()
    lines = text[text.index("| optimizer | parameter server") :].partition("\n\n")[0].splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if not line.startswith("|---")
    ]
    head, *rows = rows
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


@functools.cache
def found():
    (result,) = run_workers(runs.everything, workers=1, timeout=800)
    return result


def test_every_optimizer_of_keras_is_in_the_table():
    assert sorted(set(runs.names()) - set(table())) == []


def test_every_footnote_is_explained():
    text = DOCUMENT.read_text()
    named = {note for row in table().values() for cell in row.values() for note in notes(cell)}
    assert named <= set(re.findall(r"^(\d+)\. ", text, re.MULTILINE))


def notes(cell: str) -> set[str]:
    return set(re.findall(r"\[(\d+)\]", cell))


@pytest.mark.multi_process
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("name", runs.names())
def test_the_table_says_what_happens(name, mode):
    result = found()[name]
    cell = table()[name][f"parameter server, {mode}"]
    if isinstance(result[mode], str):
        assert cell.startswith("refused") and name in result[mode]
        return
    assert cell.startswith("equal") == (result[mode] <= runs.LARGEST_DIFFERENCE), result
    repeated = result["repeated"] > runs.LARGEST_DIFFERENCE
    assert ("1" in notes(cell)) == repeated, result
