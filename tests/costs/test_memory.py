"""What is timed outside of a strategy takes memory as a step under one does."""

import platform
import subprocess
import sys

import pytest

# How many of 200 arrays of 1 MB are mapped from the system, each by itself: at first, after
# `take_as_strategies_do`, and after a strategy has distributed a data set. What malloc kept of
# arrays before, up to 64 MB, it gives out first.
PROGRAM = """
import ctypes
import numpy as np
import tensorflow as tf
from tfqcomm.costs import memory

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()

class Facts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Facts

def mapped():
    np.empty(30 * 2**20, np.uint8)  # once freed, malloc maps none that is smaller, unless told to
    before = mallinfo2().hblks
    kept = [np.empty(2**20, np.uint8) for _ in range(200)]
    return mallinfo2().hblks - before

(device,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(device, 2 * [tf.config.LogicalDeviceConfiguration()])
plain = mapped()
memory.take_as_strategies_do()
taken = mapped()
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
next(iter(strategy.experimental_distribute_dataset(tf.data.Dataset.range(4).batch(2))))
print(plain, taken, mapped())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc's malloc")
def test_large_arrays_are_mapped_anew_as_under_a_strategy():
    # Not forked: what malloc has been told by other tests would come along.
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    plain, taken, distributed = map(int, done.stdout.split()[-3:])
    assert plain == 0
    assert (taken > 100) == (distributed > 100)
