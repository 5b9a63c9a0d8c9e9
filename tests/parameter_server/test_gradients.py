"""What a worker asks of its gradients before it sends them."""

import numpy as np
import pytest
import tensorflow as tf

from tfqcomm.parameter_server.gradients import norm_and_health


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("spoiled", [np.nan, np.inf, -np.inf, 1e30, None])
def test_what_is_finite_is_healthy_also_where_its_norm_overflows(spoiled, traced):
    values = np.full([3, 5], 2.0, np.float32)
    if spoiled is not None:
        values[1, 2] = spoiled
    function = tf.function(norm_and_health) if traced else norm_and_health
    norm, healthy = function([tf.zeros([4]), tf.constant(values)])
    assert healthy == bool(np.isfinite(values).all())
    if spoiled is None:
        np.testing.assert_allclose(norm, np.linalg.norm(values), rtol=1e-6)


def test_nothing_is_healthy():
    norm, healthy = norm_and_health([])
    assert norm == 0 and healthy
