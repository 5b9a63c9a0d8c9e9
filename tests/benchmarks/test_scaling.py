"""Bytes are those of the formulas, and the command of the README writes what it says."""

import json

import pytest

from tests.processes import run


@pytest.mark.slow
def test_bytes_are_those_of_the_formulas(tmp_path):
    out = tmp_path / "scaling.json"
    flags = ["--units=784,128,10", "--workers=3"]
    done = run("benchmarks.scaling", *flags, f"--out={out}")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text())
    assert len(rows) == 7
    for row in rows:
        # Two-phase pads what each worker owns to whole rows.
        assert row["sent"] == pytest.approx(row["formula"], rel=0.01), row
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "| 1024 |" in done.stdout
