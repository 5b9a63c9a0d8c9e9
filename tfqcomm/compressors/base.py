"""What a compressor is: a pure, stateless codec between a vector and words."""

from __future__ import annotations

import abc
import dataclasses
import zlib
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import tensorflow as tf

from tfqcomm.compressors import traced
from tfqcomm.kernels import numerics
from tfqcomm.kernels.layout import Layout

_UNROLLED = 8  # messages; more are added up in a loop


@dataclasses.dataclass(frozen=True)
class Compressor(abc.ABC):
    """Codec `float32[n] -> int32[w] -> float32[n]`.

    Subclasses are frozen dataclasses whose fields are their configuration. They implement
    `encode_implementation`, `decode_implementation` and `num_words` in graph code, and declare
    below what callers may rely on.
    """

    # Body words, bitcast to `sum_dtype`, may be summed over replicas by an all-reduce.
    linear: ClassVar[bool] = False
    # The mean of `decode(encode(x, seed))` over seeds is x.
    unbiased: ClassVar[bool] = False
    # `encode` does not use `seed`.
    deterministic: ClassVar[bool] = True
    # decode(encode(x)) is x to the bit: no residual is ever left.
    lossless: ClassVar[bool] = False
    # Keeps few entries: the mean of several messages has more, so it is not re-encoded.
    sparse: ClassVar[bool] = False
    # Every element is encoded by itself: several tensors in a row are as good as one.
    elementwise: ClassVar[bool] = False
    # XLA may compile it as a part of something larger: all shapes are known when it is traced.
    compilable: ClassVar[bool] = True
    # Where it is not: its bucket methods can be kernels of their own, quicker on a GPU alone.
    compiled_on_gpu: ClassVar[bool] = False
    # Used in an exchange, it keeps a number of entries that all replicas choose at every step.
    adaptive: ClassVar[bool] = False
    # Used in an exchange, it has one `scale` for all replicas, and sums of integer `levels`.
    integer: ClassVar[bool] = False
    # Used in an exchange, it sends factors of matrices, which are summed: tensors' shapes count.
    low_rank: ClassVar[bool] = False
    # Used in an exchange, one replica chooses entries for all, whose values are summed.
    shared_support: ClassVar[bool] = False
    # All that it says of an element is its sign, which may be voted about.
    signs: ClassVar[bool] = False
    # Linear codecs only: what the body is made of ...
    sum_dtype: ClassVar[tf.DType | None] = None
    # ... after this many leading words, equal on all replicas and not summed.
    header_words: ClassVar[int] = 0

    def encode(self, x, seed=0) -> tf.Tensor:
        """Compresses a vector.

        Args:
            x: float32[n], n >= 0 and known when traced. Other float dtypes are cast.
            seed: int, or int32[2] tensor. Where replicas must agree they pass the same.

        Returns:
            int32[w] with w = `num_words(n)`.

        Raises:
            ValueError: If `x` is not a vector of floats.
        """
        x = tf.convert_to_tensor(x)
        if not x.dtype.is_floating:
            raise ValueError(
                f"Argument `x` must be a tensor of floats. Received: x with dtype {x.dtype.name}"
            )
        if x.shape.rank != 1 or x.shape[0] is None:
            raise ValueError(
                "Argument `x` must be a vector (rank 1) of known length; reshape it to [-1] "
                f"first. Received: x with shape {x.shape}"
            )
        return traced.encoder(self, traced.length(x.shape[0]))(
            tf.cast(x, tf.float32), traced.seed_pair(seed)
        )

    def decode(self, words, n: int) -> tf.Tensor:
        """Restores the vector that `words` stands for.

        Args:
            words: int32[w] as `encode` returned it.
            n: Length of the vector that was encoded.

        Returns:
            float32[n]

        Raises:
            ValueError: If `words` has not the length that `n` elements take.
        """
        n = traced.length(n)
        words = tf.convert_to_tensor(words, tf.int32)
        if not words.shape.is_compatible_with([self.num_words(n)]):
            raise ValueError(
                f"Argument `words` must have shape ({self.num_words(n)},) for n={n}. "
                f"Received: words with shape {words.shape}"
            )
        return traced.decoder(self, n)(words)

    @abc.abstractmethod
    def num_words(self, n: int) -> int:
        """Words a vector of `n` elements takes; bytes on the wire are four times that."""

    def error_bound(self, n: int) -> float | None:
        """The q in ||C(x) - x||^2 <= q ||x||^2 for any x of `n` > 0 entries; None if unknown.

        Of a codec that rounds at random the mean over seeds; one that is unbiased calls it its
        variance, omega.
        """
        return None

    @property
    def contracts(self) -> bool:
        """Whether `error_bound` is below 1 for every n: then error feedback is right.

        A residual e of messages no longer than G stays below sqrt(q) / (1 - sqrt(q)) G. Where
        nothing is declared, error feedback is right for what is biased.
        """
        bound = self.error_bound(traced.MOST_ELEMENTS)
        return not self.unbiased if bound is None else bound < 1

    def damping(self, n: int) -> float:
        """The factor a for decoded vectors of `n` > 0 entries with which a C contracts.

        1 if C does so by itself, or if no factor helps; 1 / (1 + omega) where C is unbiased.
        """
        omega = self.error_bound(n)
        return 1.0 if self.contracts or not self.unbiased or omega is None else 1 / (1 + omega)

    def damped_error_bound(self, n: int) -> float | None:
        """The `error_bound` of `damping(n)` times C."""
        omega = self.error_bound(n)
        return omega if self.damping(n) == 1 or omega is None else omega / (1 + omega)

    def without_feedback(self) -> Compressor:
        """The codec to take where what is left out is lost: unbiased, if scaling makes it so."""
        return self

    def for_owner(self) -> Compressor:
        """The codec with which an owner encodes the mean of what this one has decoded."""
        return self

    def row(self, elements: int) -> int:
        """What tensors are padded to multiples of, in a bucket of so many elements."""
        return 1

    @property
    def fusable(self) -> bool:
        """Whether an exchange makes one XLA kernel of `encode_bucket` and what is around it.

        Not of what goes from tensor to tensor, as codecs do that know no buckets.
        """
        knows_buckets = type(self).encode_bucket is not Compressor.encode_bucket
        return self.compilable and (self.elementwise or knows_buckets)

    def kernel(
        self,
        function: Callable,
        n: int,
        *static: Hashable,
        fuse_from: int = numerics.FUSE_FROM,
    ) -> Callable:
        """`numerics.fuse`, where this codec allows it: `function` of `static`, then of the rest."""
        if self.fusable:
            return numerics.fuse(function, n, *static, fuse_from=fuse_from)
        fuse = numerics.fuse_on_gpu if self.compiled_on_gpu else numerics.op_by_op
        return fuse(function, n, *static)

    def bucket_words(self, layout: Layout) -> int:
        """Words that `encode_bucket` returns."""
        if self.elementwise:
            return self.num_words(layout.size)
        return sum(self.num_words(n) for n in layout.sizes)

    def encode_bucket(self, x: tf.Tensor, layout: Layout, seed: tf.Tensor) -> tf.Tensor:
        """Compresses several tensors at once, each with scales and a selection of its own.

        This one goes from tensor to tensor. Codecs override it with graph code whose size does not
        depend on how many there are.

        Args:
            x: float32[layout.size], zero where the layout has padding.
            layout: of the tensors, in rows of `row` elements.
            seed: int32[2].

        Returns:
            int32[bucket_words(layout)].
        """
        if self.elementwise:
            return self.encode_implementation(x, seed)
        words = []
        for index, vector in enumerate(layout.unpack(x)):
            words.append(self.encode(vector, _seed_of_tensor(self, seed, index)))
        return tf.concat(words, 0)

    def encode_bucket_with_residual(
        self, x: tf.Tensor, layout: Layout, seed: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """`encode_bucket`'s words, and what they leave out: float32[layout.size].

        Codecs that know where they have left out nothing save a pass over x.
        """
        words = self.encode_bucket(x, layout, seed)
        return words, x - self.decode_bucket(words, layout)

    def decode_bucket(self, words: tf.Tensor, layout: Layout) -> tf.Tensor:
        """Inverse of `encode_bucket`: int32[bucket_words(layout)] -> float32[layout.size].

        What stands in the padding has no meaning.
        """
        if self.elementwise:
            return self.decode_implementation(words, layout.size)
        parts = tf.split(words, [self.num_words(n) for n in layout.sizes])
        decoded = [self.decode(part, n) for part, n in zip(parts, layout.sizes, strict=True)]
        return layout.pack(decoded)

    def decode_bucket_mean(self, words: tf.Tensor, layout: Layout) -> tf.Tensor:
        """Mean of W messages, added in their order: int32[W, w] -> float32[layout.size].

        The fixed order is what keeps replicas on different machines equal to the bit.
        """
        world = words.shape[0]
        total = self.decode_bucket(words[0], layout)
        # Where these are ops TensorFlow would make one of three additions, in an order of its own.
        compiled = self.fusable and layout.size >= numerics.FUSE_FROM
        if 1 < world <= (_UNROLLED if compiled else 2):
            for other in range(1, world):
                total = total + self.decode_bucket(words[other], layout)
        elif world > 1:
            total = tf.foldl(
                lambda total, one: total + self.decode_bucket(one, layout),
                words[1:],
                initializer=total,
                parallel_iterations=1,
            )
        return total if world == 1 else total * (1 / world)

    def encoded_finite(self, x: tf.Tensor, words: tf.Tensor, layout: Layout) -> tf.Tensor:
        """Whether x, encoded as `words`, is finite: bool scalar.

        Codecs that can tell it from their words save a pass over x.
        """
        return numerics.finite(x)

    def mean_finite(self, mean: tf.Tensor, words: tf.Tensor, layout: Layout) -> tf.Tensor:
        """Whether the `mean` of int32[W, w] `words` is finite: bool scalar.

        Codecs may say no where finite messages are so large that their sum might not be.
        """
        return numerics.finite(mean)

    @abc.abstractmethod
    def encode_implementation(self, x: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Graph code of `encode`: x float32[n], n > 0; seed int32[2]."""

    @abc.abstractmethod
    def decode_implementation(self, words: tf.Tensor, n: int) -> tf.Tensor:
        """Graph code of `decode`: words int32[num_words(n)], n > 0."""

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Compressor:
        """Inverse of `get_config`."""
        return cls(**config)


def _seed_of_tensor(compressor: Compressor, seed: tf.Tensor, index: int) -> tf.Tensor:
    """Tensors of a bucket draw independently; whoever sends positions by seed, all the same."""
    return seed if compressor.deterministic else seed + [zlib.crc32(f"{index}".encode()) >> 1, 0]
