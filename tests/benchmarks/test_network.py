"""The benchmark of networks: what it reports, on a model that is done in no time, and its end."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.processes import ROOT, run
from tests.test_launch_network import namespaces_in_use

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.multi_process]
COMMAND = ["benchmarks.network", "--units=784,256,10"]
PARAMETERS = 785 * 256 + 257 * 10


@pytest.mark.timeout(600)
def test_figures(tmp_path):
    out = tmp_path / "network.json"
    flags = ["--networks=loopback,20mbit", "--methods=dense,block_sign", "--seconds=0.5"]
    done = run(*COMMAND, *flags, f"--out={out}", timeout=560)
    assert done.returncode == 0, done.stderr
    rows = {(r["network"], r["method"]): r for r in json.loads(out.read_text())["rows"]}
    assert len(rows) == 4
    dense, sign = rows["20mbit", "dense"], rows["20mbit", "block_sign"]
    assert dense["parameters"] == PARAMETERS
    for name in ("loopback", "20mbit"):  # 2 (W - 1) / W of 4 bytes; a bit and a few dense biases
        assert rows[name, "dense"]["sent"] == pytest.approx(4 * PARAMETERS, rel=0.1)
        assert rows[name, "block_sign"]["sent"] < 4 * PARAMETERS / 10
    assert dense["wire_ms"] == pytest.approx(PARAMETERS * 32 / 20e6 * 1e3, rel=0.1)
    assert 0.9 < dense["ratio"] < 3 and dense["ms"] > dense["wire_ms"] * 0.9
    assert sign["ms"] < dense["ms"] / 2
    assert sign["utilisation"] == pytest.approx(sign["alone_ms"] / sign["ms"])
    assert rows["loopback", "dense"]["wire_ms"] == 0
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    assert all(line.count("|") == 10 for line in lines)


@pytest.mark.timeout(450)
def test_rounds_of_diloco(tmp_path):
    out = tmp_path / "network.json"
    flags = ["--networks=20mbit", "--methods=dense,diloco_4,diloco_4_block_int8", "--seconds=0.5"]
    done = run(*COMMAND, *flags, "--turns=2", f"--out={out}", timeout=400)
    assert done.returncode == 0, done.stderr
    dense, local, in_8_bits = json.loads(out.read_text())["rows"]
    assert local["sent"] == pytest.approx(PARAMETERS, rel=0.1)  # 4 bytes of each, every 4 steps
    assert in_8_bits["sent"] == pytest.approx(PARAMETERS / 4, rel=0.1)
    assert dense["wire_ms"] > 0.9 * 4 * local["wire_ms"]
    for row in (local, in_8_bits):
        assert row["steps"] % 4 == 0 and row["ms"] > 0.9 * row["wire_ms"]
        assert len(row["turns_ms"]) == 2 and max(row["turns_ms"]) == row["ms"]  # of an even number


@pytest.mark.parametrize("method", ["diloco_1", "diloco_4_gzip"])
def test_refuses_a_method_that_there_is_not(method):
    done = run(*COMMAND, f"--methods={method}")
    assert done.returncode != 0
    assert "ompressor" in done.stderr and method.removeprefix("diloco_4_") in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_it_is_interrupted(tmp_path, number):
    """Only of what it started itself: other tests may have namespaces of their own."""
    others, mark = namespaces_in_use(), f"TMPDIR={tmp_path}"
    flags = ["--networks=20mbit", "--methods=dense", "--seconds=60", f"--out={tmp_path}/x.json"]
    with subprocess.Popen(
        [sys.executable, "-m", *COMMAND, *flags],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Where the tests run in the background a shell may have made them deaf to it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        deadline = time.monotonic() + 120
        while not (held := namespaces_in_use(mark) - others):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        running.send_signal(number)
        running.wait(60)
    deadline = time.monotonic() + 10
    while namespaces_in_use(mark) - others or namespaces_in_use() & held:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_same_model_under_ddp(tmp_path):
    pytest.importorskip("torch")  # the extra `peers`
    out = tmp_path / "network.json"
    flags = ["--networks=50mbit", "--methods=dense,ddp,ddp_power_sgd_1", "--seconds=0.5"]
    done = run(*COMMAND, *flags, f"--out={out}")
    assert done.returncode == 0, done.stderr
    rows = {r["method"]: r for r in json.loads(out.read_text())["rows"]}
    assert {r["parameters"] for r in rows.values()} == {PARAMETERS}
    assert rows["ddp"]["sent"] == pytest.approx(4 * PARAMETERS, rel=0.1)
    assert rows["ddp_power_sgd_1"]["sent"] < 4 * PARAMETERS / 10
    assert rows["ddp"]["ms"] > 0.9 * rows["ddp"]["wire_ms"] > 100


def test_a_network_of_models_under_ddp(tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "network.json"
    flags = ["--model=comp_ams_mnist_cnn", "--networks=50mbit", "--methods=ddp,ddp_bf16"]
    done = run(*COMMAND, *flags, "--seconds=0.5", f"--out={out}")
    assert done.returncode == 0, done.stderr
    rows = {r["method"]: r for r in json.loads(out.read_text())["rows"]}
    assert {r["parameters"] for r in rows.values()} == {21_840}
    assert rows["ddp"]["sent"] == pytest.approx(4 * 21_840, rel=0.2)
    assert rows["ddp_bf16"]["sent"] == pytest.approx(2 * 21_840, rel=0.3)


def test_mistakes_are_found_before_anything_is_started():
    for flag, message in (
        ("--networks=100", "--networks must be a number and a unit, as in 100mbit, 1gbit or 2.5M"),
        ("--methods=no_such", "Received: compressor='no_such'"),
        ("--methods=ddp", "--methods=ddp needs PyTorch: pip install '.[peers]'"),
        ("--model=no_such", "--model must be one of ['character_cnn', 'comp_ams_cifar_cnn',"),
    ):
        if "PyTorch" in message and importlib.util.find_spec("torch"):
            continue
        done = run(*COMMAND, flag)
        assert done.returncode != 0
        assert message in done.stdout + done.stderr
