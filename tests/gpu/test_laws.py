"""The laws of compressors, on a GPU: the very tests that the CPUs run."""

import pytest
import tensorflow as tf

from tests.compressors.test_laws import (
    test_contraction,
    test_decoded_vectors_are_fixed_points,
    test_error_feedback_loses_nothing,
    test_finite_stays_finite,
    test_non_finite_input_does_not_crash,
    test_unbiased,
    test_wire_length_is_the_formula,
    test_zeros_decode_to_zeros,
)
from tests.gpu.devices import two_devices

__all__ = [
    "test_contraction",
    "test_decoded_vectors_are_fixed_points",
    "test_error_feedback_loses_nothing",
    "test_finite_stays_finite",
    "test_non_finite_input_does_not_crash",
    "test_unbiased",
    "test_wire_length_is_the_formula",
    "test_zeros_decode_to_zeros",
]


@pytest.fixture(autouse=True)
def on_the_device():
    """What has no kernel for GPUs runs on the CPU, as in a user's program."""
    with tf.device(two_devices()[0]):
        yield


def test_the_laws_are_tried_on_the_device():
    """Or all of the above says nothing."""
    assert tf.zeros([8]).device.endswith(two_devices()[0])
