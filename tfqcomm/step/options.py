"""How gradients are compressed: the arguments that strategies and optimizers have in common."""

from __future__ import annotations

import dataclasses

from tfqcomm import compressors
from tfqcomm.aggregators import schedule as schedules
from tfqcomm.compressors import damped
from tfqcomm.compressors.base import Compressor

GRANULARITIES = ("tensor", "model")


@dataclasses.dataclass(frozen=True)
class ExchangeOptions:
    """Checked once, at construction.

    Attributes:
        compressor: the codec, its name or its config.
        error_feedback: add what compression left out to the next message. "auto" does so for
            codecs that contract; True also for others, whose decoded messages are then scaled down
            until they do; see `codec`.
        min_size: tensors with fewer elements, and those of rank <= 1, travel dense; higher =>
            less compression. 0 compresses everything, as the papers do.
        schedule: "auto", "dense", "all_gather" or "two_phase".
        granularity: "tensor" scales and selects within each tensor (the papers), "model" over
            all compressed tensors together.
        seed: of stochastic codecs.
        verify: compare the replicas' weights after the first step.
    """

    compressor: Compressor | str | dict | None
    error_feedback: bool | str = "auto"
    min_size: int = 1024
    schedule: str = "auto"
    granularity: str = "tensor"
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
        for name, value in (("min_size", self.min_size), ("seed", self.seed)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(
                    f"Argument `{name}` must be a non-negative integer. Received: {name}={value!r}"
                )
        if not isinstance(self.error_feedback, bool) and self.error_feedback != "auto":
            raise ValueError(
                "Argument `error_feedback` must be a bool or 'auto'. "
                f"Received: error_feedback={self.error_feedback!r}"
            )
        if not isinstance(self.verify, bool):
            raise ValueError(f"Argument `verify` must be a bool. Received: verify={self.verify!r}")

    @property
    def feedback(self) -> bool:
        """Whether there is error feedback: what `error_feedback` comes to."""
        automatic = self.error_feedback == "auto"
        return self.compressor.contracts if automatic else self.error_feedback

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

    def facts(self) -> dict[str, str]:
        """What all workers must have in common, by name."""
        facts = {field.name: str(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {**facts, "error_feedback": str(self.feedback)}
