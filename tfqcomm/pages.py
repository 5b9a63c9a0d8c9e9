"""Memory that a step gives back stays with the process, and the next step gets the same pages.

From TensorFlow 2.21 on, the first data set made by a generator tells malloc (against a leak of
Python 3.11) to map each piece of 128 KiB or more from the system, and to give it back once it is
freed. Every strategy that distributes a data set makes one. The system clears such pages one by
one, for every tensor of every step: of a ResNet20's step on one core that was more than half.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform

import tensorflow as tf

SWITCH = "TFQCOMM_KEEP_PAGES"  # environment variable: "0" leaves malloc as TensorFlow has told it
TOLD_BY = ("mmap_threshold", "trim_threshold", "top_pad")  # environment variables, if they say so

_SETTINGS = {  # of malloc.h
    -3: 2**25,  # M_MMAP_THRESHOLD: the most that glibc takes; what is larger is mapped anyway
    -1: 2**30,  # M_TRIM_THRESHOLD: what may be free at the end of the heap
    -2: 2**26,  # M_TOP_PAD: by how much the heap grows, so that it seldom has to
}


@functools.cache
def keep() -> bool:
    """From here on this process keeps pages of up to 1 GiB that are free; returns whether it does.

    Nothing happens where malloc is not glibc's, where the environment has `TFQCOMM_KEEP_PAGES=0`,
    or where `MALLOC_MMAP_THRESHOLD_`, `MALLOC_TRIM_THRESHOLD_`, `MALLOC_TOP_PAD_` or their like in
    `GLIBC_TUNABLES` say something. (To say something there ends glibc's own adjusting, too.)

    Not to be called before there is a strategy of several workers: it starts TensorFlow.

    Raises:
        ValueError: if `TFQCOMM_KEEP_PAGES` is neither "0" nor "1".
    """
    if left_alone():
        return False
    with tf.init_scope(), tf.device("CPU:0"):  # TensorFlow tells malloc once: let it be before us
        made = tf.data.Dataset.from_generator(lambda: iter([0]), output_signature=tf.TensorSpec([]))
        next(iter(made))
    return tell_malloc()


def tell_malloc() -> bool:
    """What `keep` does, in a process that makes no data sets, such as a parameter server."""
    if left_alone():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(name, value) for name, value in _SETTINGS.items())


def left_alone() -> bool:
    """Whether malloc is another one than glibc's, or the user wants it so, or has told it more."""
    switch = os.environ.get(SWITCH) or "1"
    if switch not in ("0", "1"):
        raise ValueError(
            f"The environment variable {SWITCH} must be 1 (the default), to keep the memory of a "
            f"step in the process, or 0, to leave malloc alone. Received: {SWITCH}={switch}"
        )
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    told = any(
        f"MALLOC_{name.upper()}_" in os.environ or f"glibc.malloc.{name}=" in tunables
        for name in TOLD_BY
    )
    return switch == "0" or told or platform.libc_ver()[0] != "glibc"
