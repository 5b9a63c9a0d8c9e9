"""Everything the common tests run over: one entry per algorithm, with what it promises.

`COMPRESSORS` holds every registered compressor with its defaults and with each other argument that
changes its payload. A test in `tests/compressors/test_registry.py` fails if one is missing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import keras
import numpy as np
import pytest

from tests.rungs import slow_unless
from tfqcomm import aggregators, compressors, optimizers
from tfqcomm.aggregators import schedule
from tfqcomm.aggregators.base import Aggregator


@dataclasses.dataclass(frozen=True)
class CompressorCase:
    """A compressor and its promises, written down independently of its code.

    Attributes:
        compressor: The object under test.
        words: n -> words on the wire.
        contraction: n -> q in ||C(x) - x||^2 <= q ||x||^2 for n > 0; None if `variance` is given.
        in_expectation: The contraction holds for the mean over seeds only, with equality.
        variance: n -> q in E ||C(x) - x||^2 <= q ||x||^2 for n > 0, of codecs that round at random:
            q may be above 1, and a single draw may be worse.
        idempotent: What was decoded, encoded again with the same seed, decodes to itself.
        slow: Another case takes nearly the same way, and runs by default.
    """

    compressor: compressors.Compressor
    words: Callable[[int], int]
    contraction: Callable[[int], float] | None = None
    in_expectation: bool = False
    variance: Callable[[int], float] | None = None
    idempotent: bool = True
    slow: bool = False

    def error_bound(self, n: int) -> float:
        """The constant, whichever it is."""
        return (self.contraction or self.variance)(n)

    def __str__(self) -> str:
        config = ",".join(f"{k}={v}" for k, v in self.compressor.get_config().items())
        return f"{type(self.compressor).__name__}({config})"


def kept(ratio: float, n: int) -> int:
    """Entries a sparsifier keeps."""
    return min(n, max(1, round(ratio * n)))


def _halves(n: int) -> int:
    return math.ceil(n / 2)


def elias_fano(k: int, n: int) -> int:
    """Words of k ascending positions below n: low bits, and a bitmap of the rest."""
    low = math.floor(math.log2(n / k))
    return math.ceil(k * low / 32) + math.ceil(((n - 1) // 2**low + k) / 32)


VALUES = {  # value_dtype -> words of k values of one tensor, share of them that rounding loses
    "float32": (lambda k: k, lambda k: 0.0),
    "bfloat16": (_halves, lambda k: 2.0**-16),  # 2^-8 of each value, squared
    "int8": (
        lambda k: math.ceil(k / 256) + math.ceil(k / 4),
        lambda k: _uniform_contraction(8, min(k, 256)),
    ),
    "int4": (
        lambda k: math.ceil(k / 256) + math.ceil(k / 8),
        lambda k: _uniform_contraction(4, min(k, 256)),
    ),
    "table2": (lambda k: 4 + math.ceil(k / 16), lambda k: 1 - 1 / k),
}


def _top_k(ratio: float, value_dtype: str = "float32", *, idempotent: bool = True, **options):
    words_of_values, lost = VALUES[value_dtype]

    def words(n):
        k = kept(ratio, n)
        return elias_fano(k, n) + words_of_values(k) if n else 0

    def contraction(n):
        k = kept(ratio, n)
        return 1 - k / n * (1 - lost(k))

    return CompressorCase(
        compressors.TopK(ratio, value_dtype=value_dtype, **options),
        words=words,
        contraction=contraction,
        idempotent=idempotent,
    )


def _top_k_of_chunks(ratio: float, chunk: int) -> CompressorCase:
    def lengths(n):
        return [min(chunk, n - start) for start in range(0, n, chunk)]

    def words(n):
        k = sum(kept(ratio, m) for m in lengths(n))
        return elias_fano(k, n) + k if n else 0

    return CompressorCase(
        compressors.TopK(ratio, chunk=chunk),
        words=words,
        contraction=lambda n: 1 - min(kept(ratio, m) / m for m in lengths(n)),
    )


def _adaptive_top_k(budget: float | str, average: Callable[[int], int], **kwargs) -> CompressorCase:
    return CompressorCase(
        compressors.AdaptiveTopK(budget, **kwargs),
        words=lambda n: elias_fano(average(n), n) + average(n) if n else 0,
        contraction=lambda n: 1 - average(n) / n,
    )


def _random_k(ratio: float, **kwargs) -> CompressorCase:
    def contraction(n):
        return 1 - kept(ratio, n) / n

    def variance(n):
        return n / kept(ratio, n) - 1

    return CompressorCase(
        compressors.RandomK(ratio, **kwargs),
        words=lambda n: 2 + kept(ratio, n),
        contraction=None if kwargs else contraction,
        in_expectation=not kwargs,
        variance=variance if kwargs else None,
        idempotent=not kwargs,  # scaled again
    )


def _block_sign(block: int | None = None) -> CompressorCase:
    return CompressorCase(
        compressors.BlockSign(block=block),
        words=lambda n: math.ceil(n / (block or max(n, 1))) + math.ceil(n / 32),
        contraction=lambda n: 1 - 1 / min(block or n, n),
    )


def _planes(bits: int, n: int) -> int:
    return bits * math.ceil(n / 32)


def _ternary(clip: float | None, **kwargs) -> CompressorCase:
    # The mean of (C(x) - x)^2 is s|x| - x^2 <= s^2 / 8 + x^2, and clipping makes s^2 at most clip^2
    # times the mean of x^2. Without it s |x|_1 / |x|_2^2 is largest for a large entry among equals.
    return CompressorCase(
        compressors.Ternary(clip=clip, **kwargs),
        words=lambda n: min(n, 1) + _planes(2, n),
        variance=lambda n: 1 + clip**2 / 8 if clip else (math.sqrt(n) - 1) / 2,
        idempotent=clip is None,  # a sparser vector has a smaller deviation
    )


def _qsgd(bits: int, bucket: int | None) -> CompressorCase:
    s = 2 ** (bits - 1) - 1
    return CompressorCase(
        compressors.QSGD(bits, bucket=bucket),
        words=lambda n: math.ceil(n / (bucket or max(n, 1))) + _planes(bits, n),
        variance=lambda n: min((d := min(bucket or n, n)) / s**2, math.sqrt(d) / s),
        idempotent=False,  # the norm of the levels is another
    )


def _log_grid(k: int) -> CompressorCase:
    def contraction(n):
        # The largest entry is exact. All others are worst just below the smallest level's half, or
        # in the middle between 1/2 and 1: an error of 1/4 on 3/4.
        below, between = (n - 1) / 4 ** (k + 1), (n - 1) / 16 if k else 0
        return max(below / (1 + below), between / (1 + 9 * between))

    return CompressorCase(
        compressors.LogGrid(k),
        words=lambda n: min(n, 1) + _planes(math.ceil(math.log2(2 * k + 3)), n),
        contraction=contraction,
    )


def _uniform_contraction(bits: int, n: int) -> float:
    """The largest entry is exact, all others are half a step off, and no larger than that."""
    others = (n - 1) / (2 * (2 ** (bits - 1) - 1)) ** 2
    return others / (1 + others)


def _uniform_grid(bits: int, scale: str) -> CompressorCase:
    absmax = scale == "absmax"
    return CompressorCase(
        compressors.UniformGrid(bits, range=scale),
        words=lambda n: (min(n, 1) if absmax else 0) + _planes(bits, n),
        contraction=lambda n: _uniform_contraction(bits, n) if absmax else 1.0,
    )


def _threshold_quantizer(threshold: str | float) -> CompressorCase:
    def contraction(n):
        if threshold == "optimal":  # worst where keeping any number of entries is equally good
            k = np.arange(1, n + 1)
            return 1 - 1 / np.square(np.sqrt(k) - np.sqrt(k - 1)).sum()
        t = 0.7 if threshold == "scaled" else threshold
        return 1 - (4 * t * (1 - t) if t > 0.5 else 1) / n

    return CompressorCase(
        compressors.ThresholdQuantizer(threshold),
        words=lambda n: min(n, 1) + _planes(2, n),
        contraction=contraction,
    )


def _block_int8(block: int | None) -> CompressorCase:
    return CompressorCase(
        compressors.BlockInt8(block=block),
        words=lambda n: math.ceil(n / (block or max(n, 1))) + math.ceil(n / 4),
        contraction=lambda n: _uniform_contraction(8, min(block or n, n)),
    )


def _float8(form: str, block: int | None) -> CompressorCase:
    formats = {"e4m3": (8, 2.0**-9, 448), "e5m2": (4, 2.0**-16, 57344)}
    steps_of_binade, smallest, largest = formats[form]

    def contraction(n):
        # The largest entry is exact. All others are worst at half the smallest value, or half a
        # step above the largest power of two there is.
        half_step = largest / 1.75 / steps_of_binade / 2
        worst = [(smallest / 2, smallest / 2), (largest / 1.75 + half_step, half_step)]
        others = min(block or n, n) - 1
        return max(others * e**2 / (largest**2 + others * y**2) for y, e in worst)

    return CompressorCase(
        compressors.Float8(form, block=block),
        words=lambda n: math.ceil(n / (block or max(n, 1))) + math.ceil(n / 4),
        contraction=contraction,
    )


def _two_means(block: int | None = None) -> CompressorCase:
    return CompressorCase(
        compressors.TwoMeans(block=block),
        words=lambda n: 2 * math.ceil(n / (block or max(n, 1))) + math.ceil(n / 32),
        contraction=lambda n: 1 - 1 / min(block or n, n),
    )


def _power_sgd(rank: int) -> CompressorCase:
    def square(n):
        columns = max(1, math.ceil(math.sqrt(n)))
        return math.ceil(n / columns), columns

    def words(n):
        return min(n, 1 + rank * sum(square(n)))

    def variance(n):
        return 1 - rank / min(square(n)) if words(n) < n else 0.0

    return CompressorCase(
        compressors.PowerSGD(rank),
        words=words,
        variance=variance,
        idempotent=False,  # but for rounding
    )


def _slow(case: CompressorCase) -> CompressorCase:
    return dataclasses.replace(case, slow=True)


COMPRESSORS = [
    CompressorCase(compressors.Identity(), words=lambda n: n, contraction=lambda n: 0.0),
    CompressorCase(compressors.Float16(), words=_halves, contraction=lambda n: 2.0**-22),
    _slow(CompressorCase(compressors.BFloat16(), words=_halves, contraction=lambda n: 2.0**-16)),
    _top_k(0.01),
    _slow(_top_k(0.3)),
    _slow(_top_k(1.0)),
    _slow(_top_k(0.01, "bfloat16")),
    # Values that round to 0 make room for others.
    _slow(_top_k(0.01, "int8", idempotent=False)),
    _top_k(0.3, "int4", idempotent=False),
    _top_k(0.01, "table2"),
    _top_k(0.05, "bfloat16", support="shared"),
    _top_k_of_chunks(0.02, 100),
    _adaptive_top_k(0.01, lambda n: kept(0.01, n)),
    _slow(_adaptive_top_k("500 entries/step", lambda n: min(500, n), rule="threshold")),
    _random_k(0.01),
    _slow(_random_k(1.0)),
    _random_k(0.3, scaled=True),
    _slow(_block_sign()),
    _block_sign(1000),
    _ternary(2.5),
    _slow(_ternary(None)),
    _ternary(2.5, shared_scale=True),
    _qsgd(4, 512),
    _slow(_qsgd(2, 100)),
    _slow(_qsgd(8, None)),
    _slow(_log_grid(0)),
    _slow(_log_grid(1)),
    _log_grid(6),
    _uniform_grid(8, "absmax"),
    _slow(_uniform_grid(3, "absmax")),
    _slow(_uniform_grid(8, "fixed")),
    _slow(_uniform_grid(2, "fixed")),
    _threshold_quantizer("scaled"),
    _slow(_threshold_quantizer("optimal")),
    _slow(_threshold_quantizer(0.25)),
    _block_int8(256),
    _slow(_block_int8(1000)),
    _slow(_block_int8(None)),
    _float8("e4m3", 256),
    _slow(_float8("e5m2", None)),
    CompressorCase(
        compressors.NaturalCompression(),
        words=lambda n: math.ceil(n / 32) + math.ceil(n / 4),
        variance=lambda n: 1 / 8,
    ),
    _two_means(),
    _slow(_two_means(1000)),
    _power_sgd(4),
    _slow(_power_sgd(1)),
]


def _schedules() -> list[tuple[str, str]]:
    """Each registered compressor with each schedule that it can follow."""
    pairs = []
    for name in compressors.registry.names():
        fits = [how for how in ("dense", "all_gather", "two_phase") if _fits(name, how)]
        pairs += [(name, how) for how in fits or ["auto"]]
    return pairs


def _fits(name: str, how: str) -> bool:
    try:
        schedule.check(how, compressors.get(name))
    except ValueError:
        return False
    return True


SCHEDULES = _schedules()


def over_compressors(
    *, only: Callable[[compressors.Compressor], bool] = lambda _: True, settings: bool = True
):
    """Decorator: runs a test once per catalogued compressor, as its argument `case`.

    Args:
        only: which ones.
        settings: False for what does not depend on the settings of a compressor: then those that
            run by default are all.
    """
    return _over([case for case in COMPRESSORS if only(case.compressor)], settings)


@dataclasses.dataclass(frozen=True)
class AggregatorCase:
    """An aggregator with a compressor that can follow it.

    Attributes:
        aggregator: The class under test.
        compressor: Its codec.
        tolerance: Of means, relative to the largest of them. Zero is to the bit: a NumPy loop
            over the codec gives the same. All-reduces add in an order of their own, and those of
            half precision round every sum, which no residual sees.
        slow: Another case takes nearly the same way, and runs by default.
    """

    aggregator: type[Aggregator]
    compressor: compressors.Compressor
    tolerance: float = 0.0
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.aggregator.__name__}-{self.compressor}"


# Every codec in an all-gather, and one of each kind where an owner encodes again: there all of them
# meet tests/aggregators/test_properties.py.
AGGREGATORS = [
    AggregatorCase(aggregators.PlainMean, compressors.Identity(), 1e-6),
    AggregatorCase(aggregators.DenseMean, compressors.Float16(), 4e-3),
    AggregatorCase(aggregators.DenseMean, compressors.BFloat16(), 3e-2),
    AggregatorCase(aggregators.DenseMean, compressors.RandomK(0.3), 1e-6),
    AggregatorCase(aggregators.AllGatherMean, compressors.Float16(), slow=True),
    AggregatorCase(aggregators.AllGatherMean, compressors.TopK(0.01)),
    AggregatorCase(aggregators.AllGatherMean, compressors.RandomK(0.3)),
    AggregatorCase(aggregators.AllGatherMean, compressors.BlockSign(block=1000)),
    AggregatorCase(aggregators.AllGatherMean, compressors.Ternary(), slow=True),
    AggregatorCase(aggregators.AllGatherMean, compressors.QSGD(8), slow=True),
    AggregatorCase(aggregators.AllGatherMean, compressors.LogGrid(1), slow=True),
    AggregatorCase(aggregators.AllGatherMean, compressors.UniformGrid(4), slow=True),
    AggregatorCase(aggregators.AllGatherMean, compressors.ThresholdQuantizer("optimal"), slow=True),
    AggregatorCase(aggregators.AllGatherMean, compressors.BlockInt8(), slow=True),
    AggregatorCase(aggregators.AllGatherMean, compressors.Float8(), slow=True),
    AggregatorCase(aggregators.AllGatherMean, compressors.NaturalCompression(), slow=True),
    AggregatorCase(aggregators.AllGatherMean, compressors.TwoMeans(block=1000), slow=True),
    AggregatorCase(aggregators.IntegerMean, compressors.Ternary(shared_scale=True), 1e-6),
    AggregatorCase(
        aggregators.IntegerMean, compressors.Ternary(clip=None, shared_scale=True), 1e-6, slow=True
    ),
    AggregatorCase(aggregators.SharedSupportMean, compressors.TopK(0.1, support="shared"), 1e-6),
    AggregatorCase(
        aggregators.SharedSupportMean,
        compressors.TopK(0.3, value_dtype="bfloat16", chunk=64, support="shared"),
        3e-2,
        slow=True,
    ),
    AggregatorCase(aggregators.TwoPhaseMean, compressors.BFloat16(), slow=True),
    AggregatorCase(aggregators.TwoPhaseMean, compressors.TopK(0.3)),
    AggregatorCase(aggregators.TwoPhaseMean, compressors.BlockSign(block=1000)),
    AggregatorCase(aggregators.TwoPhaseMean, compressors.LogGrid()),
    AggregatorCase(aggregators.TwoPhaseMean, compressors.ThresholdQuantizer(), slow=True),
    AggregatorCase(aggregators.TwoPhaseMean, compressors.BlockInt8()),
]


def over_aggregators(*, settings: bool = True):
    """Decorator: runs a test once per catalogued aggregator, as its argument `case`.

    Args:
        settings: as of `over_compressors`.
    """
    return _over(AGGREGATORS, settings)


@dataclasses.dataclass(frozen=True)
class OptimizerCase:
    """An optimizer whose gradients are compressed, by itself or by its strategy.

    Attributes:
        make: The optimizer, given further keyword arguments of Keras' base class.
        strategy_compressor: Of `CompressedAllReduce`; None for optimizers that bring their own.
        slow: Another case takes nearly the same way, and runs by default.
    """

    name: str
    make: Callable[..., keras.optimizers.Optimizer]
    strategy_compressor: str | None = None
    slow: bool = False

    def __str__(self) -> str:
        return self.name


def _comp_ams(compressor, *, slow: bool = False, **options) -> OptimizerCase:
    name = compressor if isinstance(compressor, str) else type(compressor).__name__
    make = functools.partial(optimizers.CompAMS, 0.05, compressor=compressor, **options)
    return OptimizerCase(f"CompAMS-{name}", make, slow=slow)


def _optimizer(name, *args, label: str = "", slow: bool = False, **options) -> OptimizerCase:
    make = functools.partial(getattr(optimizers, name), *args, min_size=0, **options)
    return OptimizerCase(f"{name}-{label}" if label else name, make, slow=slow)


OPTIMIZERS = [
    _comp_ams(compressors.TopK(0.2), min_size=0),
    _comp_ams("block_sign", min_size=0, schedule="two_phase"),
    # Of seed 0 an entry has a first moment so small that Adam's division makes 2e-6 of a last bit,
    # which forward and backward passes do differ by in eager steps.
    _comp_ams("random_k", min_size=32, error_feedback=False, seed=1, slow=True),
    _comp_ams(compressors.PowerSGD(1), min_size=0, slow=True),
    _optimizer("QAdam", 0.02, compressor=compressors.LogGrid(1)),
    _optimizer(
        "QAdam",
        0.02,
        beta_2="1-1/t",
        schedule="two_phase",
        weight_compressor=compressors.UniformGrid(8),
        label="two_phase-weights",
        slow=True,
    ),
    _optimizer("OneBitAdam", 0.02, warm_up=3),
    _optimizer(
        "OneBitAdam",
        0.02,
        beta_2=0.5,
        warm_up="auto",
        compressor="log_grid",
        schedule="two_phase",
        label="auto-two_phase",
        slow=True,
    ),
    OptimizerCase("DeMo", functools.partial(optimizers.DeMo, 0.02, top=4, chunk=8)),
    _optimizer("QCMDAdagrad", 0.1, l1=1e-3, l1_on_vectors=True, slow=True),
    _optimizer("QRDAAdagrad", 0.1, l1=1e-4, center="initial"),
    _optimizer("AdaptiveTopKSGD", 0.05, 0.9, budget=0.2, rule="norm_ef"),
    _optimizer(
        "AdaptiveTopKSGD",
        0.05,
        0.9,
        budget=0.2,
        rule="threshold",
        momentum_correction=True,
        label="momentum_correction",
        slow=True,
    ),
    # Keras' own: what does not hold for them is wrong with the test.
    OptimizerCase("Adam", functools.partial(keras.optimizers.Adam, 0.05), "top_k"),
    OptimizerCase("SGD", functools.partial(keras.optimizers.SGD, 0.05, momentum=0.9), "block_sign"),
]


def over_optimizers(*, settings: bool = True):
    """Decorator: runs a test once per catalogued optimizer, as its argument `case`.

    Args:
        settings: as of `over_compressors`.
    """
    return _over(OPTIMIZERS, settings)


def _over(cases, settings):
    cases = [case for case in cases if settings or not case.slow]
    return pytest.mark.parametrize("case", slow_unless(lambda c: not c.slow, cases), ids=str)
