"""Leader SGD: replicas train alone and are pulled towards the one that does best."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private, checks, compressors
from tfqcomm.optimizers.local.leader_broadcast import Level, broadcast_leaders, remember_leaders
from tfqcomm.optimizers.local.leader_vote import VOTE_WORDS, choose_leaders, push_loss, vote
from tfqcomm.optimizers.local.local_sgd import LocalSGDOptimizer
from tfqcomm.optimizers.shared_arguments import register
from tfqcomm.step.refusals import require_replica_context


def leader_sgd_pull(x, pulls):
    """The pull of one worker (arXiv 1905.10395, Algorithm 1), after its own gradient step.

    Args:
        x: its parameters.
        pulls: (`lambda`, leader's parameters) for each leader it is pulled to at this step, all
            from before the pull; `lambda` is 0 for the leader itself, which does not move.

    Returns:
        x - sum of lambda (x - z). Written as a mean, so that 0 and 1 are exact.
    """
    kept = 1.0 - sum(weight for weight, _ in pulls)  # 1 - lambda - lambda_G
    return kept * x + sum(weight * z for weight, z in pulls)


@register
class LeaderSGD(LocalSGDOptimizer):
    """SGD on every replica alone, pulled now and then towards the replica with the lowest loss.

    Use it where even compressed gradients are too much for every step. On replica i of a group:

        x_i = x_i - learning_rate * g_i
        every `local_period` steps:   x_i = x_i - local_pull (x_i - group's leader)
        every `global_period` steps:  x_i = x_i - global_pull (x_i - leader of all)

    Groups are equal ranges of replicas, and may be machines; the models that local pulls send stay
    within them. With one group only the global pull acts. Where both fall on the same step they act
    together, on the parameters before either.

    The leader is the replica whose mean training loss over its last `loss_window` mini-batches is
    lowest; ties go to the lowest rank. A replica whose last losses or parameters are not finite
    does not lead. `fit` shows the optimizer the losses by itself; in a loop of your own call
    `observe_loss` (or Keras' `scale_loss`) in every step, before `apply`.

    A vote costs 12 bytes to each other replica. A pull costs one model, broadcast along a tree:
    (W - 1) 4 d bytes in all, half of a ring all-reduce, or the compressor's share of it.

    Between pulls the replicas' weights differ. Without further ado `fit` validates each replica's
    part of the data with its own weights, `predict` mixes them and `save` takes the first
    replica's. Add `tfqcomm.callbacks.AverageReplicas` to `fit`: then all of these, and the model at
    the end, are the average of the replicas, as in the paper.

    A replica whose gradient is not finite skips its own step; `TrafficLogger` counts the steps in
    which one of this process did.

    Args:
        learning_rate: float or learning-rate schedule.
        momentum: in [0, 1); local, and untouched by pulls.
        local_pull: in [0, 1], `lambda` in the paper: a mixing weight that the learning rate does
            not scale. With few pulls it should be large.
        global_pull: the same for the leader of all, `lambda_G`.
        local_period: `tau`, in steps of each replica; higher => less traffic.
        global_period: `tau_G`, likewise.
        groups: how many; divides the number of replicas.
        loss_window: losses that count in a vote; 10 in the paper, 64 on ImageNet.
        nesterov: look ahead, as in Keras' SGD.
        leader_compressor: a `tfqcomm.compressors.Compressor`, its name or its config. A lossy one
            encodes the difference to what was broadcast last, over the whole model: what it left
            out is in the next difference.
        seed: of a stochastic `leader_compressor`.
        **options: shared with Keras' optimizers.

    Raises:
        ValueError: for arguments that do not fit; the message names what does.

    Differences from the paper: all workers take a step at the same time; there the period counts
    the steps of all workers and n l tau divides their sum, which for equal steps is every tau-th
    step of each. `tfqcomm.parameter_server.LeaderTrainer` is the form in which they do not wait.
    Momentum and weight decay are Keras' (decoupled), not PyTorch's.

    Example:
    >>> optimizer = LeaderSGD(0.1, global_pull=0.5, leader_compressor="bfloat16")
    >>> optimizer.leader_compressor
    BFloat16()

    References:
        Teng, Gao, Chalus, Choromanska, Goldfarb, Weller: Leader Stochastic Gradient Descent for
        Distributed Training of Deep Learning Models, NeurIPS 2019,
        https://arxiv.org/abs/1905.10395
    """

    def __init__(
        self,
        learning_rate=0.01,
        momentum: float = 0.0,
        *,
        local_pull: float = 0.1,
        global_pull: float = 0.1,
        local_period: int = 64,
        global_period: int = 128,
        groups: int = 1,
        loss_window: int = 10,
        nesterov: bool = False,
        leader_compressor=None,
        seed: int = 0,
        name: str = "leader_sgd",
        **options,
    ):
        super().__init__(learning_rate, momentum, nesterov=nesterov, name=name, **options)
        _check_pulls(local_pull, global_pull, groups)
        checks.positive_integer("local_period", local_period)
        checks.positive_integer("global_period", global_period)
        checks.positive_integer("groups", groups)
        checks.positive_integer("loss_window", loss_window)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise ValueError(
                f"Argument `seed` must be a non-negative 32-bit integer. Received: seed={seed!r}"
            )
        self.local_pull = local_pull
        self.global_pull = global_pull
        self.local_period = local_period
        self.global_period = global_period
        self.groups = groups
        self.loss_window = loss_window
        self.leader_compressor = compressors.get(leader_compressor)
        self.seed = seed
        _tf_private.pass_losses_on()

    @property
    def levels(self) -> list[Level]:
        """The leaders there are: of groups, if there are several, and of all."""
        of_all = Level("global", 1, self.global_pull, self.global_period)
        if self.groups == 1:
            return [of_all]
        return [Level("local", self.groups, self.local_pull, self.local_period), of_all]

    @property
    def times_led(self) -> np.ndarray:
        """int64[W]: how many global pulls each replica has led."""
        return self.shared["times led"].numpy() if "times led" in self.shared else np.zeros(1, int)

    @property
    def route(self):
        """For `TrafficLogger`."""
        pulls = [f"{level.name} every {level.period} steps" for level in self.levels]
        return f"{self.leader_compressor}, {', '.join(pulls)}", "broadcast"

    def pull(self, x, pulls):
        """`leader_sgd_pull`, for those who hold the parameters themselves."""
        return leader_sgd_pull(x, pulls)

    def scale_loss(self, loss):
        """Observes the loss, as Keras shows it to the optimizer in each training step."""
        self.observe_loss(loss)
        return super().scale_loss(loss)

    def observe_loss(self, loss) -> None:
        """Notes this replica's loss of the present mini-batch, for votes. In replica context.

        Args:
            loss: scalar; any factor will do that is the same on all replicas.
        """
        context = require_replica_context(self, "observe_loss")

        def merged(strategy, loss):
            ledger = self.ledger(strategy)
            if ledger.transport.world == 1:
                return
            for replica, value in enumerate(strategy.experimental_local_results(loss)):
                with tf.device(ledger.transport.devices[replica]):
                    window = self._window(ledger, replica)
                    window.assign(push_loss(window.read_value(), value))

        context.merge_call(merged, args=(tf.stop_gradient(loss),))

    def prepare(self, replicas):
        """Checks the groups; what leaders broadcast is first compared with the initial weights."""
        transport = replicas.transport
        if transport.world % self.groups:
            raise ValueError(
                f"Argument `groups` must divide the number of replicas, {transport.world}. "
                f"Received: groups={self.groups}"
            )
        size = transport.world // self.groups
        if size % transport.local and transport.local % size:
            raise ValueError(
                "Argument `groups` must give groups that span whole processes, of "
                f"{transport.local} replicas each, or fit into one. Received: groups={self.groups}"
            )
        counts = np.zeros([transport.world], np.int64)
        self.shared.create("times led", lambda: counts, replicas)
        if not self.leader_compressor.lossless:
            remember_leaders(self.levels, self.shared, replicas)

    def pull_if_due(self, step, replicas):
        """Pulls to the leaders whose time it is."""
        # One branch for each set of levels that may be due together.
        case, branches = 0, [lambda: tf.constant(0)]
        for bit, level in enumerate(self.levels):
            case += tf.cast(tf.equal(step % level.period, 0), tf.int32) * 2**bit
        for number in range(1, 2 ** len(self.levels)):
            due = [level for bit, level in enumerate(self.levels) if number >> bit & 1]
            branches.append(lambda due=due: self._pull_to_leaders(due, step, replicas))
        return tf.switch_case(case, branches)

    def _pull_to_leaders(self, levels, step, replicas):
        transport, vectors = replicas.transport, replicas.vectors()
        windows = [self._window(replicas.ledger, r).read_value() for r in range(transport.local)]
        losses = vote(transport, windows, vectors, step, self.name)
        pulls = [[] for _ in vectors]
        for level in levels:
            leaders, exist = choose_leaders(losses, level.groups)
            received = broadcast_leaders(
                self.leader_compressor,
                tf.stack([self.seed, step]),
                transport,
                level,
                leaders,
                exist,
                vectors,
                self.shared,
            )
            if level.groups == 1:
                led = tf.one_hot(leaders[0], transport.world, dtype=tf.int64)
                self.shared["times led"].assign_add(led * tf.cast(exist[0], tf.int64))
            size = transport.world // level.groups
            for replica, rank in enumerate(transport.ranks):
                pulled = exist[rank // size] & (leaders[rank // size] != rank)
                weight = tf.where(pulled, level.pull, 0.0)
                pulls[replica].append((weight, tf.where(pulled, received[replica], 0.0)))
        replicas.assign([leader_sgd_pull(x, p) for x, p in zip(vectors, pulls, strict=True)])
        words = self.leader_compressor.num_words(replicas.size)
        sent = sum(transport.bytes_broadcast(words, level.groups) for level in levels)
        return tf.constant(sent + transport.bytes_all_gather(VOTE_WORDS))

    def _window(self, ledger, replica):
        """float32[loss_window] variable: the last losses of a local replica, the newest last."""
        shape = [self.loss_window]
        return ledger.worker_state.variable(replica, "losses", "window", shape, np.nan)

    def get_config(self):
        """Serializable arguments, the compressor's among them."""
        return {
            **super().get_config(),
            "local_pull": self.local_pull,
            "global_pull": self.global_pull,
            "local_period": self.local_period,
            "global_period": self.global_period,
            "groups": self.groups,
            "loss_window": self.loss_window,
            "leader_compressor": compressors.serialize(self.leader_compressor),
            "seed": self.seed,
        }


def _check_pulls(local_pull, global_pull, groups):
    for name, value in (("local_pull", local_pull), ("global_pull", global_pull)):
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(
                f"Argument `{name}` must be a float in [0, 1]. Received: {name}={value!r}"
            )
    if groups != 1 and local_pull + global_pull > 1:
        raise ValueError(
            "Arguments `local_pull` and `global_pull` may act together and must not exceed 1 in "
            f"sum. Received: local_pull={local_pull}, global_pull={global_pull}"
        )
