"""Sorts the messages of a step: which tensor travels how, and together with which others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import tensorflow as tf
from absl import logging

from tfqcomm.aggregators import schedule as schedules
from tfqcomm.compressors.power_sgd import PowerSGD
from tfqcomm.kernels import low_rank
from tfqcomm.state.traffic import Route
from tfqcomm.step.message import Message
from tfqcomm.step.options import ExchangeOptions

MOST_PER_PAYLOAD = 2**30  # elements: TensorFlow's slices and splits count in int32


@dataclasses.dataclass(frozen=True)
class Group:
    """Messages that one codec compresses.

    Attributes:
        options: those of the codec.
        schedule: by which they travel.
        messages: in the step's order.
    """

    options: ExchangeOptions
    schedule: str
    messages: list[Message]

    @property
    def dearer(self) -> bool:
        """Whether compression would send more than no compression: then "auto" is "dense"."""
        return self.schedule == "dense" and not self.options.codec.linear

    def buckets(self) -> list[list[Message]]:
        """Those of one payload each."""
        if self.options.granularity == "model" or self.schedule == "adaptive":
            return [self.messages]  # must not be cut: one selection ranges over all
        messages = self.messages
        if self.schedule == "low_rank":  # those of one shape side by side
            messages = sorted(messages, key=lambda m: low_rank.matrix_shape(m.shape))
        return in_buckets(messages, self.options)

    def route(self, message: Message) -> Route:
        """How one of them travels."""
        path, codec = message.name, self.options.codec
        if self.dearer:
            text = f"{message.dtype.name} (less than {codec})"
        elif isinstance(codec, PowerSGD) and not codec.reduces(message.shape):
            text = f"float32 (less than {codec})"
        else:
            text = str(codec)
            if self.options.warm_up:
                text += f" after {self.options.warm_up} steps of float32"
            if self.options.hierarchical:
                text += " between processes"
        return Route(path, message.tensor_shape, self.schedule, text)


@dataclasses.dataclass(frozen=True)
class Routing:
    """The messages of a step by what becomes of them.

    Attributes:
        sparse: the gradients of embeddings.
        compressed: by codec.
        dense: all others.
        routes: of all of them, in the step's order.
    """

    sparse: list[Message]
    compressed: list[Group]
    dense: list[Message]
    routes: tuple[Route, ...]


def sort(messages: Sequence[Message], options: ExchangeOptions, world: int) -> Routing:
    """Finds out how messages travel between `world` replicas."""
    groups: list[Group] = []
    group_of: dict[str, Group] = {}
    for own, found in _by_codec(messages, options).items():
        sizes = [m.size for m in found]
        schedule = schedules.choose(own.schedule, own.codec, sizes, world)
        groups.append(Group(own, schedule, found))
        group_of |= {m.key: groups[-1] for m in found}
    routes = tuple(
        group_of[m.key].route(m) if m.key in group_of else _route(m, options) for m in messages
    )
    compressed = [group for group in groups if not group.dearer]
    packed = {m.key for group in compressed for m in group.messages}
    dense = [m for m in messages if not m.sparse and m.key not in packed]
    return Routing([m for m in messages if m.sparse], compressed, dense, routes)


def _by_codec(messages, options) -> dict[ExchangeOptions, list[Message]]:
    """What is to be compressed; tensors of one codec travel in buckets of their own."""
    found: dict[ExchangeOptions, list[Message]] = {}
    for message in messages:
        if message.compressible and not message.sparse:
            own = options.for_path(message.name)
            shape = message.tensor_shape
            if own.compresses(shape, math.prod(shape)):
                found.setdefault(own, []).append(message)
    return found


def _route(message: Message, options: ExchangeOptions) -> Route:
    """Of what is not compressed."""
    if message.sparse:
        own = options.for_path(message.name)
        row_type = own.embedding_rows
        text = "as they are" if row_type == "float32" else f"in {row_type}"
        text += ", each once" if own.rows_each_once else ""
        return Route(message.name, message.shape, "all_gather", f"rows {text}")
    return Route(message.name, message.tensor_shape, "dense", message.dtype.name)


def in_buckets(messages: Sequence[Message], options: ExchangeOptions) -> list[list[Message]]:
    """Buckets, in the order in which gradients become ready: that of the last layer first.

    So the first bucket travels while the gradients of the others are computed.
    """
    return cut(messages[::-1], int(options.bucket_mb * 2**20 / 4))


def cut(messages: Sequence[Message], most: int) -> list[list[Message]]:
    """Groups, in order, of no more than so many elements, unless one message has more."""
    most, elements = min(most, MOST_PER_PAYLOAD), 0
    groups: list[list[Message]] = []
    for message in messages:
        if not groups or elements + message.size > most:
            groups.append([])
            elements = 0
        groups[-1].append(message)
        elements += message.size
    return groups


def warn_of_rounding(group: Group) -> None:
    """Says, a few times, that a codec rounds what is wider than it."""
    if any(m.dtype != tf.float32 for m in group.messages):
        text = "Float64 gradients are rounded to float32 for %s; without a compressor they are not."
        logging.log_first_n(logging.WARNING, text, 1, group.options.codec)
