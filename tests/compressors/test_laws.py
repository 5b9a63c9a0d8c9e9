"""The laws every compressor obeys, each one test over the catalogue."""

import dataclasses
import functools
import itertools
from typing import ClassVar

import numpy as np
import pytest
import tensorflow as tf

from tests.catalogue import over_compressors
from tfqcomm import compressors
from tfqcomm.kernels import numerics, wire
from tfqcomm.step import ExchangeOptions

SIZES = (0, 1, 2, 31, 32, 33, 1000, 65535, 65536, 65537)
TENSORS = {  # name -> float32[n]; none has an infinity or NaN
    "normal": lambda n: np.random.default_rng(n).normal(size=n),
    "zeros": lambda n: np.zeros(n),
    "negative zeros": lambda n: -np.zeros(n),
    "constant": lambda n: np.full(n, -0.3),
    "mostly zeros": lambda n: np.where(np.arange(n) % 997 == 0, np.arange(n) + 1.0, 0.0),
    "heavy tail": lambda n: np.random.default_rng(n).standard_cauchy(size=n) ** 3 * 1e-3,
    "descending": lambda n: np.arange(n, 0, -1.0),
    "denormal": lambda n: np.random.default_rng(n).normal(size=n) * 1e-40,
    "huge": lambda n: np.random.default_rng(n).choice([-3e38, 1e38, 3.4e38], size=n),
    "largest": lambda n: np.resize([np.finfo(np.float32).max, 0, -np.finfo(np.float32).max], n),
}


def tensor(name, n):
    return TENSORS[name](n).astype(np.float32)


def round_trip(compressor, x, seed=0):
    return compressor.decode(compressor.encode(x, seed), len(x)).numpy()


@functools.cache
def rounds(compressor, n):
    """A function of float32[n] and seeds: what arrives with each, float32[seeds, n]."""

    def round_trip_with(x, seed):
        return compressor.decode(compressor.encode(x, tf.stack([seed, 0])), n)

    @tf.function(autograph=False)
    def of_all(x, seeds):
        return tf.map_fn(lambda seed: round_trip_with(x, seed), seeds, tf.float32)

    return of_all


def squared(x):
    return float(np.square(x.astype(np.float64)).sum())


@over_compressors()
def test_wire_length_is_the_formula(case):
    for n in SIZES:
        words = case.compressor.encode(tensor("normal", n))
        assert words.dtype == tf.int32
        assert words.shape == [case.words(n)], n
        assert case.compressor.num_words(n) == case.words(n), n


@over_compressors()
def test_finite_stays_finite(case):
    for name, n in itertools.product(TENSORS, (0, 1, 33, 65537)):
        decoded = case.compressor.decode(case.compressor.encode(tensor(name, n), 7), n)
        assert decoded.dtype == tf.float32
        assert decoded.shape == [n]
        assert np.isfinite(decoded).all(), (name, n)


@over_compressors(only=lambda c: c.deterministic)
def test_contraction(case):
    names = ("normal", "mostly zeros", "heavy tail", "constant", "huge")
    for name, n in itertools.product(names, (1, 2, 33, 1000, 65537)):
        x = tensor(name, n)
        if case.compressor == compressors.Float16():
            x = x / max(abs(x).max() / 6e4, 1e-30)  # saturation is a test of its own
        error = squared(round_trip(case.compressor, x) - x)
        # The last terms: sums rounded to float32; a half's smallest step.
        bound = (case.contraction(n) + 1e-6) * squared(x) + n * 2.0**-50
        assert error <= bound, (name, n, error / squared(x), case.contraction(n))


@over_compressors(only=lambda c: not c.deterministic)
def test_contraction_in_expectation(case):
    assert case.in_expectation == (case.variance is None)
    for name, n in itertools.product(("normal", "mostly zeros", "constant"), (1, 2, 31, 1000)):
        x = tensor(name, n)
        received = rounds(case.compressor, n)(x, tf.range(200)).numpy()
        errors = [squared(one - x) for one in received]
        standard_error = np.std(errors) / np.sqrt(len(errors))
        excess = np.mean(errors) - (case.contraction or case.variance)(n) * squared(x)
        if case.in_expectation and name == "normal":
            excess = abs(excess)
        assert excess <= 5 * standard_error + 1e-6, (name, n)


