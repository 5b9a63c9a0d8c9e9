"""The benchmark of DiLoCo's overlap: what it reports, on a model that is done in no time."""

import json

import pytest

from tests.processes import run

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.multi_process]


def test_figures(tmp_path):
    out = tmp_path / "overlap.json"
    flags = ["--units=784,256,10", "--networks=20mbit", "--methods=dense", "--overlaps=0,6"]
    done = run("benchmarks.overlap", *flags, "--every=8", f"--out={out}")
    assert done.returncode == 0, done.stderr
    first, second = json.loads(out.read_text())["rows"]
    assert (first["overlap"], second["overlap"]) == (0, 6)
    # 0.8 MB at 20 Mbit/s.
    assert first["exchange_ms"] == second["exchange_ms"] > 250
    assert first["hidden_ms"] == 0
    assert second["hidden_ms"] == first["round_ms"] - second["round_ms"]
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2 and len({line.count("|") for line in lines}) == 1
