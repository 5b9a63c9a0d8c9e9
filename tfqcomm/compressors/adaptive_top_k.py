"""Adaptive top-k: the number of kept entries changes from step to step, under a budget."""

from __future__ import annotations

import dataclasses
import numbers
import re
from collections.abc import Mapping
from typing import ClassVar

import tensorflow as tf

from tfqcomm import checks
from tfqcomm.compressors.base import Compressor
from tfqcomm.compressors.ratio_schedule import RatioSchedule, Schedule, is_schedule
from tfqcomm.compressors.registry import register
from tfqcomm.kernels import entries, largest_entries, positions, selection, wire

RULES = ("norm", "norm_ef", "threshold", "fixed")
_UNITS = ("entries/step", "entries", "bytes/step", "Mbit")
_BUDGET = re.compile(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(\S+)\s*")


@register("adaptive_top_k")
@dataclasses.dataclass(frozen=True)
class AdaptiveTopK(Compressor):
    """Keeps more entries in steps that matter more, and as many as the budget allows in all.

    How many, all replicas decide together at every step: see `tfqcomm.aggregators.AdaptiveMean`,
    which spreads the budget over the entries of all compressed tensors, and over time. Used on
    its own, `encode` keeps the average number, as `TopK` does.

    Rules, with n_t the mean norm of what workers are about to send:

        "norm"       k_t ~ n_t, minimises the bound (d/k - 1) n^2
        "norm_ef"    k_t ~ n_t^(2/3), minimises 4 (1 - k/d) / (k/d)^2 n^2; for error feedback
        "threshold"  all entries above a threshold that the budget moves
        "fixed"      the same number at every step

    Args:
        budget: share of entries kept on average, in (0, 1]; or, with its unit, "500 entries/step",
            "20000 bytes/step" (of one worker's message), "1e6 entries" or "100 Mbit" (of one
            worker, in total; these need `steps`); or a `keras.optimizers.schedules` schedule of
            the share, from the number of exchanges so far, which needs rule "fixed".
        rule: as above.
        steps: of the whole training. With it, the budget is spent to the last entry; without, on
            average over any thousand steps.
        contraction: how much of an error at step t is left a step later, in (0, 1]: the weight of
            step t is contraction^(T - 1 - t). Below 1 it moves the budget to the end; needs
            `steps`.
        norm_decay: by what factor the norm is expected to fall at every step, in (0, 1]; needs
            `steps`.
        warm_up: first steps in which at least 25%, 6.25%, 1.56% and 0.39% of the entries are kept,
            for a quarter of them each; what exceeds an even share comes on top of the budget.

    Example:
    >>> AdaptiveTopK("500 entries/step").num_kept(10_000)
    500

    References:
        Ruan et al., "Adaptive Top-K in SGD for Communication-Efficient Distributed Learning",
        arXiv 2210.13532. The closed form of "norm" follows from the stated bound; that of the
        others is ours.
        Sahu et al., "Rethinking gradient sparsification as total error minimization",
        arXiv 2108.00951: a fixed threshold minimises the total error.
        Lin et al., "Deep Gradient Compression", arXiv 1712.01887: the warm-up.
    """

    # Once it is made a RatioSchedule in place of a schedule. Lower => more compression.
    budget: float | str | Schedule | RatioSchedule = 0.01
    _: dataclasses.KW_ONLY
    rule: str = "norm"
    steps: int | None = None
    contraction: float = 1.0
    norm_decay: float = 1.0
    warm_up: int = 0

    sparse: ClassVar[bool] = True
    compilable: ClassVar[bool] = False
    adaptive: ClassVar[bool] = True

    def __post_init__(self):
        checks.one_of("rule", self.rule, RULES)
        if is_schedule(self.budget) or isinstance(self.budget, Mapping):
            object.__setattr__(self, "budget", RatioSchedule.of(self.budget))
        if isinstance(self.budget, RatioSchedule):
            self._check_schedule()
            return
        checks.positive_integer_or_none("steps", self.steps)
        _, unit = _parse(self.budget)
        if self.steps is None and unit in ("entries", "Mbit"):
            raise ValueError(
                "Argument `steps` must be given with a budget in total. "
                f"Received: budget={self.budget!r}, steps=None"
            )
        whole = isinstance(self.warm_up, numbers.Integral) and not isinstance(self.warm_up, bool)
        if not whole or self.warm_up < 0:
            raise ValueError(
                "Argument `warm_up` must be a non-negative integer. "
                f"Received: warm_up={self.warm_up!r}"
            )
        for name in ("contraction", "norm_decay"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or not 0 < value <= 1:
                raise ValueError(
                    f"Argument `{name}` must be a number in (0, 1]. Received: {name}={value!r}"
                )
            if self.steps is None and value != 1:
                raise ValueError(
                    f"Argument `steps` must be given with `{name}`. "
                    f"Received: {name}={value!r}, steps=None"
                )

    def _check_schedule(self):
        """A schedule says all that there is to say."""
        alone = {"rule": "fixed", "steps": None, "contraction": 1, "norm_decay": 1, "warm_up": 0}
        for name, value in alone.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"Argument `{name}` must be {value!r} where the budget is a schedule. "
                    f"Received: {name}={getattr(self, name)!r}, budget={self.budget}"
                )

    @property
    def schedule(self) -> RatioSchedule | None:
        """Of the share of entries, if the budget is one."""
        return self.budget if isinstance(self.budget, RatioSchedule) else None

    def entries_per_step(self, n: int) -> float:
        """What the budget allows on average, of `n` entries; of a schedule what it begins with."""
        if self.schedule is not None:
            return min(max(self.schedule.first * n, 1.0), float(n))
        value, unit = _parse(self.budget)
        steps = self.steps or 1  # which a budget in total has
        if unit == "ratio":
            kept = value * n
        elif unit == "bytes/step":
            kept = _entries_of(8 * value, n)
        elif unit == "Mbit":
            kept = _entries_of(1e6 * value / steps, n)
        else:
            kept = value / (steps if unit == "entries" else 1)
        return min(max(kept, 1.0), float(n))

    def get_config(self):
        config = super().get_config()
        return config if self.schedule is None else config | {"budget": self.schedule.get_config()}

    def num_kept(self, n: int) -> int:
        """Entries kept of `n` on average."""
        return min(n, max(1, round(self.entries_per_step(n))))

    def num_words(self, n: int) -> int:
        return largest_entries.num_words(self.num_kept(n), n) if n else 0

    def error_bound(self, n: int) -> float:
        if self.schedule is not None:
            return 1 - 1 / n  # one entry is always kept
        return 1 - self.num_kept(n) / n

    def encode_implementation(self, x, seed):
        n = x.shape[0]
        kept, values = selection.largest(x, self.num_kept(n))
        return tf.concat([positions.encode(kept, n), wire.floats_to_words(values)], 0)

    def decode_implementation(self, words, n):
        k = self.num_kept(n)
        kept = positions.decode(words[None, :-k], k, n)[0]
        return entries.scatter(kept, wire.words_to_floats(words[-k:]), n)


def _entries_of(bits: float, n: int) -> float:
    """How many entries of `n` a message of so many bits has room for, at most all of them."""
    few, many = 1, n  # `bits` are enough for the first, or nothing is
    while few < many:
        middle = (few + many + 1) // 2
        enough = 32 * largest_entries.num_words(middle, n) <= bits
        few, many = (middle, many) if enough else (few, middle - 1)
    return float(few)


def _parse(budget) -> tuple[float, str]:
    """A number and its unit, "ratio" for a bare one."""
    if isinstance(budget, numbers.Real) and not isinstance(budget, bool) and 0 < float(budget) <= 1:
        return float(budget), "ratio"
    if isinstance(budget, str):
        match = _BUDGET.fullmatch(budget)
        if match and match[2] in _UNITS and float(match[1]) > 0:
            return float(match[1]), match[2]
    raise ValueError(
        "Argument `budget` must be a share of the entries in (0, 1], or a positive number with one "
        f"of the units {list(_UNITS)}, such as '20000 bytes/step', or a schedule of "
        f"`keras.optimizers.schedules`. Received: budget={budget!r}"
    )
