"""The turn of one fragment: its differences are exchanged, and the replicas take what comes of it.

                        step   4   5   6   7   8   9  10 ...        every=4, overlap=1
    differences are sent       x               x
    the mean is merged             x               x

Between the two what was sent is kept, and, between processes, under way; steps go on.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence

import tensorflow as tf

from tfqcomm.optimizers.local.global_weights import GlobalWeights
from tfqcomm.optimizers.local.pieces import Piece, wide
from tfqcomm.optimizers.local.pulls import Pullable, SharedState
from tfqcomm.state.ledger import Ledger
from tfqcomm.state.traffic import Route
from tfqcomm.step.exchange import GradientExchange
from tfqcomm.step.message import Message, Reduction, path_of
from tfqcomm.step.step import paid
from tfqcomm.step.verification import verify_replicas
from tfqcomm.transport import Flights, Transport


@dataclasses.dataclass(frozen=True)
class Turns:
    """When fragments are sent, and when what was sent is merged.

    Attributes:
        every: H, steps between two turns of a fragment.
        fragments: P, which divides H.
        overlap: steps between sending and merging, below H / P.
    """

    every: int
    fragments: int
    overlap: int

    def due(self, index: int, step: tf.Tensor) -> tf.Tensor:
        """Bool scalar: whether a fragment is to be sent in this step."""
        return tf.equal(step % self.every, index * (self.every // self.fragments))

    def begin(
        self, shared: SharedState, replicas: Pullable, pieces: Sequence[Sequence[Piece]]
    ) -> None:
        """Before the first step: nothing waits to be merged, or what was saved says what does."""
        for index, of_one in enumerate(pieces):
            name = self.sent_at(index, of_one)
            if name not in shared:
                shared.create(name, lambda: tf.zeros([], tf.int64), replicas)

    def sent_at(self, index: int, pieces: Sequence[Piece]) -> str:
        """What the step in which a fragment was sent last is kept as.

        What a backup says of a fragment that is made of other pieces is not merged.
        """
        name = f"sent_at/{index}_of_{self.fragments}"
        if self.fragments == 1:
            return name
        ranges = [(piece.place, piece.start, piece.stop) for piece in pieces]
        return f"{name}/{zlib.crc32(str(ranges).encode()):08x}"


@dataclasses.dataclass(frozen=True)
class Fragment:
    """One of the parts of the model that take turns, in the graph of one step.

    Attributes:
        turns: of all fragments.
        index: which one it is.
        pieces: of which variables it has what; the following are by piece.
        keys: names of the variables.
        variables: of the model.
        copies: for each of them those of the local replicas.
        global_weights: of all variables.
        ledger: of the optimizer.
        exchange_by: makes the exchange over a transport.
        routes: by key, how variables travel; an exchange fills in its own.
    """

    turns: Turns
    index: int
    pieces: Sequence[Piece]
    keys: Sequence[str]
    variables: Sequence
    copies: Sequence[Sequence[tf.Variable]]
    global_weights: GlobalWeights
    ledger: Ledger
    exchange_by: Callable[[Transport], GradientExchange]
    routes: dict[str, Route]

    def take_turn(self, step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Sends, or merges, if it is time to.

        Args:
            step: int64 scalar, the number of this step; the first is 1.

        Returns:
            Bytes that one worker sent of what is merged, and whether that was taken.
        """
        due = self.turns.due(self.index, step)
        if self.turns.overlap:
            sent_at = self.global_weights.shared[self.turns.sent_at(self.index, self.pieces)]
            tf.cond(due, lambda: self._send(step, sent_at), lambda: tf.constant(False))
            due = (sent_at > 0) & tf.equal(sent_at + self.turns.overlap, step)
        return tf.cond(
            due,
            lambda: self._merge(step - self.turns.overlap),
            lambda: (tf.constant(0, tf.int64), tf.constant(True)),
        )

    def _send(self, step, sent_at):
        """Keeps the differences, and lets them go on their way while steps go on."""
        for place, piece in enumerate(self.pieces):
            for kept, difference in zip(self._kept(place), self._differences(place), strict=True):
                with tf.device(kept.device):
                    piece.put(kept, difference)
        sent_at.assign(step)
        messages, transport = self._messages(), self.ledger.transport
        flights = self._flights(messages)
        if flights is not None:
            routes = self.ledger.routes
            exchange = self.exchange_by(transport.departing(flights, self._name, step))
            self._reduce(exchange, messages, step)
            self.ledger.routes = routes
        return tf.constant(True)

    def _merge(self, step):
        """Mean of differences, then the outer step: one graph for all local replicas.

        Args:
            step: in which the differences were taken.
        """
        messages, transport = self._messages(), self.ledger.transport
        flights = self._flights(messages) if self.turns.overlap else None
        if flights is not None:
            # Encoded again, to the same words: so no more than the differences has to be kept.
            transport = transport.arriving(flights, self._name, step)
        exchange = self.exchange_by(transport)
        reduction = self._reduce(exchange, messages, step)
        for key, route in zip(self.keys, self.ledger.routes, strict=True):
            codec = f"{route.codec} every {self.turns.every} steps"
            self.routes[key] = dataclasses.replace(route, codec=codec)
        taken = self._move(reduction, messages)
        for key, piece, copies in zip(self.keys, self.pieces, self.copies, strict=True):
            self.global_weights.merge_into(key, piece, copies, taken)
        # Replicas that keep something of their own are not to be equal.
        if exchange.options.verify and self.global_weights.merge == 1:
            verify_replicas(self.ledger, self._merged, taken)
        return tf.cast(reduction.bytes_sent, tf.int64), taken

    def _move(self, reduction: Reduction, messages: Sequence[Message]) -> tf.Tensor:
        """The outer step, unless a message was not finite; returns whether it was taken."""
        residuals = self.ledger.residuals
        debts = [residuals.debt(m.key, m.size) for m in messages]

        def move():
            reduction.commit()
            means = map(paid, reduction.means, debts)
            for key, piece, mean in zip(self.keys, self.pieces, means, strict=True):
                self.global_weights.move(key, piece, mean)
            return tf.constant(True)

        with tf.device(self.ledger.transport.device):
            return tf.cond(reduction.healthy, move, lambda: tf.constant(False))

    def _messages(self) -> list[Message]:
        """The differences that are exchanged: those of now, or those that were kept."""
        messages = []
        for place, (piece, variable) in enumerate(zip(self.pieces, self.variables, strict=True)):
            if self.turns.overlap:
                values = [piece.of(kept) for kept in self._kept(place)]
            else:
                values = self._differences(place)
            key, part_of = self.keys[place], None
            if not piece.whole:
                name, part_of = f"{key}[{piece.start}:{piece.stop}]", piece.shape
                self.ledger.residuals.declare_part(name, key, piece.size, piece.start)
                key = name
            messages.append(Message(key, values, path=path_of(variable), part_of=part_of))
        return messages

    def _differences(self, place: int) -> list[tf.Tensor]:
        found = self.keys[place], self.pieces[place], self.copies[place]
        return self.global_weights.differences(*found)

    def _merged(self) -> list[list[tf.Tensor]]:
        """What each local replica has of the fragment."""
        own = zip(self.pieces, self.copies, strict=True)
        by_piece = [[piece.of(copy) for copy in copies] for piece, copies in own]
        return [list(replica) for replica in zip(*by_piece, strict=True)]

    def _kept(self, place: int) -> list[tf.Variable]:
        """For each local replica what it has sent of a variable, until that is merged."""
        state = self.ledger.worker_state
        return [
            state.variable(replica, "sent", self.keys[place], copy.shape, 0.0, wide(copy))
            for replica, copy in enumerate(self.copies[place])
        ]

    def _flights(self, messages) -> Flights | None:
        """What is under way, if messages can be: between processes, and in one round."""
        transport = self.ledger.transport
        if transport.processes == 1 or not self.exchange_by(transport).one_round(messages):
            return None
        return self.ledger.keep("flights", transport.flights)

    @property
    def _name(self) -> str:
        return f"of fragment {self.index}"

    def _reduce(self, exchange: GradientExchange, messages, step) -> Reduction:
        before = step - 1  # steps that were taken before this one
        # Rounds are counted, not steps, whose remainders by W might all be one.
        rounds = before // self.turns.every
        return exchange.reduce(messages, rounds, exchange.options.after_warm_up(before))
