"""QCMD and QRDA Adagrad against NumPy references, TensorFlow's own kernels, and steps by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.optimizers import reference
from tests.optimizers.reference import QAdagradReference
from tests.replicas import apply_gradients, build, plain, random_gradients
from tests.rungs import slow_unless
from tfqcomm.compressors import ThresholdQuantizer, TopK
from tfqcomm.optimizers import QCMDAdagrad, QRDAAdagrad

SHAPES = [(12, 10), (7,), ()]
RATE = 0.05
CODECS = {
    "identity": ("identity", reference.identity),
    "top_k": (TopK(0.1), reference.top_k),
    "threshold": (ThresholdQuantizer("scaled"), reference.scaled_threshold),
}
ALGORITHMS = {
    "QCMD": (QCMDAdagrad, {}, lambda x: None),
    "QRDA": (QRDAAdagrad, {}, lambda x: 0.0),
    "QRDA around x_1": (QRDAAdagrad, {"center": "initial"}, lambda x: x.astype(np.float64)),
}
over_algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)


def run(algorithm, world, gradients, codec="threshold", learning_rate=RATE, **kwargs):
    """What the variables were at the start, and after each step."""
    cls, arguments, _ = ALGORITHMS[algorithm]

    def optimizer():
        return cls(
            learning_rate,
            compressor=CODECS[codec][0],
            min_size=0,  # as the paper: biases and all
            schedule="auto" if codec == "identity" else "all_gather",  # the paper's server
            **{"l1_on_vectors": True, **arguments, **kwargs},
        )

    strategy = plain(world)
    optimizer, variables = build(strategy, optimizer, SHAPES)
    start = [v.numpy() for v in variables]
    return start, apply_gradients(strategy, optimizer, variables, gradients)


def assert_follows(algorithm, start, actual, gradients, codec="threshold", **kwargs):
    """Compares with the reference, step by step; zeros must be the same ones."""
    rate = kwargs.pop("rate", lambda step: RATE)
    for x, history, of_variable in zip(start, actual, gradients, strict=True):
        center = ALGORITHMS[algorithm][2](x)
        expected = QAdagradReference(x, CODECS[codec][1], center=center, **kwargs)
        for step, of_workers in enumerate(of_variable):
            right = expected.step(of_workers, rate(step))
            message = f"shape {x.shape} diverged from the reference at step {step}"
            np.testing.assert_allclose(history[step], right, rtol=0, atol=2e-5, err_msg=message)
            clearly = np.abs(right) > 2e-5
            assert (history[step][clearly] != 0).all(), message
        np.testing.assert_array_equal(history[-1] == 0, right == 0)


@over_algorithms
@pytest.mark.parametrize("world", slow_unless(lambda world: world == 3, [1, 2, 3]))
@pytest.mark.parametrize(
    "codec", slow_unless(lambda codec: codec == "threshold", ["threshold", "top_k"])
)
def test_hundred_steps_are_those_of_the_paper(algorithm, world, codec):
    gradients = random_gradients(100, world, SHAPES)
    options = {"l1": {"QCMD": 0.4, "QRDA": 0.05}.get(algorithm, 0.2), "delta": 0.02}
    start, actual = run(algorithm, world, gradients, codec, **options)
    assert_follows(algorithm, start, actual, gradients, codec, **options)
    assert 0.05 < (actual[0][-1] == 0).mean() < 0.95


@over_algorithms
def test_defaults_are_those_of_the_paper(algorithm):
    """No l1, delta 1e-2; and no error feedback, or the second step would differ."""
    gradients = random_gradients(5, 2, SHAPES)
    start, actual = run(algorithm, 2, gradients)
    assert_follows(algorithm, start, actual, gradients, l1=0.0)


@over_algorithms
def test_learning_rate_schedule(algorithm):
    gradients = random_gradients(6, 2, SHAPES)
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1, 3], [1e-1, 1e-2, 1e-3])
    start, actual = run(algorithm, 2, gradients, learning_rate=schedule, l1=0.01)
    rates = [1e-1, 1e-1, 1e-2, 1e-2, 1e-3, 1e-3]
    assert_follows(algorithm, start, actual, gradients, l1=0.01, rate=lambda step: rates[step])


def of_tensorflow(kernel, start, gradients, *, slots, **arguments):
    """Steps of one of TensorFlow's training kernels."""
    variable = tf.Variable(start)
    slots = [tf.Variable(value) for value in slots]
    history = []
    for step, gradient in enumerate(gradients):
        kernel(variable, slots, tf.constant(gradient), step + 1, **arguments)
        history.append(variable.numpy())
    return np.stack(history)


def proximal_adagrad(variable, slots, gradient, step, l1):
    tf.raw_ops.ResourceApplyProximalAdagrad(
        var=variable.handle, accum=slots[0].handle, lr=RATE, l1=l1, l2=0.0, grad=gradient
    )


def adagrad_da(variable, slots, gradient, step, l1):
    tf.raw_ops.ResourceApplyAdagradDA(
        var=variable.handle,
        gradient_accumulator=slots[0].handle,
        gradient_squared_accumulator=slots[1].handle,
        grad=gradient,
        lr=RATE,
        l1=l1,
        l2=0.0,
        global_step=tf.constant(step, tf.int64),
    )


@pytest.mark.parametrize("l1", [0.0, 0.02])
def test_without_quantization_qcmd_is_proximal_adagrad(l1):
    """TensorFlow starts the sum of squares above zero instead of adding delta to its root."""
    gradients = random_gradients(50, 1, SHAPES)
    start, actual = run("QCMD", 1, gradients, "identity", l1=l1, delta=1e-9)
    for x, history, gradient in zip(start, actual, gradients, strict=True):
        slots = [np.full_like(x, 1e-12)]
        expected = of_tensorflow(proximal_adagrad, x, gradient[:, 0], slots=slots, l1=l1)
        np.testing.assert_allclose(history, expected, atol=1e-5)


