"""Hierarchical exchange: replicas of a process average their messages before any is compressed.

replicas    r0 r1 |          | r2 r3      their dense mean, inside the process
processes     p0  | <------> |  p1        compressed, one residual for each process

The setting of the papers, whose workers are machines (1-bit Adam, arXiv 2102.02888).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import tensorflow as tf
from absl import logging

from tfqcomm.compressors.identity import Identity
from tfqcomm.step.message import Message
from tfqcomm.step.options import ExchangeOptions
from tfqcomm.transport.base import Transport
from tfqcomm.transport.processes import ProcessTransport


def participants(options: ExchangeOptions, transport: Transport) -> Transport:
    """The transport between those whose messages are compressed: all replicas, or processes."""
    return ProcessTransport(transport) if options.hierarchical else transport


def between(options: ExchangeOptions, processes: int) -> ExchangeOptions:
    """The options of an exchange between so many processes: within a single one it is dense."""
    if not options.hierarchical or processes > 1:
        return options
    text = "hierarchical=True: all replicas are in one process, so nothing is compressed."
    logging.log_first_n(logging.WARNING, text, 1)
    return dataclasses.replace(
        options,
        compressor=Identity(),
        schedule="auto",
        embedding_rows="float32",
        hierarchical=False,
    )


def of_process(message: Message, device: str | None) -> Message:
    """The mean of all local replicas' messages, as that of one participant.

    Dense tensors are added in rank order; of the gradient of an embedding all rows are kept, those
    of one replica behind those of the other.
    """
    local = len(message.values)
    if local == 1:
        return message
    # Gradients are to be multiplied by P x L: their mean is the sum, to be multiplied by P.
    factor, rest = divmod(message.factor, local)
    share = 1.0 if rest == 0 else 1 / local
    with tf.device(device):
        joined = _rows(message.values, share) if message.sparse else _sum(message.values, share)
    return dataclasses.replace(message, values=[joined], factor=message.factor if rest else factor)


def _sum(values: Sequence[tf.Tensor], share: float) -> tf.Tensor:
    scaled = [value if share == 1 else value * share for value in values]
    total = scaled[0]
    for value in scaled[1:]:
        total = total + value
    return total


def _rows(rows: Sequence[tf.IndexedSlices], share: float) -> tf.IndexedSlices:
    values = tf.concat([of.values for of in rows], 0)
    return tf.IndexedSlices(
        values=values if share == 1 else values * share,
        indices=tf.concat([of.indices for of in rows], 0),
        dense_shape=rows[0].dense_shape,
    )