@over_compressors(only=lambda c: c.unbiased)
def test_unbiased(case):
    """The mean error over seeds, seen from twenty random directions, vanishes."""
    for name, n in itertools.product(("normal", "mostly zeros", "constant"), (1, 2, 33, 1000)):
        x = tensor(name, n)
        errors = rounds(case.compressor, n)(x, tf.range(400)).numpy() - x
        directions = np.random.default_rng(n).normal(size=[n, 20])
        seen = errors.astype(np.float64) @ directions
        standard_error = seen.std(axis=0) / np.sqrt(len(seen))
        # The last term: probabilities are multiples of 2^-16, and sums are float32.
        slack = 2.0**-16 * np.abs(x).max() * np.abs(directions).sum(axis=0)
        assert (abs(seen.mean(axis=0)) <= 5 * standard_error + slack).all(), (name, n)


@over_compressors()
def test_only_lossless_codecs_lose_nothing(case):
    x = tensor("normal", 1000)
    returned = round_trip(case.compressor, x).tobytes() == x.tobytes()
    # TopK(1.0) and RandomK(1.0), too.
    keeps_everything = case.contraction is not None and case.contraction(len(x)) == 0
    assert returned == keeps_everything
    assert returned or not case.compressor.lossless


@over_compressors(settings=False)
def test_zeros_decode_to_zeros(case):
    for n in SIZES:
        for name in ("zeros", "negative zeros"):
            assert not round_trip(case.compressor, tensor(name, n)).any(), (name, n)


@over_compressors(settings=False)
def test_decoded_vectors_are_fixed_points(case):
    fixed = []
    for n, name in itertools.product(SIZES, ("heavy tail", "normal")):
        once = round_trip(case.compressor, tensor(name, n), seed=3)
        twice = round_trip(case.compressor, once, seed=3)
        fixed.append(np.allclose(twice, once, rtol=1e-6, atol=0))
    assert all(fixed) == case.idempotent, fixed