@pytest.mark.parametrize("l1", [0.0, 0.02])
def test_without_quantization_qrda_is_adagrad_dual_averaging(l1):
    gradients = random_gradients(50, 1, SHAPES)
    start, actual = run("QRDA", 1, gradients, "identity", l1=l1, delta=1e-9)
    for x, history, gradient in zip(start, actual, gradients, strict=True):
        slots = [np.zeros_like(x), np.full_like(x, 1e-12)]
        expected = of_tensorflow(adagrad_da, x, gradient[:, 0], slots=slots, l1=l1)
        np.testing.assert_allclose(history, expected, atol=1e-5)


STEPS = np.array([[[3.0, -1.0]], [[4.0, 0.0]], [[0.0, 1.0]]], "float32")


def by_hand(cls, l1):
    optimizer, (variable,) = build(
        plain(), lambda: cls(1.0, l1, 1.0, compressor="identity", l1_on_vectors=True), [(2,)]
    )
    variable.assign([1.0, 0.25])
    return apply_gradients(plain(), optimizer, [variable], [STEPS])[0]


def test_three_steps_of_qcmd_by_hand():
    """Rate 1, delta 1, lambda 1/2.

    step  q        H               x - q / H               lambda / H       x
    1     3  -1    4    2          1 - 3/4    .25 + 1/2    1/8    1/4       1/8        1/2
    2     4   0    6    2          1/8 - 2/3  1/2          1/12   1/4      -11/24      1/4
    3     0   1    6    1 + √2    -11/24      .25 - .4142  1/12   .2071    -9/24       0
    """
    expected = [[1 / 8, 1 / 2], [-11 / 24, 1 / 4], [-9 / 24, 0]]
    np.testing.assert_allclose(by_hand(QCMDAdagrad, 0.5), expected, atol=1e-6)


def test_three_steps_of_qrda_by_hand():
    """Rate 1, delta 1, lambda 1/2: -sign(G) max(|G| - t lambda, 0) / H; x_1 is forgotten.

    step  G        H               |G| - t / 2    x
    1     3  -1    4    2          2.5   0.5     -5/8    1/4
    2     7  -1    6    2          6     0       -1      0
    3     7   0    6    1 + √2     5.5  -1.5     -11/12  0
    """
    expected = [[-5 / 8, 1 / 4], [-1, 0], [-11 / 12, 0]]
    np.testing.assert_allclose(by_hand(QRDAAdagrad, 0.5), expected, atol=1e-6)


@pytest.mark.parametrize("center", [0.0, 5.0])
def test_a_variable_whose_first_gradient_comes_late_starts_then(center):
    """It forgot its initial value, 5.0, and l1 was that of steps it had not taken."""
    name = "initial" if center else "zero"
    optimizer, variables = build(
        plain(),
        lambda: QRDAAdagrad(0.1, 0.02, compressor="identity", l1_on_vectors=True, center=name),
        [(3,), (3,)],
    )
    early, late = variables
    for _ in range(4):
        optimizer.apply([np.ones([3], "float32")], [early])
    late.assign([5.0] * 3)
    expected = QAdagradReference(late.numpy(), reference.identity, center=center, l1=0.02)
    for _ in range(2):
        g = np.float32([1, -2, 0])
        optimizer.apply([g], [late])
        np.testing.assert_allclose(late, expected.step(g[None], 0.1), atol=1e-5)


def test_what_was_saved_without_steps_of_each_variable_goes_on():
    """An older version saved fewer slots: all variables have taken the optimizer's steps."""
    optimizer, variables = build(plain(), lambda: QRDAAdagrad(0.1, 0.02), SHAPES)
    apply_gradients(plain(), optimizer, variables, random_gradients(3, 1, SHAPES))
    store = {}
    optimizer.save_own_variables(store)
    again, same = build(plain(), lambda: QRDAAdagrad(0.1, 0.02), SHAPES)
    again.load_own_variables({str(i): store[str(i)] for i in range(len(store) - len(SHAPES))})
    for one, two in zip(again.variables, optimizer.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())


@over_algorithms
def test_vectors_are_not_regularized_unless_asked_for(algorithm):
    gradients = random_gradients(10, 1, SHAPES)
    _, plainly = run(algorithm, 1, gradients, l1=0.0)
    _, sparse = run(algorithm, 1, gradients, l1=0.5, l1_on_vectors=False)
    assert (sparse[0][-1] == 0).any()
    for one, two in zip(plainly[1:], sparse[1:], strict=True):
        np.testing.assert_array_equal(one, two)


@over_algorithms
def test_all_zero_gradients_leave_what_l1_does(algorithm):
    gradients = [np.zeros_like(g) for g in random_gradients(3, 2, SHAPES)]
    start, actual = run(algorithm, 2, gradients, l1=1e-4)
    assert_follows(algorithm, start, actual, gradients, l1=1e-4)


@pytest.mark.parametrize("cls", [QCMDAdagrad, QRDAAdagrad])
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"l1": -1.0}, "`l1` must be a non-negative float. Received: l1=-1.0"),
        ({"delta": 0}, "`delta` must be a positive float. Received: delta=0"),
        ({"l1_on_vectors": 1}, "`l1_on_vectors` must be a bool. Received: l1_on_vectors=1"),
    ],
)
def test_arguments_that_do_not_fit(cls, arguments, text):
    with pytest.raises(ValueError, match=text):
        cls(**arguments)


def test_center_must_be_one_of_two():
    with pytest.raises(ValueError, match="`center` must be one of .*initial.* Received: center='m"):
        QRDAAdagrad(center="mean")
