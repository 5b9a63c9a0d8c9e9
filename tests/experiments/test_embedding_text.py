"""The text classifier by rows runs from the command line and writes what it promises."""

import json

import pytest

from tests.experiments.test_smoke import run

pytestmark = [pytest.mark.multi_process, pytest.mark.slow]


def test_embedding_text(tmp_path):
    printed = run(
        "experiments.embedding_text",
        "--limit_examples=2000",
        "--vocabulary=500",
        "--optimizer=adagrad",
        "--learning_rate=0.1",
        f"--out={tmp_path}",
    )
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [*runs] == ["dense", "rows", "int8"]
    dense, rows, int8 = (result["epochs"] for result in runs.values())
    assert all(result["seeds"] == {"0": result["epochs"]} for result in runs.values())
    parameters = 500 * 16 + 16 * 16 + 16 + 16 * 2 + 2
    assert [epoch["steps"] for epoch in dense] == [15, 15]
    assert dense[0]["bytes_sent"] == 15 * 4 * parameters
    assert int8[0]["bytes_sent"] < 0.6 * rows[0]["bytes_sent"] < 0.6 * dense[0]["bytes_sent"]
    for by_rows, whole in zip(rows, dense, strict=True):  # the lazy step of Adagrad is the dense
        assert by_rows["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    for result in runs.values():
        assert result["epochs"][1]["loss"] < result["epochs"][0]["loss"]
    assert "| int8  |" in printed
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
