"""Each experiment runs from its command line and writes what it promises."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests import processes
from tests.catalogue import elias_fano

ROOT = pathlib.Path(__file__).parent.parent.parent


def run(module: str, *arguments: str) -> str:
    """Runs an experiment as a user does; returns what it printed."""
    done = processes.run(module, *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def comp_ams(out: pathlib.Path, *arguments: str) -> dict:
    """Runs COMP-AMS on the digits and returns its results."""
    run("experiments.comp_ams", "--dataset=digits", f"--out={out}", *arguments)
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_comp_ams(tmp_path):
    results = comp_ams(
        tmp_path, "--workers=4", "--epochs=2", "--global_batch=120", "--compressors=identity,top_k"
    )
    dense, sparse = results["runs"]["identity"], results["runs"]["top_k"]
    assert dense["parameters"] == sparse["parameters"] == 283_786
    assert dense["paper_bits_per_step"] == 32 * 283_786
    assert 90 * sparse["paper_bits_per_step"] < dense["paper_bits_per_step"]
    assert [epoch["steps"] for epoch in dense["epochs"]] == [11, 11]
    assert dense["bytes_sent_per_step"] > 25 * sparse["bytes_sent_per_step"]  # (W-1) p, W = 4
    assert dense["test_accuracy"] > 0.5
    assert results["settings"]["no_error_feedback"] is False
    assert set(results["versions"]) >= {"tensorflow", "keras", "tfqcomm"}
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000


@pytest.mark.slow
def test_comp_ams_and_its_rivals(tmp_path):
    """1-bit Adam: one dense epoch, then bits."""
    results = comp_ams(
        tmp_path,
        "--workers=4",
        "--epochs=4",
        "--global_batch=64",
        "--compressors=qadam,one_bit_adam",
    )
    runs = results["runs"]
    assert all(run["compressor"] == "BlockSign(block=None)" for run in runs.values())
    assert all(run["test_accuracy"] > 0.85 for run in runs.values())
    dense, *compressed = runs["one_bit_adam"]["epochs"]
    assert [epoch["steps"] for epoch in (dense, *compressed)] == [22] * 4
    assert dense["paper_bits"] == 32 * 283_786 * 22
    assert dense["ratio"] == pytest.approx(1, rel=1e-4)
    for epoch in compressed:
        assert epoch["paper_bits"] == 283_786 * 22
        assert epoch["ratio"] > 15  # all-gather: 3 bits for each entry, against 48
    assert compressed[-1]["test_loss"] < dense["test_loss"]


@pytest.mark.slow
@pytest.mark.multi_process
def test_comp_ams_in_two_processes_equals_one(tmp_path):
    common = ("--workers=4", "--epochs=1", "--compressors=block_sign", "--no_error_feedback")
    one = comp_ams(tmp_path / "one", *common)["runs"]["block_sign"]["epochs"][0]
    two = comp_ams(tmp_path / "two", *common, "--processes=2")["runs"]["block_sign"]["epochs"][0]
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-4)
    assert two["residual_norm_ratio"] == 0


@pytest.mark.slow
def test_speedup(tmp_path):
    results = comp_ams(tmp_path, "--experiment=speedup", "--workers_list=1,2", "--target_loss=1.5")
    assert [run["workers"] for run in results["runs"]] == [1, 2]
    assert all(0 < run["iterations"] < 200 for run in results["runs"])
    assert (tmp_path / "speedup.png").exists()


@pytest.mark.slow
def test_adagrad(tmp_path):
    printed = run(
        "experiments.adagrad",
        "--dataset=digits",
        "--workers=2",
        "--epochs=2",
        "--optimizers=qrda",
        "--compressors=identity,optimal",
        "--l1_list=0,1e-3",
        "--learning_rates=0.001,0.1",
        f"--out={tmp_path}",
    )
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    best = {(r["compressor"], r["l1"]): r for r in runs if r["learning_rate"] == 0.1}
    assert len(runs) == 8 and len(best) == 4
    dense, quantized = best["identity", 0], best["optimal", 0]
    assert dense["weights"] == quantized["weights"] == 640
    assert (dense["bits_up_per_step"], quantized["bits_up_per_step"]) == (20_480, 1_312)
    assert dense["bytes_sent_per_step"] > 8 * quantized["bytes_sent_per_step"]
    assert all(r["nonzeros"] == round(640 * (1 - r["zeros"])) for r in runs)
    for name in ("identity", "optimal"):
        plain, sparse = best[name, 0], best[name, 1e-3]
        assert plain["test_accuracy"] > 0.85 and sparse["test_accuracy"] > 0.8
        assert sparse["zeros"] > plain["zeros"] + 0.05
        assert sparse["bits_down"] < plain["bits_down"] < 32 * 640
    assert "| qrda      | 0.001 |    optimal |  0.1 |" in printed
    assert (tmp_path / "adagrad.png").stat().st_size > 10_000


@pytest.mark.slow
def test_qadam(tmp_path):
    printed = run(
        "experiments.qadam",
        "--dataset=digits",
        "--workers=2",
        "--epochs=2",
        "--variants=weights8,k0_weights8,two_phase",
        f"--out={tmp_path}",
    )
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [*runs] == ["weights8", "k0_weights8", "two_phase"]
    assert all(r["parameters"] == 9_610 and r["test_accuracy"] > 0.8 for r in runs.values())
    words = 8192 // 32 + 128 // 32 + 1280 // 32 + 1  # of a plane; the last tensor has 10 entries
    two, eight, floats = 32 * (2 * words + 4), 32 * (8 * words + 4), 32 * 9_610
    bits = [(r["bits_up_per_step"], r["bits_down_per_step"]) for r in runs.values()]
    assert bits == [(floats, eight), (two, eight), (two, two)]
    assert runs["k0_weights8"]["ratio"] == 2 * floats / (two + eight)
    assert runs["k0_weights8"]["epochs"][1]["paper_bits"] == (two + eight) * 44
    assert "| k0_weights8 | " in printed
    assert (tmp_path / "qadam.png").stat().st_size > 10_000


@pytest.mark.slow
def test_adaptive_top_k(tmp_path):
    printed = run(
        "experiments.adaptive_top_k",
        "--dataset=digits",
        "--workers=2",
        "--steps=60",
        "--period=20",
        "--budgets=0.05",
        "--rules=fixed,threshold",
        f"--out={tmp_path}",
    )
    dense, *runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [(r["rule"], r["error_feedback"]) for r in runs] == [
        ("fixed", True),
        ("threshold", True),
        ("fixed", False),
        ("threshold", False),
    ]
    n = dense["parameters"]
    assert dense["kept"] == [n] * 60 and dense["bits"] == 60 * 32 * n
    assert all(sum(r["kept"]) == round(60 * 0.05 * n) for r in runs)
    assert all(r["bits"] == sum(32 * (elias_fano(k, n) + k) for k in r["kept"]) for r in runs)
    assert all(r["budget_used"] == pytest.approx(1, abs=1e-4) for r in runs)
    assert [epoch["steps"] for epoch in runs[1]["epochs"]] == [20, 20, 20]
    assert max(runs[1]["kept"]) > 2 * min(runs[1]["kept"])
    assert max(runs[0]["mean_loss"], runs[1]["mean_loss"]) < runs[2]["mean_loss"]
    assert "threshold without feedback" in printed
    assert (tmp_path / "adaptive_top_k_0.05.png").stat().st_size > 10_000


@pytest.mark.multi_process
def test_compare(tmp_path):
    printed = run("experiments.compare", "--runs=comp_ams_top_k", "--epochs=2", f"--out={tmp_path}")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    top_k = metrics["runs"]["comp_ams_top_k"]
    assert len(top_k["epochs"]) == 2 and top_k["ratio"] > 30
    assert "COMP-AMS, Top-k 1%" in printed and "worker 0" in printed
    assert "| COMP-AMS, Top-k 1% " in (tmp_path / "report.md").read_text()
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    assert list((tmp_path / "tensorboard" / "comp_ams_top_k").rglob("events*"))


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.network
def test_compare_on_a_slow_network(tmp_path):
    """Dense training waits for the network, 1.1 MB a step at 20 Mbit/s; 38 kB do not."""
    runs = "--runs=adam_dense,adam_block_sign"
    printed = run(
        "experiments.compare", runs, "--bandwidth=20mbit", "--epochs=2", f"--out={tmp_path}"
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    dense, block_sign = metrics["runs"].values()
    assert 0.45 < dense["seconds_per_step"] < 1
    assert block_sign["seconds_per_step"] < dense["seconds_per_step"] / 3
    assert metrics["alone_seconds_per_step"] < block_sign["seconds_per_step"]
    assert metrics["settings"]["bandwidth"] == "20mbit"
    assert re.search(r"\| utilisation \|\n.*\n\| Adam, dense .* \d+% \|\n", printed)
    text = (tmp_path / "report.md").read_text()
    assert "every worker has a network interface of its own, bandwidth 20mbit" in text


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_comparison_that_succeeds_looks_like_one(tmp_path):
    """What runs, how far it is, the table, where the files are; as `make train` is started."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.compare", "--epochs=1", f"--out={tmp_path}"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) < 80, done.stdout
    assert not re.search("ERROR|WARNING|Traceback", done.stdout), done.stdout
    assert sum(line.startswith("=== ") for line in lines) == 5
    assert sum("epoch 1/1: loss" in line for line in lines) == 5
    assert sum(line.startswith("| ") for line in lines) == 2 + 5
    assert lines[-1].startswith("Wrote report.md, ")


