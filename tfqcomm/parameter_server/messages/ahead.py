"""What a worker pulls ahead: the weights of its next step, under way while this one computes.

    pulled for step t + 1   |----- on the way -----|
    step t                  | gradient at what was pulled in step t - 1 | push |

So a worker never waits for weights, and in exchange computes at those from before its last push: a
message is one step of its own worker staler than it would be. The weights are kept on the worker,
as they travel.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from tfqcomm.parameter_server.cluster import Graphs
from tfqcomm.parameter_server.messages.server import Server

Kept = list[list[tf.Variable]]  # for each server the words of a pull, and what travels alone


class Ahead:
    """How pulls of these servers are kept.

    Args:
        servers: all of them.

    Attributes:
        fill: a graph: pulls into what `make` returned; returns how many words.
    """

    def __init__(self, servers: Sequence[Server]):
        self._servers = list(servers)
        self.fill = Graphs(self._fill)

    def make(self) -> Kept:
        """Variables for one pull, on the device of the scope, with nothing in them yet."""
        return [
            [
                tf.Variable(tf.zeros([server.format.most_pull_words], tf.int32), trainable=False)
                if server.format.pulls_alike
                # Serialized, since no task may be told of a variable of unknown shape.
                else tf.Variable(tf.io.serialize_tensor(tf.zeros([0], tf.int32)), trainable=False),
                *(
                    tf.Variable(tf.zeros(piece.shape), trainable=False)
                    for piece in server.format.down.alone
                ),
            ]
            for server in self._servers
        ]

    def read(self, kept: Kept) -> list[list[tf.Tensor]]:
        """What was pulled before: as `Server.pulled` returns it, for each server."""
        found = []
        for server, (words, *alone) in zip(self._servers, kept, strict=True):
            value = words.read_value()
            if not server.format.pulls_alike:
                value = tf.ensure_shape(tf.io.parse_tensor(value, tf.int32), [None])
            found.append([value, *(variable.read_value() for variable in alone)])
        return found

    def keep(self, kept: Kept, pulled: Sequence[Sequence[tf.Tensor]]) -> None:
        """Stores a pull of each server."""
        for server, variables, (words, *alone) in zip(self._servers, kept, pulled, strict=True):
            value = words if server.format.pulls_alike else tf.io.serialize_tensor(words)
            for variable, tensor in zip(variables, [value, *alone], strict=True):
                variable.assign(tensor)

    def _fill(self, kept):
        pulled = [server.pulled() for server in self._servers]
        self.keep(kept, pulled)
        return words_of(pulled)


def words_of(pulled: Sequence[Sequence[tf.Tensor]]) -> tf.Tensor:
    """How many words pulls have, of all servers together: int32 scalar."""
    return tf.add_n([tf.size(part) for parts in pulled for part in parts])
