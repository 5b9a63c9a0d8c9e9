"""Worker processes under PyTorch's DDP, over gloo: how they meet, what is exchanged, their bytes.

With the extra `peers`, which is PyTorch. One core and one thread each. PowerSGD is given one
bucket: DDP compresses each of its buckets as one list of matrices, and begins with the third step,
the first it can.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from typing import NoReturn

import numpy as np
import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from benchmarks import workers

ONE_BUCKET = 1000  # MB
PORT = 29500  # PyTorch's own


def join(interface: str) -> int:
    """Meets the other workers of TF_CONFIG through an interface; returns which one this is."""
    index = workers.begin()
    addresses = json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"]
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    # Not the port of TF_CONFIG, which the launcher holds for the task; the network is our own.
    meeting = f"tcp://{addresses[0].rpartition(':')[0]}:{PORT}"
    torch.distributed.init_process_group("gloo", meeting, rank=index, world_size=len(addresses))
    return index


def leave() -> NoReturn:
    """Waits for all others, so that nobody misses one who has ended, and ends this process.

    At once: of PyTorch's destructors that of DDP's reducer waits for gloo's thread while it holds
    Python's lock, and that thread can be waiting for the lock.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def parallel(model: torch.nn.Module, method: str) -> torch.nn.Module:
    """The model under DDP, with the hook of one of `workers.DDP`."""
    power = method.startswith("ddp_power_sgd")
    bucket = {"bucket_cap_mb": ONE_BUCKET} if power else {}
    model = torch.nn.parallel.DistributedDataParallel(model, **bucket)
    if method == "ddp_bf16":
        model.register_comm_hook(None, _bf16)
    if method == "ddp_fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    if power:
        rank = int(method.rpartition("_")[2])
        options = {"matrix_approximation_rank": rank, "start_powerSGD_iter": 2}
        state = powerSGD_hook.PowerSGDState(None, **options)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return model


def _bf16(group, bucket):
    """PyTorch's hook, which by its name DDP takes on GPUs alone; gloo sums bfloat16, too."""
    return default_hooks.bf16_compress_hook(group, bucket)


def counters(interface: str) -> np.ndarray:
    """Bytes that an interface has sent and received so far."""
    for line in pathlib.Path("/proc/self/net/dev").read_text().splitlines():
        name, _, columns = line.partition(":")
        if name.strip() == interface:
            received, sent = (int(columns.split()[i]) for i in (0, 8))
            return np.array([sent, received])
    raise ValueError(f"There is no interface of this name. Received: {interface}")
