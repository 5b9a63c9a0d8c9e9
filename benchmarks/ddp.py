"""A worker that trains the perceptron of `benchmarks.network` under PyTorch's DDP, over gloo.

    python -m benchmarks.network --methods=dense,top_k,ddp,ddp_power_sgd_4

starts it: with the extra `peers`, which is PyTorch. The same Keras model, on Keras' torch backend,
with batches of the same size, in the same network and run; one core and one thread each. PowerSGD
is given one bucket: DDP compresses each of its buckets as one list of matrices, and begins with the
second step, the first it can.
"""

import os

os.environ["KERAS_BACKEND"] = "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # Keras looks for TensorFlow all the same

import json
import pathlib
import time

import keras
import numpy as np
import torch
from absl import app, flags
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

WARM_UP = 4  # steps: DDP lays its buckets out anew in the second, PowerSGD begins in the third
ONE_BUCKET = 1000  # MB
PORT = 29500  # PyTorch's own
METHODS = ("ddp_alone", "ddp", "ddp_bf16", "ddp_fp16", "ddp_power_sgd_1", "ddp_power_sgd_4")

FLAGS = flags.FLAGS
flags.DEFINE_enum("method", None, METHODS, "What is exchanged, and how.", required=True)
flags.DEFINE_list("units", None, "Of the perceptron, input and output too.", required=True)
flags.DEFINE_integer("batch", None, "Examples per worker.", required=True)
flags.DEFINE_float("seconds", None, "To time the steps for.", required=True)
flags.DEFINE_list("limits", None, "Fewest and most steps.", required=True)
flags.DEFINE_string("interface", None, "Whose bytes are counted.", required=True)
flags.DEFINE_string("results", None, "Directory for what the workers find.", required=True)


def join() -> int:
    """Meets the other workers of TF_CONFIG; returns which one this is."""
    config = json.loads(os.environ["TF_CONFIG"])
    addresses, index = config["cluster"]["worker"], config["task"]["index"]
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[index % len(cores)]})
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = FLAGS.interface
    # Not the port of TF_CONFIG, which the launcher holds for the task; the network is our own.
    meeting = f"tcp://{addresses[0].rpartition(':')[0]}:{PORT}"
    torch.distributed.init_process_group("gloo", meeting, rank=index, world_size=len(addresses))
    return index


def perceptron() -> keras.Model:
    """That of `benchmarks.network`."""
    keras.utils.set_random_seed(0)
    first, *hidden, last = map(int, FLAGS.units)
    layers = [keras.layers.Dense(units, activation="relu") for units in hidden]
    return keras.Sequential([keras.Input([first]), *layers, keras.layers.Dense(last)])


def parallel(model: torch.nn.Module) -> torch.nn.Module:
    """The model under DDP, with the hook of the method."""
    if FLAGS.method == "ddp_alone":
        return model
    power = FLAGS.method.startswith("ddp_power_sgd")
    bucket = {"bucket_cap_mb": ONE_BUCKET} if power else {}
    model = torch.nn.parallel.DistributedDataParallel(model, **bucket)
    if FLAGS.method == "ddp_bf16":
        model.register_comm_hook(None, default_hooks.bf16_compress_hook)
    if FLAGS.method == "ddp_fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    if power:
        rank = int(FLAGS.method.rpartition("_")[2])
        options = {"matrix_approximation_rank": rank, "start_powerSGD_iter": 2}
        state = powerSGD_hook.PowerSGDState(None, **options)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return model


def counters() -> np.ndarray:
    """Bytes that have been sent and received so far."""
    for line in pathlib.Path("/proc/self/net/dev").read_text().splitlines():
        name, _, columns = line.partition(":")
        if name.strip() == FLAGS.interface:
            received, sent = (int(columns.split()[i]) for i in (0, 8))
            return np.array([sent, received])
    raise ValueError(f"There is no interface of this name. Received: {FLAGS.interface}")


def agreed(steps: float) -> int:
    """The first worker's number of steps, within limits."""
    fewest, most = map(int, FLAGS.limits)
    steps = torch.tensor([min(max(int(steps), fewest), most)])
    torch.distributed.broadcast(steps, 0)
    return int(steps)


def main(_):
    """Times steps and counts bytes, as `benchmarks.network` does."""
    task = join()
    model = perceptron()
    module = parallel(model)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    random = np.random.RandomState(task)
    x = torch.tensor(random.randn(FLAGS.batch, model.input_shape[1]).astype("float32"))
    y = torch.tensor(random.randint(0, model.output_shape[1], FLAGS.batch))

    def run(steps: int) -> np.ndarray:
        times = [time.perf_counter()]
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
            times.append(time.perf_counter())
        return np.diff(times)

    steps = agreed(FLAGS.seconds / run(WARM_UP)[-1])
    torch.distributed.barrier()
    before, busy = counters(), time.process_time()
    seconds = run(steps)
    busy = time.process_time() - busy
    sent, received = (counters() - before) / steps
    found = {
        "ms": 1e3 * float(np.median(seconds)),
        "low_ms": 1e3 * float(np.quantile(seconds, 0.1)),
        "processor_ms": 1e3 * busy / steps,
        "steps": steps,
        "sent": float(sent),
        "received": float(received),
        "parameters": int(model.count_params()),
    }
    pathlib.Path(FLAGS.results, f"{task}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    app.run(main)
