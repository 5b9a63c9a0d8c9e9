"""Top-k sparsification: the k entries of largest magnitude."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import tensorflow as tf

from tfqcomm import checks
from tfqcomm.compressors.base import Compressor
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import entries, kept_values, numerics, positions, selection
from tfqcomm.kernels.layout import Layout

_SUMMED = ("float32", "bfloat16")


@register("top_k")
@dataclasses.dataclass(frozen=True)
class TopK(Compressor):
    """Keeps the k = max(1, round(ratio * n)) entries of largest magnitude, exactly.

    The sparsest codec for a given error: ||C(x) - x||^2 <= (1 - k/n) ||x||^2 with float32 values.
    It is biased, so train with error feedback, to which also goes what rounding of values leaves
    out. Ties go to the lowest position; NaN counts as largest.

    Payload: positions in Elias-Fano form, l + 1 + n / (k 2^l) bits each, l = floor(log2(n / k)),
    then the values. With 1% kept that makes, per kept entry,

        value_dtype   bits    values
        "float32"     40.6    as they are
        "bfloat16"    24.6    rounded to nearest even
        "int8"        16.7    s q / 127, with s the largest of 256 magnitudes
        "int4"        12.7    s q / 7, the same
        "table2"      10.6    one of four: means of what falls between the mean and 1.5 standard
                              deviations on either side, and beyond those; four float32 a tensor

    With `support="shared"` the replicas of an exchange take turns in choosing: all send their
    values at the positions of one, and these are summed on the way. So what a worker sends does not
    grow with W: at 1% at most 72.6 bits per kept entry, 40.6 as bfloat16, in place of 40.6 (W - 1)
    and 24.6 (W - 1). A replica waits for its turn, or for another's agreement, with what is large
    for it alone: residuals are larger. By itself the codec is the same.

    Args:
        ratio: Share of entries kept, in (0, 1].
        value_dtype: as above; "float32" or "bfloat16" where the support is shared.
        chunk: Entries in a row that have a selection of their own, the last of a tensor fewer, and
            at least one each is kept; None selects from whole tensors.
        support: "own" of each replica, or "shared", which needs `schedule="auto"`.

    Example:
    >>> top_k = TopK(0.5)
    >>> top_k.decode(top_k.encode([0.1, -3.0, 2.0, 0.2]), n=4).numpy()
    array([ 0., -3.,  2.,  0.], dtype=float32)

    References:
        Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory", arXiv 1809.07599, Definition 2.1.
        Li, Karimi, Li, "On Distributed Adaptive Optimization with Gradient Compression",
        arXiv 2205.05632, Definition 2.
        Sarfi et al., "Communication Efficient LLM Pre-training with SparseLoCo", arXiv 2508.15706
        ("table2").
        Chen et al., "ScaleCom: Scalable Sparsified Gradient Compression for Communication-Efficient
        Distributed Training", arXiv 2104.11125 ("shared"; its low-pass filter's beta is 1).
    """

    ratio: float = 0.01  # lower => more compression
    _: dataclasses.KW_ONLY
    value_dtype: str = "float32"  # fewer bits => more compression
    chunk: int | None = None  # smaller => what is kept is spread more evenly
    support: str = "own"  # "shared" => less traffic on many workers, larger residuals

    sparse: ClassVar[bool] = True
    compilable: ClassVar[bool] = False
    compiled_on_gpu: ClassVar[bool] = True

    def __post_init__(self):
        if callable(self.ratio):
            raise ValueError(
                "Argument `ratio` must be a number in (0, 1]. For a schedule take "
                f"`AdaptiveTopK(schedule, rule='fixed')`. Received: ratio={self.ratio!r}"
            )
        object.__setattr__(self, "ratio", checks.ratio(self.ratio))
        checks.one_of("value_dtype", self.value_dtype, tuple(kept_values.FORMATS))
        if self.chunk is not None:
            checks.positive_integer("chunk", self.chunk)
        checks.one_of("support", self.support, ("own", "shared"))
        if self.shared_support and self.value_dtype not in _SUMMED:
            raise ValueError(
                f"Argument `value_dtype` must be one of {list(_SUMMED)} where the support is "
                "shared: values are summed on the way. "
                f"Received: value_dtype={self.value_dtype!r}, support={self.support!r}"
            )

    def __repr__(self):
        chunk = "" if self.chunk is None else f", chunk={self.chunk}"
        support = f", support={self.support!r}" if self.shared_support else ""
        return f"TopK(ratio={self.ratio}, value_dtype={self.value_dtype!r}{chunk}{support})"

    @property
    def shared_support(self) -> bool:  # type: ignore[override]  # it depends on an argument
        """Whether the replicas of an exchange keep the same positions."""
        return self.support == "shared"

    @property
    def summand_dtype(self) -> tf.DType:
        """What values are summed as where the support is shared."""
        return tf.as_dtype(self.value_dtype)

    def num_kept(self, n: int) -> int:
        """Entries kept of `n`."""
        if self.chunk is None:
            return checks.num_kept(self.ratio, n)
        whole, rest = divmod(n, self.chunk)
        kept = whole * checks.num_kept(self.ratio, self.chunk)
        return kept + (checks.num_kept(self.ratio, rest) if rest else 0)

    def num_words(self, n: int) -> int:
        return self.bucket_words(Layout((n,)))

    def error_bound(self, n: int) -> float:
        # At least k/n of a chunk's squares are kept; of those, rounding leaves out its own share.
        lengths = (n,) if self.chunk is None else (min(n, self.chunk), n % self.chunk)
        share = min(checks.num_kept(self.ratio, m) / m for m in lengths if m)
        return 1 - share * (1 - self._format.error_bound(self.num_kept(n)))

    def bucket_words(self, layout):
        ks = self._kept(layout)
        if not sum(ks):
            return 0
        return positions.num_words(sum(ks), layout.size) + self._format.num_words(ks)

    def encode_bucket(self, x, layout, seed):
        return self._encode(x, layout)[0]

    def encode_bucket_with_residual(self, x, layout, seed):
        words, kept, body = self._encode(x, layout)
        sent = self._format.decode(body, self._kept(layout))
        return words, entries.subtract(x, kept, sent)

    def decode_bucket(self, words, layout):
        return self.decode_bucket_mean(words[None], layout)

    def decode_bucket_mean(self, words, layout):
        ks = self._kept(layout)
        head = positions.num_words(sum(ks), layout.size)
        kept = positions.decode(words[:, :head], sum(ks), layout.size)
        return entries.mean(kept, self._values(words, layout), layout.size)

    def encoded_finite(self, x, words, layout):
        # Whatever is not finite is the largest of its tensor.
        return numerics.finite(self._values(words[None], layout)[0])

    def mean_finite(self, mean, words, layout):
        world = words.shape[0]
        largest = numerics.largest_summand(tf.float32, world)
        return tf.reduce_all(tf.abs(self._values(words, layout)) <= largest)

    def encode_implementation(self, x, seed):
        return self.encode_bucket(x, Layout((x.shape[0],)), seed)

    def decode_implementation(self, words, n):
        return self.decode_bucket(words, Layout((n,)))

    def get_config(self):
        """The constructor's arguments, as earlier versions take them where they can."""
        config = super().get_config()
        added = {"chunk": None, "support": "own"}
        return {n: v for n, v in config.items() if n not in added or v != added[n]}

    def support_words(self, layout: Layout) -> int:
        """Words that `encode_support` returns."""
        kept = sum(self._kept(layout))
        return positions.num_words(kept, layout.size) if kept else 0

    def encode_support(self, x: tf.Tensor, layout: Layout) -> tf.Tensor:
        """Where the entries stand that are kept of float32[layout.size]: int32[support_words]."""
        if not layout.size:
            return tf.zeros([0], tf.int32)
        return positions.encode(self._select(x, layout)[0], layout.size)

    def decode_support(self, words: tf.Tensor, layout: Layout) -> tf.Tensor:
        """Their positions, int32[K], ascending: inverse of `encode_support`."""
        if not layout.size:
            return tf.zeros([0], tf.int32)
        return positions.decode(words[None], sum(self._kept(layout)), layout.size)[0]

    @property
    def _format(self) -> kept_values.ValueFormat:
        return kept_values.FORMATS[self.value_dtype]

    def _kept(self, layout):
        return tuple(self.num_kept(n) for n in layout.sizes)

    def _chunks(self, n):
        """Lengths of what is selected from by itself."""
        if self.chunk is None:
            return [n]
        rest = n % self.chunk
        return [self.chunk] * (n // self.chunk) + [rest] * (rest > 0)

    def _select(self, x, layout):
        """Positions int32[K] and values float32[K] of all that is kept."""
        chunks = tuple(length for n in layout.sizes for length in self._chunks(n))
        of_chunks = tuple(checks.num_kept(self.ratio, length) for length in chunks)
        return selection.largest_of_segments(x, chunks, of_chunks)

    def _encode(self, x, layout):
        """Words; positions int32[K] of all that is kept; the part of the words that has values."""
        kept, values = self._select(x, layout)
        body = self._format.encode(values, self._kept(layout))
        return tf.concat([positions.encode(kept, layout.size), body], 0), kept, body

    def _values(self, words, layout):
        """What W messages say of kept entries: int32[W, w] -> float32[W, K]."""
        ks = self._kept(layout)
        head = positions.num_words(sum(ks), layout.size)
        return tf.stack([self._format.decode(body, ks) for body in tf.unstack(words[:, head:])])
