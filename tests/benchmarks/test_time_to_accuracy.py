"""The benchmark of training times: all workers end together, once the target is reached."""

import importlib.util
import json

import pytest

from tests.processes import run

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.multi_process]
COMMAND = ["benchmarks.time_to_accuracy", "--workers=2", "--units=128"]


def test_the_target_is_reached_in_fewer_bytes(tmp_path):
    out = tmp_path / "times.json"
    done = run(*COMMAND, "--methods=dense,diloco", "--target=0.8", f"--out={out}")
    assert done.returncode == 0, done.stderr
    dense, diloco = json.loads(out.read_text())["rows"]
    for row in (dense, diloco):
        assert row["accuracy"] >= 0.8 and row["seconds"] > 0
        assert row["steps"] == 48 * len(row["accuracies"])
        assert max(row["accuracies"][:-1], default=0) < 0.8 and row["accuracies"][-1] >= 0.8
    per_step = 4 * dense["parameters"]  # 2 (W - 1) / W of 4 bytes
    assert dense["sent"] == pytest.approx(per_step * dense["steps"], rel=0.3)
    assert diloco["sent"] / diloco["steps"] < dense["sent"] / dense["steps"] / 5
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2 and len({line.count("|") for line in lines}) == 1


def test_the_same_weights_and_batches_under_ddp(tmp_path):
    """Dense steps are alike, so both arrive at one look; what PowerSGD leaves out is fed back."""
    pytest.importorskip("torch")  # the extra `peers`
    out = tmp_path / "times.json"
    done = run(*COMMAND, "--methods=dense,ddp,ddp_power_sgd_1", "--target=0.9", f"--out={out}")
    assert done.returncode == 0, done.stderr
    dense, ddp, power = json.loads(out.read_text())["rows"]
    assert (dense["steps"], dense["parameters"]) == (ddp["steps"], ddp["parameters"])
    assert dense["accuracy"] == pytest.approx(ddp["accuracy"], abs=0.01) and ddp["accuracy"] >= 0.9
    assert ddp["sent"] == pytest.approx(4 * ddp["parameters"] * ddp["steps"], rel=0.3)
    assert power["accuracy"] >= 0.9
    assert power["sent"] / power["steps"] < ddp["sent"] / ddp["steps"] / 2


def test_an_unknown_method_is_named(tmp_path):
    done = run(*COMMAND, "--methods=none", f"--out={tmp_path}/x")
    assert done.returncode != 0
    assert "--methods must be among" in done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is there")
def test_ddp_needs_pytorch(tmp_path):
    done = run(*COMMAND, "--methods=ddp", f"--out={tmp_path}/x")
    assert done.returncode != 0
    assert "--methods=ddp needs PyTorch: pip install '.[peers]'" in done.stdout + done.stderr
