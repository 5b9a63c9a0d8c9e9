"""When each bucket travels, beside the backward pass: a trace of real steps of two workers.

    python -m benchmarks.trace --network=1gbit --compressor=block_sign

The network, the model and the workers are those of `benchmarks.network`. TensorFlow's profiler
records the first worker's steps, and from its trace is told, for every payload of a step,

    start      when its collective began, from the beginning of the backward pass on
    in flight  how long it took, the wait for the other worker included
    hidden     the part of that in which this worker computed
    to come    gradients that were still to be computed when it began, in ms of the backward pass

in ms, each the median over the steps. Prints a table in Markdown, and draws the last step.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import dataclasses
import pathlib
import re
import sys
import tempfile

import numpy as np
import tensorflow as tf
from absl import app, flags
from tensorflow.tsl.profiler.protobuf import xplane_pb2

import tfqcomm
from benchmarks import network, workers

OPERATION = re.compile(r"[^:]+:[A-Z_]\w*|CpuExecutable::ExecuteAsyncOnStream")
PAYLOAD = re.compile(r"sgd/.*:Collective\w+")  # made under the optimizer's name
GRADIENT = "gradient_tape/"
WARM_UP = 100  # steps before the trace: by then TensorFlow knows which operations are quick

FLAGS = flags.FLAGS
flags.DEFINE_string("network", "1gbit", "Bandwidth of each worker, or loopback.")
flags.DEFINE_string("compressor", "block_sign", "Its name, or dense.")
flags.DEFINE_integer("steps", 10, "Traced steps.", lower_bound=1)
flags.DEFINE_string("plot", "runs/trace.png", "File for the drawing of the last step.")
flags.DEFINE_string("trace", None, "Directory for the trace; be a worker, not for users.")


@dataclasses.dataclass(frozen=True)
class Span:
    """When something ran, in ms."""

    name: str
    step: int  # of collectives: TensorFlow's number of the step, 0 of other operations
    start: float
    end: float


def work() -> None:
    """One worker; the first one is traced."""
    task = workers.begin()
    compressor = None if FLAGS.compressor == network.DENSE else FLAGS.compressor
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy(compressor)
    with strategy.scope():
        model = network.compiled()
    x, y = workers.noise(model, network.BATCH * strategy.num_replicas_in_sync)
    dataset = tf.data.Dataset.from_tensors((x, y)).repeat()
    model.fit(dataset, steps_per_epoch=WARM_UP, verbose=0, shuffle=False)
    if task == 0:
        tf.profiler.experimental.start(FLAGS.trace)
    model.fit(dataset, steps_per_epoch=FLAGS.steps, verbose=0, shuffle=False)
    if task == 0:
        tf.profiler.experimental.stop()


def record(directory: str) -> list[Span]:
    """Starts the workers; returns what the first one ran."""
    command = [sys.executable, "-m", "tfqcomm.launch", "--workers=2"]
    if FLAGS.network != network.LOOPBACK:
        command.append(f"--bandwidth={FLAGS.network}")
    command += ["-m", "benchmarks.trace", *sys.argv[1:], f"--trace={directory}"]
    workers.run(command)
    (path,) = pathlib.Path(directory).rglob("*.xplane.pb")
    space = xplane_pb2.XSpace()
    space.ParseFromString(path.read_bytes())
    spans = []
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                name = plane.event_metadata[event.metadata_id].name
                stats = {plane.stat_metadata[s.metadata_id].name: s for s in event.stats}
                step = stats["step_id"].int64_value if "step_id" in stats else 0
                start = line.timestamp_ns / 1e6 + event.offset_ps / 1e9
                if OPERATION.fullmatch(name):
                    spans.append(Span(name, step, start, start + event.duration_ps / 1e9))
    return sorted(spans, key=lambda span: span.start)


@dataclasses.dataclass(frozen=True)
class Step:
    """A step from its first gradient on.

    Attributes:
        payloads: their collectives, in the order in which they began.
        gradients: operations of the backward pass.
        computing: all operations but the collectives.
    """

    payloads: list[Span]
    gradients: list[Span]
    computing: list[Span]

    @property
    def start(self) -> float:
        """Of the backward pass."""
        return self.gradients[0].start

    def row(self, payload: Span) -> tuple[float, float, float, float]:
        """Start, in flight, hidden, to come: of a payload, in ms."""
        to_come = covered(self.gradients, payload.start, self.gradients[-1].end)
        hidden = covered(self.computing, payload.start, payload.end)
        return payload.start - self.start, payload.end - payload.start, hidden, to_come


def steps_of(spans: list[Span]) -> list[Step]:
    """The steps that were traced whole."""
    payloads: dict[int, list[Span]] = {}
    for span in spans:
        if PAYLOAD.fullmatch(span.name):
            payloads.setdefault(span.step, []).append(span)
    steps, before = [], -np.inf
    for own in payloads.values():
        during = [span for span in spans if before < span.start < own[-1].end]
        computing = [span for span in during if ":Collective" not in span.name]
        gradients = [span for span in computing if span.name.startswith(GRADIENT)]
        steps.append(Step(own, gradients, computing))
        before = own[-1].end
    return [step for step in steps if step.gradients]


def covered(spans: list[Span], start: float, end: float) -> float:
    """Milliseconds between `start` and `end` in which at least one of these ran."""
    total = 0.0
    for span in sorted(spans, key=lambda span: span.start):
        total += max(min(span.end, end) - max(span.start, start), 0.0)
        start = max(start, span.end)
    return total


def table(steps: list[Step]) -> str:
    """In Markdown, the median over the steps."""
    lines = [["payload", "start", "in flight", "hidden", "to come"], ["---", *["---:"] * 4]]
    rows = np.array([[step.row(payload) for payload in step.payloads] for step in steps])
    for number, row in enumerate(np.median(rows, axis=0), start=1):
        lines.append([str(number), *(f"{value:.1f}" for value in row)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(step: Step, path: pathlib.Path) -> None:
    """The step as bars: what is computed, and what is in flight."""
    import matplotlib.pyplot as plt  # the text does without

    others = [span for span in step.computing if span.start > step.start]
    kinds = {"forward, kernels, update": others, "gradients": step.gradients}
    kinds |= {f"payload {number}": [one] for number, one in enumerate(step.payloads, start=1)}
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(kinds) + 1))
    for height, spans in enumerate(kinds.values()):
        axes.broken_barh([(s.start - step.start, s.end - s.start) for s in spans], (height, 0.8))
    axes.set_yticks([height + 0.4 for height in range(len(kinds))], kinds)
    axes.invert_yaxis()
    axes.set_xlabel("ms since the backward pass began")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")


def main(_):
    """Traces, or is one of the workers."""
    if FLAGS.trace:
        work()
        return
    with tempfile.TemporaryDirectory() as directory:
        steps = steps_of(record(directory))
    print(f"{FLAGS.compressor}, {FLAGS.network}, ms, median of {len(steps)} steps\n")
    print(table(steps))
    draw(steps[-1], pathlib.Path(FLAGS.plot))


if __name__ == "__main__":
    app.run(main)
