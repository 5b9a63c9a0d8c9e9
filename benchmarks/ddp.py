"""A worker that trains a model of `benchmarks.network` under PyTorch's DDP, and times its steps.

    python -m benchmarks.network --methods=dense,top_k,ddp,ddp_power_sgd_4

starts it: with the extra `peers`, which is PyTorch. The same Keras model, on Keras' torch backend,
with batches of the same size, in the same network and run.
"""

import os

os.environ["KERAS_BACKEND"] = "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # Keras looks for TensorFlow all the same

import time

import keras
import numpy as np
import torch
from absl import app, flags

import models
from benchmarks import ddp_workers, workers

WARM_UP = 4  # steps: DDP lays its buckets out anew in the second, PowerSGD begins in the third

FLAGS = flags.FLAGS
flags.DEFINE_enum("method", None, [workers.DDP_ALONE, *workers.DDP], "What is sent.", required=True)
flags.DEFINE_list("units", None, "Of the perceptron, input and output too.", required=True)
flags.DEFINE_string("model", None, "A function of `models`, in place of the perceptron.")
flags.DEFINE_integer("batch", None, "Examples per worker.", required=True)
flags.DEFINE_float("seconds", None, "To time the steps for.", required=True)
flags.DEFINE_list("limits", None, "Fewest and most steps.", required=True)
flags.DEFINE_string("interface", None, "Whose bytes are counted.", required=True)
flags.DEFINE_string("results", None, "Directory for what the workers find.", required=True)


def built() -> keras.Model:
    """As that of `benchmarks.network`."""
    keras.utils.set_random_seed(0)
    if FLAGS.model:
        return getattr(models, FLAGS.model)()
    first, *hidden, last = map(int, FLAGS.units)
    return models.mlp([first], last, hidden)


def agreed(steps: float) -> int:
    """The first worker's number of steps, within limits."""
    fewest, most = map(int, FLAGS.limits)
    steps = torch.tensor([min(max(int(steps), fewest), most)])
    torch.distributed.broadcast(steps, 0)
    return int(steps)


def main(_):
    """Times steps and counts bytes, as `benchmarks.network` does."""
    task = ddp_workers.join(FLAGS.interface)
    model = built()
    module = (
        model if FLAGS.method == workers.DDP_ALONE else ddp_workers.parallel(model, FLAGS.method)
    )
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)
    random = np.random.RandomState(task)
    x = torch.tensor(random.randn(FLAGS.batch, *model.input_shape[1:]).astype("float32"))
    y = torch.tensor(random.randint(0, model.output_shape[1], FLAGS.batch))

    def run(steps: int) -> np.ndarray:
        times = [time.perf_counter()]
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(x, training=True), y).backward()
            optimizer.step()
            times.append(time.perf_counter())
        return np.diff(times)

    steps = agreed(FLAGS.seconds / run(WARM_UP)[-1])
    torch.distributed.barrier()
    before, busy = ddp_workers.counters(FLAGS.interface), time.process_time()
    seconds = run(steps)
    busy = time.process_time() - busy
    sent, received = (ddp_workers.counters(FLAGS.interface) - before) / steps
    found = {
        "ms": 1e3 * float(np.median(seconds)),
        "low_ms": 1e3 * float(np.quantile(seconds, 0.1)),
        "processor_ms": 1e3 * busy / steps,
        "steps": steps,
        "sent": float(sent),
        "received": float(received),
        "parameters": int(model.count_params()),
    }
    workers.write(FLAGS.results, task, found)
    ddp_workers.leave()


if __name__ == "__main__":
    app.run(main)
