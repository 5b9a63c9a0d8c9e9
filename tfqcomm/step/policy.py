"""A policy: which compressor a variable's gradient gets, by the variable's path."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from tfqcomm import compressors
from tfqcomm.compressors.base import Compressor

EVERYTHING = "*"  # the pattern of what no pattern before it takes


@dataclasses.dataclass(frozen=True)
class Policy:
    """Rules, of which the first that matches counts; what none matches is not compressed.

    Attributes:
        rules: (regular expression of the whole path, or "*"; compressor), in order.
    """

    rules: tuple[tuple[str, Compressor], ...]

    @classmethod
    def of(cls, mapping: Mapping) -> Policy:
        """The policy that a user wrote as a dictionary: pattern -> what `compressors.get` takes.

        Raises:
            ValueError: for what is none.
        """
        if not mapping:
            raise ValueError(
                "Argument `compressor`, as a policy, must have patterns. Received: compressor={}"
            )
        for pattern in mapping:
            _check_pattern(pattern, mapping)
        policy = cls(tuple((p, compressors.get(value)) for p, value in mapping.items()))
        for kind in ("adaptive", "low_rank"):  # each keeps one state for all that it compresses
            different = {c for c in policy.compressors if getattr(c, kind)}
            if len(different) > 1:
                raise ValueError(
                    "Argument `compressor` must not mix different adaptive compressors, nor "
                    "different ones of low rank: use the same for all patterns that take one. "
                    f"Received: compressor={policy}"
                )
        return policy

    @property
    def compressors(self) -> list[Compressor]:
        """Those of all rules."""
        return [compressor for _, compressor in self.rules]

    def rule_for(self, path: str) -> int | None:
        """The place of the rule that takes a variable of this path; None if there is none."""
        for place, (pattern, _) in enumerate(self.rules):
            if pattern == EVERYTHING or re.fullmatch(pattern, path):
                return place
        return None

    def compressor_for(self, path: str) -> Compressor:
        """What compresses the gradient of a variable of this path."""
        place = self.rule_for(path)
        return compressors.get(None) if place is None else self.rules[place][1]

    def idle(self, paths: Iterable[str]) -> list[str]:
        """The patterns that take none of these; "*" may."""
        taken = {self.rule_for(path) for path in paths}
        return [p for i, (p, _) in enumerate(self.rules) if i not in taken and p != EVERYTHING]

    def get_config(self) -> dict:
        """What `of` makes the same policy of, serializable."""
        return {pattern: compressors.serialize(c) for pattern, c in self.rules}

    @property
    def compilable(self) -> bool:
        """Whether XLA compiles all of them."""
        return all(compressor.compilable for compressor in self.compressors)

    @property
    def adaptive(self) -> bool:
        """Whether any of them is."""
        return any(compressor.adaptive for compressor in self.compressors)

    def __str__(self) -> str:
        rules = [f"{pattern!r}: {compressor}" for pattern, compressor in self.rules]
        return f"{{{', '.join(rules)}}}"


def get(identifier) -> Compressor | Policy:
    """What `identifier` stands for: as `compressors.get`, and a policy for other dictionaries."""
    if isinstance(identifier, Policy):
        return identifier
    if isinstance(identifier, Mapping) and "class_name" not in identifier:
        return Policy.of(identifier)
    return compressors.get(identifier)


def _check_pattern(pattern, mapping):
    last = list(mapping)[-1]
    try:
        valid = pattern == EVERYTHING or bool(re.compile(pattern))
    except (re.error, TypeError):
        valid = False
    if not valid:
        raise ValueError(
            "Argument `compressor`, as a policy, must map regular expressions of variables' paths, "
            f"or '*', to compressors. Received: compressor with the pattern {pattern!r}"
        )
    if pattern == EVERYTHING and pattern != last:
        raise ValueError(
            "Argument `compressor`, as a policy, must have the pattern '*' at its end: the first "
            f"match counts. Received: compressor with the patterns {list(mapping)}"
        )
