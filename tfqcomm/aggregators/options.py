"""How gradients are compressed: the arguments that strategies and optimizers have in common."""

from __future__ import annotations

import dataclasses

from tfqcomm import compressors
from tfqcomm.aggregators import schedule as schedules
from tfqcomm.compressors.base import Compressor

GRANULARITIES = ("tensor", "model")


@dataclasses.dataclass(frozen=True)
class ExchangeOptions:
    """Checked once, at construction.

    Attributes:
        compressor: the codec, its name or its config.
        error_feedback: add what compression left out to the next message.
        min_size: tensors with fewer elements, and those of rank <= 1, travel dense; higher =>
            less compression. 0 compresses everything, as the papers do.
        schedule: "auto", "dense", "all_gather" or "two_phase".
        granularity: "tensor" scales and selects within each tensor (the papers), "model" over
            all compressed tensors together.
        seed: of stochastic codecs.
        verify: compare the replicas' weights after the first step.
    """

    compressor: Compressor | str | dict | None
    error_feedback: bool = True
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
        for name, value in (("min_size", self.min_size), ("seed", self.seed)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(
                    f"Argument `{name}` must be a non-negative integer. Received: {name}={value!r}"
                )
        for name, value in (("error_feedback", self.error_feedback), ("verify", self.verify)):
            if not isinstance(value, bool):
                raise ValueError(f"Argument `{name}` must be a bool. Received: {name}={value!r}")

    def compresses(self, shape: tuple[int, ...], size: int) -> bool:
        """Whether a tensor of this shape is compressed."""
        return not self.compressor.lossless and self.reaches(shape, size)

    def reaches(self, shape: tuple[int, ...], size: int) -> bool:
        """Whether a tensor of this shape is large enough to be compressed."""
        return self.min_size == 0 or (len(shape) > 1 and size >= self.min_size)

    def facts(self) -> dict[str, str]:
        """What all workers must have in common, by name."""
        return {field.name: str(getattr(self, field.name)) for field in dataclasses.fields(self)}