@over_compressors(settings=False)
def test_non_finite_input_does_not_crash(case):
    """The aggregator skips such steps; a codec has only to get through."""
    for bad, n in itertools.product((np.nan, -np.nan, np.inf, -np.inf), (1, 33, 65535, 65537)):
        one, every = tensor("normal", n), np.full(n, bad, np.float32)
        one[n // 2] = bad
        for x in (one, every):
            assert round_trip(case.compressor, x, seed=1).shape == (n,)


@over_compressors(only=lambda c: c.deterministic)
def test_non_finite_input_stays_visible(case):
    for bad in (np.nan, np.inf, -np.inf):
        x = tensor("normal", 65537)
        x[12345] = bad
        assert not np.isfinite(round_trip(case.compressor, x)).all(), bad


@over_compressors()
def test_error_feedback_loses_nothing(case):
    """Sum of all decoded messages plus the residual is the sum of all inputs."""
    n, generator = 1003, np.random.default_rng(5)
    residual, inputs, decoded = np.zeros(n, np.float32), np.zeros(n), np.zeros(n)
    largest = 0.0  # residuals grow where the variance is above 1, and so does rounding
    for step in range(20):
        x = generator.normal(size=n).astype(np.float32)
        message = residual + x
        received = round_trip(case.compressor, message, seed=step)
        residual = message - received
        inputs, decoded = inputs + x, decoded + received
        largest = max(largest, np.abs(message).max())
    np.testing.assert_allclose(decoded + residual, inputs, atol=max(1e-4, 2e-6 * largest))


@over_compressors()
def test_declared_error_bounds_are_those_of_the_papers(case):
    """Error feedback is switched by them; the catalogue's stand for themselves."""
    for n in (1, 2, 3, 31, 1000, 65537):
        declared, bound = case.compressor.error_bound(n), case.error_bound(n)
        if isinstance(case.compressor, compressors.ThresholdQuantizer):  # a sum, bounded from above
            assert bound <= declared <= 1 - 0.8 * (1 - bound), n
        else:
            assert declared == pytest.approx(bound, abs=1e-12, rel=2.0**-15), n


@over_compressors()
def test_error_feedback_does_not_diverge(case):
    """500 steps of heavy-tailed noise: e <= sqrt(q) / (1 - sqrt(q)) times the largest message.

    By default a codec has feedback exactly where that q is below 1; where it is asked for, codecs
    that do not contract are damped until they do.
    """
    automatic = ExchangeOptions(case.compressor)
    assert automatic.feedback == (case.error_bound(2**20) < 1)
    codec = ExchangeOptions(case.compressor, error_feedback=True).codec
    assert (codec == case.compressor) == (automatic.feedback or codec.error_bound(1000) == 1)
    n, steps, generator = 1000, 500, np.random.default_rng(8)
    noise = generator.standard_t(2, size=[steps, n]).astype(np.float32)
    q = codec.error_bound(n)
    if q == 1:  # beyond a fixed range all is lost: messages must stay within it
        noise *= 0.1 / np.abs(noise).max()

    @tf.function
    def feed_back(noise):
        def step(residual, inputs):
            number, message = inputs
            target = residual + message
            return target - codec.decode(codec.encode(target, tf.stack([number, 0])), n)

        return tf.scan(step, (tf.range(steps), noise), initializer=tf.zeros([n]))

    norms = np.linalg.norm(feed_back(noise).numpy().astype(np.float64), axis=1)
    largest = np.linalg.norm(noise.astype(np.float64), axis=1).max()
    half_a_step = 0.25 / (2 ** (getattr(codec, "bits", 2) - 1) - 1)
    bound = np.sqrt(q) / (1 - np.sqrt(q)) * largest if q < 1 else half_a_step * np.sqrt(n)
    assert norms.max() <= bound + 1e-6 * largest


@over_compressors(settings=False)
def test_without_feedback_messages_are_unbiased_where_scaling_makes_them_so(case):
    codec = ExchangeOptions(case.compressor, error_feedback=False).codec
    if isinstance(case.compressor, compressors.RandomK):
        assert codec == compressors.RandomK(case.compressor.ratio, scaled=True)
    else:
        assert codec == case.compressor


@over_compressors(settings=False)
def test_same_seed_same_words(case):
    x = tensor("normal", 1000)
    words = case.compressor.encode(x, 11).numpy()
    np.testing.assert_array_equal(case.compressor.encode(x, tf.constant([11, 0])), words)
    other = case.compressor.encode(x, 12).numpy()
    # Even with all entries kept, the seed travels.
    assert (words == other).all() == case.compressor.deterministic


@over_compressors(settings=False)
def test_seeds_of_any_size(case):
    x = tensor("normal", 100)
    for seed in (-1, 2**31, 2**63 + 5, np.int64(-(2**40))):
        assert case.compressor.encode(x, seed).shape == [case.words(100)]


@over_compressors()
def test_words_and_length_are_all_a_receiver_needs(case):
    x = tensor("normal", 65537)
    words = case.compressor.encode(x, 5).numpy()
    receiver = compressors.deserialize(compressors.serialize(case.compressor))
    np.testing.assert_array_equal(
        receiver.decode(words, len(x)), round_trip(case.compressor, x, seed=5)
    )


@over_compressors(only=lambda c: c.linear)
def test_linear_codecs_decode_the_sum_of_their_bodies(case):
    codec, dtype = case.compressor, case.compressor.sum_dtype
    for n in (1, 2, 33, 1000):
        messages = [codec.encode(tensor("normal", n) * (i + 1), seed=9) for i in range(4)]
        headers = [m[: codec.header_words].numpy() for m in messages]
        assert all((header == headers[0]).all() for header in headers)
        bodies = [wire.words_to_summands(m[codec.header_words :], dtype) for m in messages]
        summed = wire.summands_to_words(tf.add_n(bodies))
        of_sum = codec.decode(tf.concat([headers[0], summed], 0), n).numpy()
        decoded = [codec.decode(m, n).numpy() for m in messages]
        # Half-width sums are rounded after each of three additions.
        rounding = {tf.float32: 1e-6, tf.float16: 2e-3, tf.bfloat16: 2e-2}[dtype]
        np.testing.assert_allclose(of_sum, sum(decoded), rtol=rounding)
        np.testing.assert_array_equal(of_sum != 0, decoded[0] != 0)


@over_compressors(only=lambda c: not c.linear)
def test_other_codecs_declare_nothing_about_sums(case):
    assert case.compressor.sum_dtype is None
    assert case.compressor.header_words == 0


@over_compressors(settings=False)
def test_large_tensors_are_fused_to_the_same_result(case, monkeypatch):
    """From `FUSE_FROM` elements on XLA compiles the kernels."""
    n = numerics.FUSE_FROM + 37
    x = tensor("heavy tail", n)
    x[:4] = 1e-40, -0.0, 3.4e38, -3.4e38
    fused = round_trip(case.compressor, x, seed=2)
    monkeypatch.setattr(numerics, "FUSE_FROM", 2 * n)
    words = case.compressor.encode_implementation(tf.constant(x), tf.constant([2, 0]))
    plain = case.compressor.decode_implementation(words, n).numpy()
    np.testing.assert_allclose(fused, plain, rtol=1e-5)


@over_compressors(settings=False)
def test_inside_functions_and_branches(case):
    x = tensor("normal", 1000)
    expected = round_trip(case.compressor, x, seed=4)

    @tf.function
    def step(x, seed, send):
        message = tf.cond(
            send, lambda: case.compressor.encode(x, seed), lambda: case.compressor.encode(-x, seed)
        )
        return case.compressor.decode(message, 1000)

    seed = tf.constant([4, 0])
    np.testing.assert_array_equal(step(x, seed, tf.constant(True)), expected)
    np.testing.assert_array_equal(step(x, seed, tf.constant(False)), -expected)


@over_compressors(settings=False)
def test_replicas_agree_with_a_single_process(case, mirrored_strategy):
    check_replicas(mirrored_strategy(2), case.compressor, n=1000)


@pytest.mark.parametrize(
    "name", ["float16", "top_k", "block_sign", "ternary", "qsgd", "log_grid", "threshold_quantizer"]
)
def test_replicas_agree_with_a_single_process_where_kernels_are_fused(name, mirrored_strategy):
    check_replicas(mirrored_strategy(2), compressors.get(name), n=numerics.FUSE_FROM + 1)


def check_replicas(strategy, codec, n):
    x = tensor("normal", n)

    @tf.function
    def run(x):
        def replica():
            rank = tf.distribute.get_replica_context().replica_id_in_sync_group
            words = codec.encode(x * tf.cast(rank + 1, tf.float32), 6)
            return words, codec.decode(words, n)

        return strategy.run(replica)

    words, decoded = (strategy.experimental_local_results(value) for value in run(x))
    for rank in range(2):
        alone = codec.encode(x * np.float32(rank + 1), 6)
        np.testing.assert_array_equal(words[rank], alone)
        np.testing.assert_array_equal(decoded[rank], codec.decode(alone, n))


@over_compressors(settings=False)
def test_other_floats_are_cast(case):
    for dtype in ("float16", "bfloat16", "float64"):
        x = tf.cast(tensor("normal", 100), dtype)
        words = case.compressor.encode(tf.cast(x, tf.float32))
        np.testing.assert_array_equal(case.compressor.encode(x), words, dtype)


@dataclasses.dataclass(frozen=True)
class Spy(compressors.Compressor):
    """Counts how often it is traced."""

    traces: ClassVar[list[str]] = []

    def num_words(self, n):
        return n

    def encode_implementation(self, x, seed):
        self.traces.append("encode")
        return tf.bitcast(x, tf.int32)

    def decode_implementation(self, words, n):
        self.traces.append("decode")
        return tf.bitcast(words, tf.float32)


def test_traced_once_for_all_callers(mirrored_strategy):
    Spy.traces.clear()
    for seed in range(3):
        for x in (tf.zeros([5]), tf.ones([5], tf.float64)):
            Spy().decode(Spy().encode(x, seed), 5)

    strategy = mirrored_strategy(3)
    strategy.run(tf.function(lambda: Spy().decode(Spy().encode(tf.zeros([5])), 5)))
    with tf.device("CPU:1"):
        Spy().encode(tf.zeros([5]))
    assert Spy.traces == ["encode", "decode"]


def test_a_broken_codec_is_reported_where_it_breaks():
    @dataclasses.dataclass(frozen=True)
    class Short(Spy):
        def encode_implementation(self, x, seed):
            return tf.zeros([1], tf.int32)

    with pytest.raises(ValueError, match=r"shape|compatible"):
        Short().encode(tf.zeros([5]))


@over_compressors(settings=False)
def test_argument_errors(case):
    codec = case.compressor
    with pytest.raises(ValueError, match="Argument `x` must be a vector .* Received: x with sh"):
        codec.encode(tf.zeros([2, 3]))
    with pytest.raises(ValueError, match="Argument `x` must be a vector"):
        codec.encode(1.0)
    with pytest.raises(ValueError, match="Argument `x` must be a tensor of floats.*int32"):
        codec.encode([1, 2, 3])
    with pytest.raises(ValueError, match="Argument `seed` must be an integer or an int32 tensor"):
        codec.encode([1.0], seed=0.5)
    with pytest.raises(ValueError, match="Argument `seed` must be an integer or an int32 tensor"):
        codec.encode([1.0], seed=tf.constant([1, 2, 3]))
    with pytest.raises(ValueError, match=r"Argument `words` must have shape .* for n=9"):
        codec.decode(tf.zeros([100], tf.int32), 9)
    for n in (-1, 2.0, True, None):
        with pytest.raises(ValueError, match="Argument `n` must be a non-negative integer"):
            codec.decode(tf.zeros([1], tf.int32), n)


def test_length_must_be_known_when_traced():
    encode = tf.function(compressors.Identity().encode, input_signature=[tf.TensorSpec([None])])
    with pytest.raises(ValueError, match="of known length"):
        encode(tf.zeros([3]))
