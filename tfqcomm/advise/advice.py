"""What was found for a model, as rows to read, a table to print, and a sentence."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from tfqcomm.compressors.base import Compressor
from tfqcomm.costs.prediction import Bucket, Compute, Link, Prediction, predict

WORTH_IT = 1.05  # times as fast as dense: below it the difference is not worth a lossy exchange
DENSE = "no compressor"


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to exchange the gradients, measured.

    Attributes:
        compressor: None for dense training.
        schedule: as the strategies take it; None for dense training.
        buckets: as they are sent.
    """

    compressor: Compressor | None
    schedule: str | None
    buckets: tuple[Bucket, ...]

    def __str__(self) -> str:
        return DENSE if self.compressor is None else str(self.compressor)


@dataclasses.dataclass(frozen=True)
class Row:
    """A way to exchange the gradients, and what is predicted of it.

    Attributes:
        method: the compressor and its schedule.
        prediction: seconds, bytes, and what they are made of.
    """

    method: Method
    prediction: Prediction


@dataclasses.dataclass(frozen=True)
class Advice:
    """What `report` found; `print` shows it.

    Attributes:
        model: its name.
        parameters: elements of its gradients.
        workers: what was asked for, W.
        compute: a step of one worker alone.
        link: between the workers.
        origin: where the link's figures come from.
        methods: all that were measured.
        software: the link without its network, where that is known.
    """

    model: str
    parameters: int
    workers: int
    compute: Compute
    link: Link
    origin: str
    methods: tuple[Method, ...]
    software: Link | None = None

    def rows(self, workers: int | None = None, link: Link | None = None) -> list[Row]:
        """All methods, the fastest first.

        Args:
            workers: W; what was asked for by default, any other number is as good.
            link: another one.
        """
        world = self.workers if workers is None else workers
        rows = [
            Row(m, predict(self.compute, m.buckets, link or self.link, world)) for m in self.methods
        ]
        return sorted(rows, key=lambda row: row.prediction.seconds)

    def dense(self, workers: int | None = None, link: Link | None = None) -> Row:
        """The row of dense training."""
        return next(row for row in self.rows(workers, link) if row.method.compressor is None)

    def best(self, workers: int | None = None, link: Link | None = None) -> Row:
        """The fastest; dense training, where nothing else is 5% faster."""
        first, dense = self.rows(workers, link)[0], self.dense(workers, link)
        return first if dense.prediction.seconds > WORTH_IT * first.prediction.seconds else dense

    def sentence(self) -> str:
        """What to take."""
        best, dense = self.best(), self.dense()
        took = f"{_milliseconds(dense.prediction.seconds)} ms a step on {self.workers} workers"
        if best.method.compressor is None:
            return f"Dense is faster here: {took}, and no compressor gains 5%. Take none."
        ratio = dense.prediction.seconds / best.prediction.seconds
        return (
            f"Take {best.method}, schedule={best.method.schedule!r}: "
            f"{_milliseconds(best.prediction.seconds)} ms a step on {self.workers} workers. "
            f"Dense training takes {_milliseconds(dense.prediction.seconds)} ms, {ratio:.1f} times "
            "as long. This is about time alone: docs/choosing.md says what each loses."
        )

    def table(self, workers: int | None = None) -> str:
        """In Markdown: all methods by time.

        Args:
            workers: W; what was asked for by default.
        """
        world = self.workers if workers is None else workers
        header = [f"{world} workers", "schedule", "MB sent", "step, ms", "of it: compute", "codec"]
        lines = [[*header, "link", "link, hidden"], ["---", "---", *["---:"] * 6]]
        for row in self.rows(world):
            p = row.prediction
            parts = (p.seconds, self.compute.seconds, p.codec_seconds, p.link_seconds)
            cells = [*map(_milliseconds, (*parts, p.hidden_seconds))]
            name, schedule = f"`{row.method}`", row.method.schedule or "dense"
            if row.method.compressor is None:
                name = DENSE
            lines.append([name, schedule, f"{p.bytes_sent / 1e6:.2f}", *cells])
        return _markdown(lines)

    def scaling(self, worlds: Sequence[int]) -> str:
        """In Markdown: the best for each number of workers, beside dense training."""
        lines = [["workers", "take", "schedule", "MB sent", "step, ms", "dense, MB", "dense, ms"]]
        lines.append(["---:", "---", "---", *["---:"] * 4])
        for world in worlds:
            best, dense = self.best(world), self.dense(world)
            cells = [str(world), str(best.method), best.method.schedule or "dense"]
            for p in (best.prediction, dense.prediction):
                cells += [f"{p.bytes_sent / 1e6:.2f}", _milliseconds(p.seconds)]
            lines.append(cells)
        return _markdown(lines)

    def utilisation(self, links: Mapping[str, Link], periods: Sequence[int]) -> str:
        """In Markdown: the step of one worker alone over the step, in %, on several links.

        For dense training, for the best method on each link, and for the exchange of models every
        H steps (`optimizers.DiLoCo`, without overlap), dense and with the fastest method.

        Args:
            links: by name.
            periods: H, 2 or more.
        """
        lines = [[f"{self.workers} workers", *links], ["---", *["---:"] * len(links)]]
        ways: dict[str, Callable[[Link], float]] = {
            "dense, every step": lambda link: self.dense(link=link).prediction.seconds,
            "the best, every step": lambda link: self.best(link=link).prediction.seconds,
        }
        for period in periods:
            ways[f"models, dense, H = {period}"] = functools.partial(
                self._step_between, period, [m for m in self.methods if m.compressor is None]
            )
            ways[f"models, the best, H = {period}"] = functools.partial(
                self._step_between, period, self.methods
            )
        for name, step in ways.items():
            shares = (self.compute.seconds / step(link) for link in links.values())
            lines.append([name, *(f"{100 * share:.3g}" for share in shares)])
        return _markdown(lines)

    def _step_between(self, period: int, methods: Sequence[Method], link: Link) -> float:
        """Seconds of a step on average, with an exchange after every so many."""
        exchanges = []
        for method in methods:
            found = predict(self.compute, method.buckets, link, self.workers)
            exchanges.append(found.link_seconds + found.codec_seconds)
        return self.compute.seconds + min(exchanges) / period

    def __str__(self) -> str:
        c = self.compute
        parts = [_milliseconds(s) for s in (c.seconds, c.forward, c.backward, c.update)]
        return (
            f"Model {self.model!r}: {self.parameters:,} gradient elements, a step of one worker "
            "alone {} ms (forward {}, backward {}, update {})\n".format(*parts)
            + f"Link: {self.origin}\n\n{self.table()}\n\n{self.sentence()}"
        )


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
