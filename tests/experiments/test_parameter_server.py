"""The parameter-server experiments run from the command line and write what they promise."""

import json

import pytest

from tests.experiments.test_smoke import run

pytestmark = [pytest.mark.multi_process, pytest.mark.slow]


def test_parameter_server(tmp_path):
    printed = run(
        "experiments.parameter_server",
        "--dataset=digits",
        "--workers=2",
        "--epochs=2",
        "--runs=dense,quantized,qrda-async",
        f"--out={tmp_path}",
    )
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [*runs] == ["dense", "quantized", "qrda-async"]
    dense, quantized, sparse = (result["epochs"] for result in runs.values())
    assert [epoch["steps"] for epoch in dense] == [44, 44]
    assert [epoch["steps"] for epoch in sparse] == [88, 88]
    kernels, biases = 64 * 128 + 128 * 10, 128 + 10
    assert dense[0]["bytes_sent"] == 44 * 4 * (kernels + biases)
    assert quantized[0]["bytes_sent"] == 44 * 4 * (2 * kernels // 32 + 2 + biases)
    assert quantized[0]["bytes_pulled"] < dense[0]["bytes_pulled"] / 3.5
    assert sparse[1]["bytes_pulled"] < dense[1]["bytes_pulled"]
    assert all(result["test_accuracy"] > 0.6 for result in runs.values())
    assert "| quantized  |" in printed
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000


def test_async_leader_sgd(tmp_path):
    printed = run(
        "experiments.async_leader_sgd",
        "--dataset=digits",
        "--epochs=4",
        "--local_batch=16",
        "--period=5",
        "--step_seconds=0.1",  # of which computing is a small part, on a busy machine, too
        f"--out={tmp_path}",
    )
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [*runs] == ["equal", "slow"]
    for result in runs.values():
        assert sum(worker["steps"] for worker in result["workers"]) == 4 * 4 * 22
        assert result["test_accuracy"] > 0.8
    *others, slow = (worker["steps"] for worker in runs["slow"]["workers"])
    assert slow < min(others) / 1.5  # the first epoch compiles, and each ends together
    assert "| slow  |" in printed
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000


def test_decoupled_diloco(tmp_path):
    printed = run(
        "experiments.decoupled_diloco",
        "--epochs=6",
        "--local_batch=16",
        "--every=8",
        "--step_seconds=0.03",
        f"--out={tmp_path}",
    )
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [*runs] == ["synchronous", "alone", "decoupled"]
    alone, decoupled = runs["alone"], runs["decoupled"]
    for result in (alone, decoupled):
        assert sum(worker["steps"] for worker in result["workers"]) == 6 * 4 * 22
        assert not result["killed"]  # without the launcher nobody is
    assert alone["rounds"] == 0 < decoupled["rounds"]
    assert decoupled["test_accuracy"] > 0.8
    *others, slow = decoupled["workers"]
    assert slow["steps"] < min(worker["steps"] for worker in others)
    assert "| decoupled" in printed
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