@pytest.mark.slow
def test_character_model(tmp_path):
    """Both send what their formulas say, and what is sent reaches the weights."""
    printed = run(
        "experiments.character_model",
        "--workers=4",
        "--every=5",
        "--steps=40",
        "--look=20",
        "--limit_examples=400",
        f"--out={tmp_path}",
    )
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [*runs] == ["adam", "diloco", "sparse_loco"]
    n = 224_256
    assert [found["exchanges"] for found in runs.values()] == [40, 8, 8]
    for name in ("adam", "diloco"):
        assert runs[name]["bytes_per_exchange"] == pytest.approx(2 * 3 / 4 * 4 * n, rel=1e-3)
    kept = n // 64  # positions in 8 bits, levels in 2; a table of 4 floats for each of 4 matrices
    message = 10 * kept / 8 + 4 * 16
    assert runs["sparse_loco"]["bytes_per_exchange"] == pytest.approx(3 * message, rel=0.01)
    for name, found in runs.items():
        first, last = found["epochs"]
        assert last["test_loss"] < first["test_loss"] < 4.5, name  # log(96) is 4.56
        assert last["test_accuracy"] > 0.15, name
    assert re.search(r"scikit-learn [\d.]+: \d,\d{3},\d{3} characters", printed)
    assert "| sparse_loco |" in printed
    assert (tmp_path / "test_loss.png").stat().st_size > 10_000


