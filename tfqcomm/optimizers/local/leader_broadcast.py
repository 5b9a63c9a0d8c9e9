"""Gives every replica the parameters of its leader, encoded on the way.

A lossy codec encodes the difference to what all members of the group decoded last, so that what it
leaves out is part of the next difference:

    words = encode(leader - known);  known = known + decode(words)

Letters: d parameters, L local replicas, W replicas in all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import tensorflow as tf

from tfqcomm.compressors.base import Compressor
from tfqcomm.optimizers.local.pulls import Pullable, SharedState
from tfqcomm.transport.base import Transport


@dataclasses.dataclass(frozen=True)
class Level:
    """Who elects a leader together, and what the leader does to them.

    Attributes:
        name: "local" or "global".
        groups: equal ranges of ranks.
        pull: mixing weight in [0, 1]; higher => closer to the leader.
        period: steps between two pulls; higher => less traffic.
    """

    name: str
    groups: int
    pull: float
    period: int

    def local_groups(self, transport: Transport) -> dict[int, int]:
        """The groups with replicas in this process -> the first of these, counted from 0."""
        size = transport.world // self.groups
        groups: dict[int, int] = {}
        for replica, rank in enumerate(transport.ranks):
            groups.setdefault(rank // size, replica)
        return groups

    def known(self, group: int) -> str:
        """Names what a group has decoded so far."""
        return f"{self.name} leader of group {group}"


def remember_leaders(levels: Sequence[Level], shared: SharedState, replicas: Pullable) -> None:
    """Prepares lossy broadcasts: the first ones are compared with the initial parameters."""
    for level in levels:
        for group in level.local_groups(replicas.transport):
            shared.create(level.known(group), replicas.mean, replicas)


def broadcast_leaders(
    codec: Compressor,
    seed: tf.Tensor,
    transport: Transport,
    level: Level,
    leaders: tf.Tensor,
    exist: tf.Tensor,
    vectors: Sequence[tf.Tensor],
    shared: SharedState,
) -> list[tf.Tensor]:
    """The parameters of each local replica's leader, as everyone in its group decodes them.

    Args:
        codec: of the words that travel.
        seed: int32[2], of a stochastic codec.
        transport: to all replicas.
        level: whose leaders these are.
        leaders: int32[groups].
        exist: bool[groups], false where nobody can lead: nothing is to be remembered.
        vectors: L times float32[d], everyone's own parameters.
        shared: where `known` is kept.

    Returns:
        L times float32[d].
    """
    size = transport.world // level.groups
    groups = level.local_groups(transport)
    known = {g: None if codec.lossless else shared[level.known(g)] for g in groups}
    words = []
    for rank, vector in zip(transport.ranks, vectors, strict=True):
        before = known[rank // size]
        words.append(codec.encode(vector if before is None else vector - before, seed))
    received = transport.broadcast(words, leaders)
    models = {}
    for group, replica in groups.items():
        model = codec.decode(received[replica], vectors[0].shape[0])
        before = known[group]
        if before is not None:
            model = tf.where(exist[group], before + model, before)
            before.assign(model)
        models[group] = model
    return [models[rank // size] for rank in transport.ranks]
