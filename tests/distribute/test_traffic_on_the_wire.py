"""What `TrafficLogger` counts is what crosses the network interface."""

import functools

import pytest

from tests.distribute import wire_functions
from tests.multi_process import run_workers
from tests.network import network

pytestmark = [pytest.mark.network, pytest.mark.slow]


@functools.cache
def train(compressor):
    """One `fit` of two workers in network namespaces: a perceptron of 1,003,690 weights."""
    args = {"compressor": compressor, "width": 680, "steps": 200}
    with network(2) as net:
        return run_workers(wire_functions.train, workers=2, args=args, network=net, timeout=280)


@pytest.mark.parametrize("compressor", [None, "top_k", "block_sign"])
def test_interface_agrees_with_traffic_logger(compressor):
    for worker in train(compressor):
        assert worker["parameters"] == 1_003_690
        assert worker["sent"] == pytest.approx(worker["counted"], rel=0.05)


@pytest.mark.parametrize(("compressor", "least"), [("top_k", 30), ("block_sign", 25)])
def test_a_whole_fit_sends_a_fraction_of_dense(compressor, least):
    for dense, compressed in zip(train(None), train(compressor), strict=True):
        assert dense["sent"] >= least * compressed["sent"]