def leader_sgd(out: pathlib.Path, *arguments: str) -> dict:
    """Runs Leader SGD and returns the runs of its results."""
    run("experiments.leader_sgd", f"--out={out}", *arguments)
    return json.loads((out / "results.json").read_text())["runs"]


@pytest.mark.slow
def test_leader_sgd_on_images(tmp_path):
    runs = leader_sgd(tmp_path, "--dataset=digits", "--epochs=2", "--local_batch=16", "--period=10")
    assert [*runs] == ["leader_sgd", "elastic_averaging", "periodic_averaging", "synchronous"]
    assert sum(runs["leader_sgd"]["times_led"]) == 4  # 2 x 22 steps
    for name, found in runs.items():
        assert found["test_accuracy"] > 0.5, name
    # A broadcast is half of a ring; its votes are 36 bytes.
    assert runs["leader_sgd"]["ratio"] == pytest.approx(2 * 44 / 4, rel=1e-3)
    assert runs["periodic_averaging"]["ratio"] == pytest.approx(44 / 4, rel=1e-3)
    assert runs["synchronous"]["ratio"] == 1
    assert (tmp_path / "images.png").stat().st_size > 10_000


@pytest.mark.slow
def test_leader_sgd_on_the_papers_toys(tmp_path):
    """All workers reach the global minimum of the sinc, those that are averaged do not."""
    sinc = leader_sgd(tmp_path, "--experiment=sinc")
    assert max(sinc["leader_sgd"]["last"]) <= -0.2170
    assert min(sinc["elastic_averaging"]["last"]) == pytest.approx(-0.0913, abs=2e-4)
    assert (tmp_path / "sinc.png").exists()


@pytest.mark.slow
def test_leader_sgd_factors_a_matrix(tmp_path):
    matrix = leader_sgd(tmp_path, "--experiment=matrix")
    assert max(matrix["leader_sgd"]["last"]) <= 1e-5
    assert matrix["leader_sgd"]["last_of_average"] <= 1e-5
    assert matrix["elastic_averaging"]["last_of_average"] >= 1e-2
