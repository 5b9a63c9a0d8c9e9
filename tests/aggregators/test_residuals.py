"""Error feedback survives a change of replicas and of schedules: what is owed stays owed."""

import numpy as np
import pytest
import tensorflow as tf

from tests.aggregators.processes import run_processes
from tests.aggregators.runs import local_transport, random_messages, run
from tests.catalogue import AggregatorCase
from tfqcomm.aggregators import AllGatherMean, TwoPhaseMean
from tfqcomm.aggregators.error_feedback import encode_with_feedback
from tfqcomm.compressors import BlockSign, TopK
from tfqcomm.kernels.layout import Layout
from tfqcomm.state.residuals import Residuals, Slot

SIZES = (31, 70)
WORKER, OWNER = Slot("worker", "a", 6, 0, 6), Slot("owner", "a", 6, 2, 4)


def residuals_of(world, worker=(), owner=None):
    """Residuals of tensor `a`: a number for each worker, and one for the part of an owner."""
    residuals = Residuals(local_transport(world))
    residuals.declare("a", 6)
    for replica, value in enumerate(worker):
        residuals.variable(replica, WORKER).assign(tf.fill([6], float(value)))
    if owner is not None:
        residuals.variable(0, OWNER).assign(tf.fill([2], float(owner)))
    return residuals


def test_encode_with_feedback_by_hand():
    message, residual = tf.constant([[1.0, 0.0, -2.0, 0.5], [0.0, 1.5, 0.0, 0.5]])
    encoded = encode_with_feedback(TopK(0.5), Layout((4,)), message, residual, seed=0)
    words = tf.bitcast(encoded.words, tf.int32)
    np.testing.assert_array_equal(TopK(0.5).decode(words, 4), [0.0, 1.5, -2.0, 0.0])
    (left_out,) = encoded.left_out()
    np.testing.assert_array_equal(left_out, [1.0, 0.0, 0.0, 1.0])


def test_without_residual_there_is_no_feedback():
    encoded = encode_with_feedback(TopK(0.5), Layout((2,)), tf.constant([1.0, 3.0]), None, seed=0)
    words = tf.bitcast(encoded.words, tf.int32)
    np.testing.assert_array_equal(TopK(0.5).decode(words, 2), [0.0, 3.0])
    assert encoded.left_out() == []


def test_a_residual_starts_at_zero_and_is_one_variable():
    residuals = residuals_of(2)
    assert residuals.variable(0, WORKER) is residuals.variable(0, WORKER)
    assert residuals.variable(0, WORKER) is not residuals.variable(1, WORKER)
    assert not residuals.variable(1, WORKER).numpy().any()
    assert residuals.total()["a"].shape == (6,)


def test_total_is_what_the_mean_is_owed():
    """Two workers' residuals count half each, as their messages do; an owner's in full."""
    residuals = residuals_of(2, worker=[1.0, 4.0], owner=10.0)
    np.testing.assert_array_equal(residuals.total()["a"], [2.5, 2.5, 12.5, 12.5, 2.5, 2.5])


def test_norm_is_that_of_the_first_workers_own():
    assert residuals_of(2, worker=[2.0, 100.0], owner=50.0).norm() == pytest.approx(2 * 6**0.5)


@pytest.mark.parametrize("before", [1, 2, 3, 4])
@pytest.mark.parametrize("after", [1, 2, 3, 4])
@pytest.mark.parametrize("exist", [True, False], ids=["existing", "not yet created"])
def test_total_survives_another_number_of_replicas(before, after, exist):
    total = residuals_of(before, worker=range(before), owner=7.0).total()
    residuals = residuals_of(after, worker=[99.0] * after if exist else [], owner=99.0)
    residuals.load_total(total)
    for replica in range(after):
        residuals.variable(replica, WORKER)
    np.testing.assert_array_equal(residuals.total()["a"], total["a"])


def test_elements_that_change_buckets_take_along_what_they_are_owed():
    """And what is loaded later is given to one of the buckets, not to each."""
    residuals = Residuals(local_transport(1))
    a, b = (Slot("worker", key, 3, 0, 3) for key in "ab")
    both, alone = Layout((3, 3), 4), Layout((3,), 4)
    for slot in (a, b):
        residuals.declare(slot.key, 3)
    residuals.vector(0, (a, b), both).assign([1, 2, 3, 0, 4, 5, 6, 0])
    np.testing.assert_array_equal(residuals.vector(0, (b,), alone), [4, 5, 6, 0])
    np.testing.assert_array_equal(residuals.vector(0, (a, b), both), [1, 2, 3, 0, 0, 0, 0, 0])
    total = residuals.total()
    np.testing.assert_array_equal(total["b"], [4, 5, 6])
    residuals.load_total(total)
    np.testing.assert_equal(residuals.total(), total)


