"""The benchmark of predictions: what it reports, on a model that is done in no time."""

import json

import pytest

from tests.processes import run

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.multi_process]


def test_figures(tmp_path):
    out = tmp_path / "advise.json"
    flags = ["--units=784,256,10", "--networks=20mbit", "--methods=dense,block_sign"]
    done = run("benchmarks.advise", *flags, "--seconds=0.5", f"--out={out}")
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows.keys() == {"dense", "block_sign"}
    for row in rows.values():
        assert row["predicted_bytes"] == pytest.approx(row["sent"], rel=0.1, abs=10_000)
        assert row["error"] == pytest.approx(row["predicted_ms"] / row["low_ms"] - 1)
    # 0.8 MB at 20 Mbit/s: 330 ms, nearly all of a step; the signs of it 10 ms.
    assert 0.5 < rows["dense"]["predicted_ms"] / rows["dense"]["low_ms"] < 2
    assert rows["block_sign"]["predicted_ms"] < rows["dense"]["predicted_ms"] / 2
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2 and len({line.count("|") for line in lines}) == 1


def test_four_workers_share_cores(tmp_path):
    out = tmp_path / "advise.json"
    flags = ["--model=comp_ams_mnist_cnn", "--workers=4", "--networks=20mbit", "--methods=dense"]
    done = run("benchmarks.advise", *flags, "--seconds=0.5", f"--out={out}")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["workers"] == 4
    # 0.13 MB at 20 Mbit/s: 52 ms, whoever computes how fast.
    assert row["predicted_ms"] > 40 and row["low_ms"] > 40
