"""`compressor="auto"`: before an optimizer's first step the workers measure, and take the fastest.

Among dense training, `BFloat16`, `Float8` and `BlockInt8`: 8 bits or more of every entry, and what
they leave out is sent later. What sends less can cost accuracy, and is nobody's choice but the
user's.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from absl import logging

from tfqcomm import _tf_private
from tfqcomm.compressors.base import Compressor
from tfqcomm.compressors.block_int8 import BlockInt8
from tfqcomm.compressors.float8 import Float8
from tfqcomm.compressors.float16 import BFloat16
from tfqcomm.compressors.identity import Identity
from tfqcomm.costs import exchange, link
from tfqcomm.costs.prediction import Bucket, Compute, Link, predict
from tfqcomm.step.options import ExchangeOptions
from tfqcomm.step.refusals import require_replica_context
from tfqcomm.transport.base import Transport
from tfqcomm.transport.of_strategy import transport_for

AUTO = "auto"
CANDIDATES = (Identity(), BFloat16(), Float8(), BlockInt8())
WORTH_IT = 1.05  # times as fast as dense, or it stays dense
SECONDS = 0.2  # for which each exchange is repeated

_decided: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # optimizer -> ExchangeOptions


def told(compressor, options: dict) -> tuple:
    """What a strategy begins with, and whether it is to choose.

    Args:
        compressor: as its constructor was given it.
        options: the others.

    Raises:
        ValueError: for options that would be another choice.
    """
    if not (isinstance(compressor, str) and compressor == AUTO):
        return compressor, False
    if options.get("schedule", "auto") != "auto":
        raise ValueError(
            "Argument `schedule` must be 'auto' where the compressor is. "
            f"Received: schedule={options['schedule']!r}, compressor='auto'"
        )
    return None, True


@tf.autograph.experimental.do_not_convert  # measuring is eager, in any user's graph
def options_for(owner, optimizer, gradients: Sequence) -> ExchangeOptions:
    """The options of a strategy, or its cross-device ops, for the step of an optimizer.

    Called in replica context; what has been chosen for an optimizer stays.
    """
    if not getattr(owner, "automatic", False):
        return owner.options
    if optimizer not in _decided:
        context = require_replica_context(optimizer, "apply")
        shapes = [tuple(g.shape) for g in gradients if not isinstance(g, tf.IndexedSlices)]

        def merged(strategy):
            with tf.init_scope(), _tf_private.doing("the choice of a compressor"):
                return choose(transport_for(strategy), owner.options, shapes)

        chosen = context.merge_call(merged)
        _decided[optimizer] = dataclasses.replace(owner.options, compressor=chosen)
    return _decided[optimizer]


def choose(
    transport: Transport, options: ExchangeOptions, shapes: Sequence[tuple[int, ...]]
) -> Compressor:
    """Measures the link and the candidates, and logs which one is taken; eager, a collective.

    The time of an exchange counts, without what of it may hide behind the backward pass.

    Args:
        options: all but the compressor.
        shapes: of the gradients.

    Returns:
        The same on all workers.
    """
    if transport.processes == 1:
        logging.info("compressor='auto': none, as all replicas are in one process.")
        return CANDIDATES[0]
    between = link.measure(transport)
    seconds = [_seconds(transport, between, c, options, shapes) for c in CANDIDATES]
    seconds = link.slowest(transport, np.array(seconds, np.float32)).tolist()
    best = int(np.argmin(seconds))
    if seconds[0] < WORTH_IT * seconds[best]:
        best = 0
    logging.info("%s", _explanation(CANDIDATES[best], seconds))
    return CANDIDATES[best]


def _explanation(chosen: Compressor, seconds: Sequence[float]) -> str:
    times = [f"{c} {1e3 * s:.1f} ms" for c, s in zip(CANDIDATES, seconds, strict=True)]
    return (
        f"compressor='auto': {chosen}, of what was measured of an exchange: {', '.join(times)}. "
        "A compressor is taken where it is 5% faster than none, Identity()."
    )


def _seconds(transport: Transport, between: Link, compressor, options, shapes) -> float:
    """An exchange of gradients of these shapes, from the first word to the last mean."""
    sizes = [int(np.prod(s)) for s in shapes if options.reaches(s, int(np.prod(s)))]
    local = 1 if options.hierarchical else transport.local
    schedule = exchange.chosen(compressor, sizes, local * transport.processes)
    if schedule not in exchange.schedules_for(compressor):
        schedule = "auto"
    tried = dataclasses.replace(options, compressor=compressor, schedule=schedule)
    gradients = [
        tf.random.stateless_normal(shape, [0, index]) for index, shape in enumerate(shapes)
    ]
    buckets = exchange.measure(tried, gradients, SECONDS)
    buckets = tuple(_of_process(bucket, local) for bucket in buckets)
    return predict(Compute(0.0, 0.0, 0.0), buckets, between, transport.processes).seconds


def _of_process(bucket: Bucket, local: int) -> Bucket:
    """The bucket of a process with so many replicas: sums it sends once, other payloads of each."""
    summed = bucket.schedule in ("dense", "low_rank", "shared_support")
    return dataclasses.replace(
        bucket,
        payload=bucket.payload * (1 if summed else local),
        before=bucket.before * local,
        after_each=bucket.after_each * local,
    )