def of_parts(*borders):
    """Residuals of tensor `a` whose parts, between these borders, have names of their own."""
    residuals, parts = Residuals(local_transport(1)), []
    for start, stop in zip(borders, borders[1:], strict=False):
        name, size = f"a from {start}", stop - start
        residuals.declare_part(name, "a", 6, start)
        residuals.declare(name, size)
        parts.append(Slot("worker", name, size, 0, size))
    return residuals, parts


def test_what_is_owed_of_parts_is_kept_as_the_tensors_and_survives_other_parts():
    residuals, (first, second) = of_parts(0, 2, 6)
    residuals.variable(0, first).assign([1, 2])
    residuals.variable(0, second).assign([3, 4, 5, 6])
    total = residuals.total()
    assert list(total) == ["a"]
    np.testing.assert_array_equal(total["a"], [1, 2, 3, 4, 5, 6])
    residuals.declare_part("other", "a", 6, 1)  # cut in another way from now on
    other = residuals.variable(0, Slot("worker", "other", 3, 0, 3))
    np.testing.assert_array_equal(other, [2, 3, 4])
    np.testing.assert_array_equal(residuals.total()["a"], total["a"])
    residuals.load_total(total)
    np.testing.assert_array_equal(residuals.total()["a"], total["a"])


def test_parts_that_are_yet_to_be_made_are_still_owed():
    residuals, (first, second) = of_parts(0, 4, 6)
    saved = np.float32([1, 2, 3, 4, 5, 6])
    residuals.load_total({"a": saved})
    for slot, right in ((second, [5, 6]), (first, [1, 2, 3, 4])):
        np.testing.assert_array_equal(residuals.total()["a"], saved)
        np.testing.assert_array_equal(residuals.variable(0, slot), right)
    np.testing.assert_array_equal(residuals.total()["a"], saved)
    assert residuals.debt(second.key, 2) is None  # its residual pays
    other, (first, second) = of_parts(0, 4, 6)
    other.load_total({"a": saved})
    np.testing.assert_array_equal(other.debt(second.key, 2), [5, 6])
    np.testing.assert_array_equal(other.total()["a"], saved)
    np.testing.assert_array_equal(
        other.variable(0, Slot("worker", "a", 6, 0, 6)), [1, 2, 3, 4, 0, 0]
    )


def test_loading_nothing_resets():
    residuals = residuals_of(2, worker=[1.0, 2.0], owner=3.0)
    residuals.load_total({})
    assert not residuals.total()["a"].any()


def test_total_of_several_processes_is_that_of_one():
    one = residuals_of(4, worker=[1.0, 2.0, 3.0, 5.0], owner=7.0).total()

    def total(transport):
        residuals = Residuals(transport)
        residuals.declare("a", 6)
        for replica, rank in enumerate(transport.ranks):
            value = [1.0, 2.0, 3.0, 5.0][rank]
            residuals.variable(replica, WORKER).assign(tf.fill([6], value))
        if transport.process == 1:
            residuals.variable(0, OWNER).assign([7.0, 7.0])
        return residuals.total()

    for found in run_processes(2, 2, total):
        np.testing.assert_array_equal(found["a"], one["a"])


@pytest.mark.parametrize("exist", [True, False])
def test_another_models_residual_is_refused(exist):
    residuals = residuals_of(1, worker=[1.0] if exist else [])
    with pytest.raises(ValueError, match=r"`a` must have 6 elements. Received: shape=\(5,\)"):
        residuals.load_total({"a": np.zeros(5, np.float32)})
        residuals.variable(0, WORKER)


@pytest.mark.parametrize(("before", "after"), [(3, 3), (3, 2), (2, 4)])
@pytest.mark.parametrize(
    ("first", "second"),
    [(AllGatherMean, AllGatherMean), (TwoPhaseMean, TwoPhaseMean), (TwoPhaseMean, AllGatherMean)],
)
def test_a_run_that_goes_on_elsewhere_loses_nothing(before, after, first, second):
    """The law of conservation across a restart.

    With Block-Sign, `schedule="auto"` itself goes from two-phase to gathering when one of three
    workers leaves.
    """
    earlier = run(AggregatorCase(first, BlockSign()), random_messages(SIZES, before))
    messages = random_messages(SIZES, after, seed=1)
    later = run(AggregatorCase(second, BlockSign()), messages, owed=earlier.residuals.total())
    owed = later.residuals.total()
    for tensor in range(len(SIZES)):
        left = sum(step[tensor] for step in [*earlier.means, *later.means])
        inputs = [*earlier.messages, *later.messages]
        right = sum(np.mean([m[tensor] for m in of_step], axis=0) for of_step in inputs)
        np.testing.assert_allclose(left + owed[f"tensor{tensor}"], right, atol=1e-4)
