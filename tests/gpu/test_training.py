"""Steps of `fit` with each compressor and schedule on two GPUs: replicas stay equal to the bit."""

import numpy as np
import pytest
import tensorflow as tf

from tests.catalogue import SCHEDULES
from tests.gpu import functions
from tests.gpu.devices import KIND, two_devices
from tests.multi_process import run_workers
from tests.replicas import assert_replicas_equal
from tfqcomm import distribute


@pytest.mark.parametrize(("compressor", "schedule"), SCHEDULES)
def test_replicas_stay_equal(compressor, schedule):
    ops = distribute.CompressedAllReduce(compressor, schedule=schedule, min_size=0)
    strategy = tf.distribute.MirroredStrategy(two_devices(), ops)
    with strategy.scope():
        model = functions.compiled()
    before = model.get_weights()
    functions.fit(model)
    assert_replicas_equal(strategy, model.weights + model.optimizer.variables)
    assert all(np.any(a != b) for a, b in zip(model.get_weights(), before, strict=True))
    for weight in model.weights:
        devices = [v.device for v in strategy.experimental_local_results(weight.value)]
        assert len(set(devices)) == 2 and all(KIND in device for device in devices)


@pytest.mark.multi_process
def test_processes_joined_by_nccl_stay_equal():
    """Two of them, each on a GPU of its own."""
    if KIND == "GPU" and len(tf.config.list_physical_devices("GPU")) < 2:
        pytest.skip("NCCL needs two GPUs")
    args = {"schedules": SCHEDULES}
    first, second = run_workers(functions.train, workers=2, args=args, timeout=280)
    for case, (device, weights), (_, others) in zip(SCHEDULES, first, second, strict=True):
        assert KIND in device
        assert weights == others, case
