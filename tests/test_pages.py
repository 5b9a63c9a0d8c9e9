"""Large arrays get the pages of those before them, whatever TensorFlow has told malloc."""

import os
import platform
import subprocess
import sys

import pytest

from tfqcomm import pages

# Page faults for each of 20 arrays of 2 MiB, 512 pages, which are freed one after the other: in
# a process that has trained under a strategy of this package's, and what the strategy said.
PROGRAM = """
import resource
import keras
import numpy as np
import tensorflow as tf
from tfqcomm import distribute, pages

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(2**21, np.uint8)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20

(device,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(device, 2 * [tf.config.LogicalDeviceConfiguration()])
ops = distribute.CompressedAllReduce("block_sign")
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], ops).scope():
    model = keras.Sequential([keras.Input([4]), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
model.fit(np.ones([8, 4]), np.ones([8, 2]), epochs=2, verbose=0)
np.ones(2**21, np.uint8)
print(pages.keep(), faults())
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc's malloc")


def trained(**environment: str) -> tuple[str, float]:
    """What `keep` returned, and the faults of an array."""
    done = subprocess.run(  # not forked: what malloc has been told by other tests would come along
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    kept, faults = done.stdout.split()[-2:]
    return kept, float(faults)


@glibc
def test_arrays_after_training_get_no_new_pages():
    kept, faults = trained()
    assert kept == "True"
    assert faults < 50


@glibc
@pytest.mark.slow
@pytest.mark.parametrize(
    "variable",
    [
        {"TFQCOMM_KEEP_PAGES": "0"},
        {"MALLOC_MMAP_THRESHOLD_": "131072"},
        {"MALLOC_TOP_PAD_": "131072"},
    ],
)
def test_malloc_is_left_alone_where_the_environment_says_so(variable):
    kept, faults = trained(**variable)
    assert kept == "False"
    assert faults > 500


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("TFQCOMM_KEEP_PAGES", "0", True),
        ("TFQCOMM_KEEP_PAGES", "1", False),
        ("TFQCOMM_KEEP_PAGES", "", False),
        ("MALLOC_TOP_PAD_", "0", True),
        ("MALLOC_ARENA_MAX", "2", False),
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=131072", True),
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1", False),
    ],
)
def test_what_the_environment_says(monkeypatch, variable, value, told):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    for name in pages.TOLD_BY:
        monkeypatch.delenv(f"MALLOC_{name.upper()}_", raising=False)
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.setenv(variable, value)
    assert pages.left_alone() is told


def test_a_switch_that_is_neither_on_nor_off(monkeypatch):
    monkeypatch.setenv("TFQCOMM_KEEP_PAGES", "no")
    with pytest.raises(ValueError, match=r"must be 1 \(the default\).* or 0, .*KEEP_PAGES=no$"):
        pages.left_alone()


def test_another_malloc_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert pages.left_alone() and not pages.tell_malloc()
