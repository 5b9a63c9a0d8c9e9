"""The transport of a strategy, one object for each."""

from __future__ import annotations

import weakref

import tensorflow as tf

from tfqcomm import _tf_private, pages
from tfqcomm.transport.base import Transport
from tfqcomm.transport.collective import CollectiveTransport
from tfqcomm.transport.local import LocalTransport

_transports: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def transport_for(strategy: tf.distribute.Strategy) -> Transport:
    """The transport of a strategy: one object for each, since collectives are paired by order.

    With the first one the process begins to keep its memory, see `tfqcomm.pages`.

    Raises:
        ValueError: for a strategy whose replicas hold no copies of the model.
    """
    if strategy not in _transports:
        _transports[strategy] = _make_transport(strategy)
        pages.keep()
    return _transports[strategy]


def _make_transport(strategy: tf.distribute.Strategy) -> Transport:
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        if _tf_private.process_count(strategy) > 1:
            return CollectiveTransport(strategy)
        return LocalTransport(strategy.extended.worker_devices)
    if isinstance(strategy, tf.distribute.MirroredStrategy):
        return LocalTransport(strategy.extended.worker_devices)
    if isinstance(strategy, tf.distribute.OneDeviceStrategy) or not tf.distribute.has_strategy():
        return LocalTransport()
    raise ValueError(
        "Compressed training works under no strategy, OneDeviceStrategy, MirroredStrategy or "
        f"MultiWorkerMirroredStrategy. Received: strategy={type(strategy).__name__}"
    )
