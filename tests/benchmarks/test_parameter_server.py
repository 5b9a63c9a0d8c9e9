"""The benchmark of parameter servers: what it reports, on a model that is done in no time."""

import json

import pytest

from tests.processes import run

pytestmark = [
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.multi_process,
    pytest.mark.timeout(600),
]
COMMAND = ["benchmarks.parameter_server", "--hidden=64", "--seconds=0.5"]
PARAMETERS = 785 * 64 + 65 * 64 + 65 * 10


def test_figures(tmp_path):
    out = tmp_path / "parameter_server.json"
    flags = ["--networks=loopback,50mbit", "--methods=tensorflow,async_quantized"]
    done = run(*COMMAND, *flags, f"--out={out}", timeout=500)
    assert done.returncode == 0, done.stderr
    rows = {(r["network"], r["method"]): r for r in json.loads(out.read_text())["rows"]}
    assert len(rows) == 4
    dense, quantized = (rows["loopback", name] for name in ("tensorflow", "async_quantized"))
    assert dense["bytes"] == pytest.approx(8 * PARAMETERS, rel=0.1)  # once down and once up
    assert quantized["bytes"] < dense["bytes"] / 4
    assert dense["parameters"] == PARAMETERS
    theirs, ours = (rows["50mbit", name] for name in ("tensorflow", "async_quantized"))
    assert ours["ratio"] == pytest.approx(ours["steps_per_second"] / theirs["steps_per_second"])
    assert theirs["bytes"] is None and theirs["ratio"] == 1
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    assert all(line.count("|") == 7 for line in lines)


def test_methods_that_do_not_exist_are_named():
    done = run(*COMMAND, "--methods=other")
    assert done.returncode != 0
    assert "--methods must be of" in done.stdout + done.stderr
    assert "Received: other" in done.stdout + done.stderr
