"""From what the workers of `benchmarks.network` found to its rows, and its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tfqcomm
from benchmarks import workers

LOOPBACK = "loopback"
ALONE = "alone"


def alone_of(method: str) -> str:
    """The step of one worker that a method is compared with."""
    return workers.DDP_ALONE if method in workers.DDP else ALONE


def rows_of(methods: Sequence[str], found: Mapping[str, Sequence[Mapping]]) -> list[dict]:
    """A row for each method that has been timed: of its turns that of the median step.

    Args:
        methods: in the order of the rows.
        found: by method, steps alone too, what each turn found.
    """

    def middle(method):
        return sorted(found[method], key=lambda one: one["ms"])[len(found[method]) // 2]

    return [
        _row_of(middle(method), middle(alone_of(method)))
        | {"turns_ms": [one["ms"] for one in found[method]]}
        for method in methods
        if found[method]
    ]


def _row_of(found: Mapping, alone: Mapping) -> dict:
    """Adds what follows from a measurement and that of the step alone."""
    wire = 0.0
    if found["network"] != LOOPBACK:
        bits = 8 * max(found["sent"], found["received"])
        wire = 1e3 * bits / tfqcomm.launch.bits_per_second(found["network"])
    return {
        **found,
        "alone_ms": alone["ms"],
        "alone_processor_ms": alone["processor_ms"],
        "wire_ms": wire,
        "ratio": found["ms"] / max(alone["ms"], wire),
        "utilisation": alone["ms"] / found["ms"],
        "processor_ratio": found["processor_ms"] / alone["processor_ms"],
    }


def table(rows: Sequence[Mapping]) -> str:
    """In Markdown."""
    header = ["network", "method", "MB sent", "alone, ms", "wire, ms", "step, ms", "ratio"]
    lines = [[*header, "utilisation", "processor"], ["---", "---", *["---:"] * 7]]
    for r in rows:
        cells = [r["network"], r["method"], f"{r['sent'] / 1e6:.2f}", f"{r['alone_ms']:.0f}"]
        cells += [f"{r['wire_ms']:.0f}", f"{r['ms']:.0f}", f"{r['ratio']:.2f}"]
        lines.append([*cells, f"{r['utilisation']:.0%}", f"{r['processor_ratio']:.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
