"""The experiment with a large table, here of 51 MB, runs and measures what it says."""

import json

import pytest

from tests.experiments.test_smoke import run

pytestmark = [pytest.mark.multi_process, pytest.mark.slow]


def test_neither_the_chief_nor_a_worker_holds_a_table(tmp_path):
    printed = run("experiments.large_table", "--rows=8000,200000", "--steps=5", f"--out={tmp_path}")
    small, large = json.loads((tmp_path / "results.json").read_text()).values()
    more = {task: large["peaks"][task] - small["peaks"][task] for task in small["peaks"]}
    assert sorted(more) == ["chief 0", "ps 0", "ps 1", "worker 0", "worker 1"]
    table = 200_000 * 64 * 4 / 1e6
    assert all(more[task] > 0.8 * table for task in ("ps 0", "ps 1"))  # half, and its accumulators
    assert all(more[task] < 0.5 * table for task in ("chief 0", "worker 0", "worker 1")), more
    for result in (small, large):
        assert result["loss"][1] < result["loss"][0]
    assert "| worker 1 |" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json"]  # no backup left
