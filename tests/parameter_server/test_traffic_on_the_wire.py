"""What `TrafficLogger` counts is what real workers and servers send."""

import functools
import json
import os
import sys

import pytest

from tests.multi_process import ROOT
from tests.network import network
from tests.parameter_server import wire_script

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(600)]


@functools.cache
def train(mode, compressed):
    """2 workers and 2 servers of the launcher, in a namespace with a loopback of its own."""
    script = ["-m", "tests.parameter_server.wire_script", mode, compressed]
    launcher = [sys.executable, "-m", "tfqcomm.launch", "--workers=2", "--parameter_servers=2"]
    with network(1) as net:
        done = net.run(
            0,
            [*launcher, *script],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=500,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if wire_script.RESULT in line)
    return json.loads(line.partition(wire_script.RESULT)[2])


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("compressed", ["dense", "compressed"])
def test_interface_agrees_with_traffic_logger(mode, compressed):
    result = train(mode, compressed)
    assert result["parameters"] == 1_003_690
    assert result["workers"] == 2
    counted = result["counted"]
    moved = 2 * (counted["bytes_sent"] + counted["bytes_pulled"])  # of both workers
    assert result["passed"] == pytest.approx(moved, rel=0.05)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_interface_agrees_with_traffic_logger_where_rows_travel(mode, codec):
    result = train(mode, f"rows {codec}")
    assert result["parameters"] == 6_400_000
    counted = result["counted"]
    moved = 2 * (counted["bytes_sent"] + counted["bytes_pulled"])
    assert result["passed"] == pytest.approx(moved, rel=0.05)
    row = {"float32": 128, "int8": 36}[codec]
    assert counted["bytes_sent"] <= 1.01 * 60 * 4096 * (row + 8)


def test_8_bits_down_and_2_bits_up_are_a_fifth_of_dense():
    dense, compressed = train("sync", "dense"), train("sync", "compressed")
    assert dense["passed"] >= 5 * compressed["passed"]
    assert compressed["counted"]["ratio"] >= 6
