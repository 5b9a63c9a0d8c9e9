"""The benchmarks of codecs, of a step, its start and its trace: each command prints its table."""

import os
import re

import pytest

from tests.processes import run

pytestmark = pytest.mark.slow


def lines(done) -> list[list[str]]:
    """Cells of the table that was printed, without its header."""
    assert done.returncode == 0, done.stderr[-3000:]
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_codecs():
    flags = ["--elements=20000", "--repeats=2", "--only=BlockSign", "--noreferences"]
    rows = lines(run("benchmarks.codecs", *flags))
    assert rows and all("BlockSign" in row[0] for row in rows)
    assert float(rows[0][1]) == pytest.approx(1, abs=0.05)  # bits of an element


def test_start():
    rows = lines(run("benchmarks.start", "--methods=identity", "--steps=1", timeout=400))
    assert [row[0] for row in rows] == ["identity"]
    assert float(rows[0][1]) > float(rows[0][3]) > 0


@pytest.mark.multi_process
def test_step():
    done = run("benchmarks.step", "--steps=20", "--compressor=block_sign", timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    times = [float(text) for text in re.findall(r"^\w.* +([\d.]+) ms$", done.stdout, re.MULTILINE)]
    assert len(times) == 3 and min(times) > 0  # alone, together, an all-reduce


@pytest.mark.multi_process
def test_trace(tmp_path):
    plot = tmp_path / "trace.png"
    flags = ["--network=loopback", "--units=784,256,10", "--steps=3", f"--plot={plot}"]
    rows = lines(run("benchmarks.trace", *flags, timeout=300))
    assert rows
    for row in rows:
        start, in_flight, hidden, _ = map(float, row[1:])
        assert in_flight > 0 and 0 <= hidden <= in_flight
    assert os.path.getsize(plot) > 5000
