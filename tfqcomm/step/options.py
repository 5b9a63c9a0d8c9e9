"""How gradients are compressed: the arguments that strategies and optimizers have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import tensorflow as tf

from tfqcomm import checks, compressors
from tfqcomm.aggregators import schedule as schedules
from tfqcomm.compressors import damped
from tfqcomm.compressors.base import Compressor
from tfqcomm.kernels.rows import ROW_TYPES
from tfqcomm.step import policy
from tfqcomm.step.policy import Policy

GRANULARITIES = ("tensor", "model")

# What a policy has to say of rows: these can travel as the codec's own numbers do.
_ROWS_LIKE = {compressors.BFloat16(): "bfloat16", compressors.BlockInt8(): "int8"}


@dataclasses.dataclass(frozen=True)
class ExchangeOptions:
    """Checked once, at construction.

    Constructors that take these as `**options` show them in their own docstrings, as they are
    described here: see `shared_arguments`.

    Attributes:
        compressor: a `tfqcomm.compressors.Compressor`, its name or its config; or a policy,
            `{".*kernel": "top_k", "*": None}`: regular expressions of variables' whole paths, of
            which the first that matches counts. "*" is all others; None sends float32.
        error_feedback: add what compression left out to the next message. "auto" does so where it
            converges: for compressors whose error is always smaller than what they compress. True
            does so for the others, too ("qsgd" with few bits, "ternary"), and scales what they
            decode down until it converges; False loses what compression leaves out.
        residual_decay: what is owed is multiplied by this in every exchange; lower => what was left
            out long ago counts less. 1 forgets nothing.
        scale_residual: multiply what is owed by the old learning rate over the new one where the
            rate changes, so that it moves the weights as far as it would have.
        min_size: tensors with fewer elements, and those of rank <= 1, travel dense, fused into one
            buffer; higher => less compression. 0 compresses everything, as the papers do.
        schedule: "auto" (the one that sends the fewest bytes), "dense", "all_gather", "two_phase";
            or, for "block_sign" without error feedback, "majority_vote".
        hierarchical: average the messages of a process' replicas as they are, and compress what
            processes send to one another: fewer bytes where a process has several devices. Within
            a single process nothing is compressed.
        granularity: what a scale, a threshold or a top-k ranges over: "tensor" for each by itself,
            as in the papers, or "model" for all compressed tensors together.
        embedding_rows: what the rows of an embedding's gradient travel as: "float32", "bfloat16",
            or "int8" with a scale for each row; with the last two each row once. What rounding
            takes away is lost: there is no error feedback for rows. A policy that gives a table
            "bfloat16" or "block_int8" says it for that table.
        bucket_mb: megabytes of float32 that are encoded and sent at once, while the gradients of
            the next bucket are computed; larger => fewer messages, less of it hidden.
        warm_up: the first so many steps send float32, and compress nothing; higher => a safer
            start, in which gradients are large and change quickly.
        accumulate: batches of a replica whose gradients are added up for one exchange and one
            update; higher => less traffic, and a batch that is so many times larger. The
            optimizer's `iterations` counts exchanges.
        seed: of stochastic compressors.
        verify: compare the replicas' weights after the first step.
    """

    compressor: Compressor | Policy  # once it is made: also its name, its config or a dictionary
    error_feedback: bool | str = "auto"
    residual_decay: float = 1.0
    scale_residual: bool = False
    min_size: int = 1024
    schedule: str = "auto"
    hierarchical: bool = False
    granularity: str = "tensor"
    embedding_rows: str = "float32"
    bucket_mb: float = 32.0
    warm_up: int = 0
    accumulate: int = 1
    seed: int = 0
    verify: bool = True

    def __post_init__(self):
        object.__setattr__(self, "compressor", policy.get(self.compressor))
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"Argument `granularity` must be one of {GRANULARITIES}. "
                f"Received: granularity={self.granularity!r}"
            )
        checks.one_of("embedding_rows", self.embedding_rows, ROW_TYPES)
        checks.non_negative_integer("min_size", self.min_size)
        checks.non_negative_integer("warm_up", self.warm_up)
        checks.positive_integer("accumulate", self.accumulate)
        checks.non_negative_integer("seed", self.seed)
        checks.positive("bucket_mb", self.bucket_mb)
        if not isinstance(self.error_feedback, bool) and self.error_feedback != "auto":
            raise ValueError(
                "Argument `error_feedback` must be a bool or 'auto'. "
                f"Received: error_feedback={self.error_feedback!r}"
            )
        checks.ratio(self.residual_decay, "residual_decay")
        checks.boolean("scale_residual", self.scale_residual)
        checks.boolean("hierarchical", self.hierarchical)
        checks.boolean("verify", self.verify)
        if isinstance(self.compressor, Policy):
            for compressor in self.compressor.compressors:
                self._with(compressor)  # says what does not fit
        else:
            self._check(self.compressor)

    def _check(self, compressor):
        schedules.check(self.schedule, compressor)
        if self.schedule == "majority_vote" and self.error_feedback is True:
            raise ValueError(
                "Argument `error_feedback` must be 'auto' or False with "
                "schedule='majority_vote': what a vote overrules cannot be sent later. "
                f"Received: error_feedback={self.error_feedback!r}"
            )
        if compressor.low_rank and self.granularity != "tensor":
            raise ValueError(
                "Argument `granularity` must be 'tensor' for a compressor of low rank: each tensor "
                f"is a matrix. Received: granularity={self.granularity!r}, "
                f"compressor={compressor}"
            )

    def for_path(self, path: str) -> ExchangeOptions:
        """Those of one variable: with the compressor that a policy gives it."""
        if not isinstance(self.compressor, Policy):
            return self
        return self._with(self.compressor.compressor_for(path))

    def _with(self, compressor):
        return dataclasses.replace(
            self,
            compressor=compressor,
            schedule="auto" if compressor.lossless else self.schedule,
            embedding_rows=_ROWS_LIKE.get(compressor, self.embedding_rows),
        )

    @property
    def one_compressor(self) -> Compressor:
        """The compressor, of options that have no policy: those `for_path`."""
        if isinstance(self.compressor, Policy):
            raise TypeError(f"Each variable has a compressor of its own: {self.compressor}")
        return self.compressor

    @property
    def feedback(self) -> bool:
        """Whether there is error feedback: what `error_feedback` comes to."""
        if self.error_feedback == "auto":
            return self.one_compressor.contracts and self.schedule != "majority_vote"
        return bool(self.error_feedback)

    @property
    def codec(self) -> Compressor:
        """What messages are encoded with: `compressor`, scaled as error feedback needs it."""
        return damped.for_exchange(self.one_compressor, self.feedback)

    def compresses(self, shape: tuple[int, ...], size: int) -> bool:
        """Whether a tensor of this shape is compressed."""
        return not self.one_compressor.lossless and self.reaches(shape, size)

    def reaches(self, shape: tuple[int, ...], size: int) -> bool:
        """Whether a tensor of this shape is large enough to be compressed."""
        return self.min_size == 0 or (len(shape) > 1 and size >= self.min_size)

    @property
    def rows_each_once(self) -> bool:
        """Whether duplicates among the rows of embeddings are summed before they travel."""
        return self.embedding_rows != "float32" or self.accumulate > 1

    def after_warm_up(self, steps: tf.Tensor) -> Callable[[], tf.Tensor] | None:
        """What `GradientExchange.reduce` takes as `compresses`, where there is a warm-up.

        Args:
            steps: int scalar, taken so far; a step that is skipped does not count.
        """
        return (lambda: tf.convert_to_tensor(steps) >= self.warm_up) if self.warm_up else None

    def get_config(self) -> dict:
        """Arguments that make the same options, serializable."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if isinstance(self.compressor, Policy):
            return {**values, "compressor": self.compressor.get_config()}
        return {**values, "compressor": compressors.serialize(self.compressor)}

    def facts(self, paths: Iterable[str]) -> dict[str, str]:
        """What all workers must have in common, by name.

        Args:
            paths: of the variables. A worker may have other names for them, and so others match.
        """
        facts = {field.name: str(getattr(self, field.name)) for field in dataclasses.fields(self)}
        if isinstance(self.compressor, Policy):
            taken = [self.for_path(path).compressor for path in paths]
            return facts | {f"compressor of variable {i}": str(c) for i, c in enumerate(taken)}
        return {**facts, "error_feedback": str(self.feedback)}
