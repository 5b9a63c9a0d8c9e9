"""A round of workers and servers is a step of as many replicas."""

import functools

import numpy as np
import pytest

from tests.multi_process import run_workers
from tests.parameter_server import runs

pytestmark = [pytest.mark.multi_process, pytest.mark.timeout(900)]

QUICK = ("comp_ams", "qadam")
# Of codecs that round at random the draws differ: an entry's is that of its place in a bucket
# there, and in its tensor here.
OTHERS = ("adam", "qrda_adagrad", "sgd", "adamw", "nadam", "qcmd_adagrad", "adaptive_top_k_sgd")


@functools.cache
def results(names, **args):
    (result,) = run_workers(
        runs.both, workers=1, args={"names": names, **args}, devices=runs.WORKERS, timeout=600
    )
    return result


def assert_equal(reduced, served):
    assert np.abs(reduced[1]).max() > 0.05  # a bias, zero at the beginning
    for a, b in zip(reduced, served, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", QUICK)
def test_equals_all_reduce_after_20_steps(name):
    assert_equal(*results(QUICK)[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_equals_all_reduce_after_20_steps_too(name):
    assert_equal(*results(OTHERS)[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["comp_ams", "qadam"])
def test_skips_a_round_as_all_reduce_skips_a_step(name):
    """One worker's batch is not finite: nobody's weights, residuals or moments change."""
    reduced, served = results(("comp_ams", "qadam"), spoiled=True)[name]
    clean, _ = results(QUICK)[name]
    trained = [0, 1, 2, 3, 6, 7]  # all but the moving statistics
    assert not np.allclose(reduced[0], clean[0], atol=1e-3)
    assert_equal([reduced[i] for i in trained], [served[i] for i in trained])
