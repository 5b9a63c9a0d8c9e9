"""How gradients are compressed: the arguments that strategies and optimizers have in common."""

from __future__ import annotations

import dataclasses

from tfqcomm import checks, compressors
from tfqcomm.aggregators import schedule as schedules
from tfqcomm.compressors import damped
from tfqcomm.compressors.base import Compressor

GRANULARITIES = ("tensor", "model")


@dataclasses.dataclass(frozen=True)
class ExchangeOptions:
    """Checked once, at construction.

    Constructors that take these as `**options` show them in their own docstrings, as they are
    described here: see `shared_arguments`.

    Attributes:
        compressor: a `tfqcomm.compressors.Compressor`, its name or its config.
        error_feedback: add what compression left out to the next message. "auto" does so where it
            converges: for compressors whose error is always smaller than what they compress. True
            does so for the others, too ("qsgd" with few bits, "ternary"), and scales what they
            decode down until it converges; False loses what compression leaves out.
        min_size: tensors with fewer elements, and those of rank <= 1, travel dense, fused into one
            buffer; higher => less compression. 0 compresses everything, as the papers do.
        schedule: "auto" (the one that sends the fewest bytes), "dense", "all_gather" or
            "two_phase".
        granularity: what a scale, a threshold or a top-k ranges over: "tensor" for each by itself,
            as in the papers, or "model" for all compressed tensors together.
        bucket_mb: megabytes of float32 that are encoded and sent at once, while the gradients of
            the next bucket are computed; larger => fewer messages, less of it hidden.
        seed: of stochastic compressors.
        verify: compare the replicas' weights after the first step.
    """

    compressor: Compressor  # once it is made: `compressors.get` takes its name or config, too
    error_feedback: bool | str = "auto"
    min_size: int = 1024
    schedule: str = "auto"
    granularity: str = "tensor"
    bucket_mb: float = 32.0
    seed: int = 0
    verify: bool = True

    def __post_init__(self):
        object.__setattr__(self, "compressor", compressors.get(self.compressor))
        schedules.check(self.schedule, self.compressor)
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"Argument `granularity` must be one of {GRANULARITIES}. "
                f"Received: granularity={self.granularity!r}"
            )
        if self.compressor.low_rank and self.granularity != "tensor":
            raise ValueError(
                "Argument `granularity` must be 'tensor' for a compressor of low rank: each tensor "
                f"is a matrix. Received: granularity={self.granularity!r}, "
                f"compressor={self.compressor}"
            )
        checks.non_negative_integer("min_size", self.min_size)
        checks.non_negative_integer("seed", self.seed)
        checks.positive("bucket_mb", self.bucket_mb)
        if not isinstance(self.error_feedback, bool) and self.error_feedback != "auto":
            raise ValueError(
                "Argument `error_feedback` must be a bool or 'auto'. "
                f"Received: error_feedback={self.error_feedback!r}"
            )
        checks.boolean("verify", self.verify)

    @property
    def feedback(self) -> bool:
        """Whether there is error feedback: what `error_feedback` comes to."""
        automatic = self.error_feedback == "auto"
        return self.compressor.contracts if automatic else bool(self.error_feedback)

    @property
    def codec(self) -> Compressor:
        """What messages are encoded with: `compressor`, scaled as error feedback needs it."""
        return damped.for_exchange(self.compressor, self.feedback)

    def compresses(self, shape: tuple[int, ...], size: int) -> bool:
        """Whether a tensor of this shape is compressed."""
        return not self.compressor.lossless and self.reaches(shape, size)

    def reaches(self, shape: tuple[int, ...], size: int) -> bool:
        """Whether a tensor of this shape is large enough to be compressed."""
        return self.min_size == 0 or (len(shape) > 1 and size >= self.min_size)

    def get_config(self) -> dict:
        """Arguments that make the same options, serializable."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "compressor": compressors.serialize(self.compressor)}

    def facts(self) -> dict[str, str]:
        """What all workers must have in common, by name."""
        facts = {field.name: str(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {**facts, "error_feedback": str(self.feedback)}
