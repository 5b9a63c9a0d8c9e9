"""Which fragment is merged when, and out of whose answers: the syncer's book, without TensorFlow.

    a round begins       for the next fragment in turn, `every` steps of an average learner after
                         the last one; at most two at a time, of different fragments
    a learner's step     ends: it takes what was merged since, then it answers where it was asked
    an answer            counts, unless it is late, or its anchor is outdated
    a round ends         when nobody is left to answer, or with a quorum and a grace behind it;
                         then servers merge its fragment, and its version goes up by one

Nobody waits: a learner does what there is for it to do after a step, and takes the next one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

AT_ONCE = 2  # rounds
NOTHING = -1  # the version of a fragment that a learner does not have
_MEMORY = 0.9  # of the moving averages of seconds


@dataclasses.dataclass(eq=False)
class Round:
    """One fragment's turn.

    Attributes:
        fragment: whose turn it is.
        version: of the fragment, to which differences are taken.
        began: by the clock.
        asked: ranks that have not begun to answer.
        answering: ranks whose answer is under way.
        answers: rank -> weight in the mean.
        quorum_at: when there were enough answers, by the clock.
        over: whether no answer counts any more.
    """

    fragment: int
    version: int
    began: float
    asked: set[int]
    answering: set[int] = dataclasses.field(default_factory=set)
    answers: dict[int, float] = dataclasses.field(default_factory=dict)
    quorum_at: float | None = None
    over: bool = False


@dataclasses.dataclass(frozen=True)
class Delivery:
    """A fragment that a learner is to take.

    Attributes:
        fragment: which one.
        version: of it.
        whole: whether its own weights count no more.
        age: steps of all learners since it was merged; None if it never was.
    """

    fragment: int
    version: int
    whole: bool
    age: int | None


@dataclasses.dataclass(eq=False)
class Learner:
    """What the book knows of one learner.

    Attributes:
        life: how often it has been started.
        versions: of the fragments that it has, its anchors.
        steps, examples: since it took each fragment.
        seconds: of a step, a moving average.
        taken, dropped: its answers that counted, and those that did not.
    """

    life: int
    versions: list[int]
    steps: list[int]
    examples: list[int]
    alive: bool = True
    seconds: float | None = None
    taken: int = 0
    dropped: int = 0

    def hold(self, versions: list[int]) -> None:
        """Has these fragments from now on, and took no step from them."""
        self.versions = list(versions)
        self.steps, self.examples = [0] * len(versions), [0] * len(versions)


class Rounds:
    """Rounds and what learners have to do with them. Not thread-safe: its driver holds a lock.

    Args:
        fragments: P.
        every: steps of an average living learner between the beginnings of two rounds.
        learners: M.
        quorum: answers that a round waits for, or fewer where fewer are alive.
        grace: gamma in the paper, the share of the time that is left until the next round.
        grace_seconds: the longest grace; None for no limit.
        clock: seconds.

    Attributes:
        learners: by rank.
        merged: rounds so far.
        total: steps of all learners.
    """

    def __init__(
        self,
        fragments: int,
        every: float,
        learners: int,
        quorum: int,
        grace: float = 1.0,
        grace_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.learners = [
            Learner(1, [0] * fragments, [0] * fragments, [0] * fragments) for _ in range(learners)
        ]
        self.merged = self.total = 0
        self._every, self._quorum = every, quorum
        self._grace, self._grace_seconds = grace, grace_seconds
        self._clock = clock
        self._versions = [0] * fragments
        self._merged_at: list[int | None] = [None] * fragments  # the total then
        self._open: list[Round] = []  # in which learners answer, or servers merge
        self._begun = 0  # rounds
        self._due = 0.0  # steps of an average learner since the last one began
        self._merge_seconds = 0.0

    def restart(self) -> None:
        """All learners have what the servers have, and no round is open."""
        self._open.clear()
        self._due = 0.0
        self._versions = [version + 1 for version in self._versions]
        for learner in self.learners:
            learner.hold(self._versions)

    def rejoin(self, rank: int, life: int) -> bool:
        """Whether the learner was started anew: then it is to take all fragments, whole."""
        learner = self.learners[rank]
        if learner.life == life:
            return False
        learner.life, learner.alive, learner.seconds = life, True, None
        self.spoil(rank)
        return True

    def spoil(self, rank: int) -> None:
        """What the learner has is worth nothing: it is to take all fragments, whole."""
        self.learners[rank].hold([NOTHING] * len(self._versions))

    def lose(self, rank: int) -> None:
        """The learner is gone: nobody waits for its answers."""
        self.learners[rank].alive = False
        for one in self._open:
            one.asked.discard(rank)
            one.answering.discard(rank)
            self._note_quorum(one)

    def took_step(self, rank: int, examples: int, seconds: float) -> None:
        """Notes a step of a learner, and begins the rounds that are due.

        Args:
            examples: of its batch; 0 for a step that was skipped.
            seconds: it has taken.
        """
        learner = self.learners[rank]
        learner.seconds = _average(learner.seconds, seconds)
        if examples:
            learner.steps = [steps + 1 for steps in learner.steps]
            learner.examples = [sum_ + examples for sum_ in learner.examples]
        self.total += 1
        # A round that could not begin in time does not bring the next one forward.
        self._due = min(self._due + 1 / max(1, self._alive), self._every)
        # Sums of parts of a step may be a little less than whole.
        if self._due > self._every - 1e-6 and self._may_begin():
            self._begin()

    def delivery(self, rank: int) -> Delivery | None:
        """What the learner is to take next; nothing of what servers are about to change."""
        learner = self.learners[rank]
        merging = {one.fragment for one in self._open if one.over}
        for fragment, version in enumerate(self._versions):
            had = learner.versions[fragment]
            if had != version and fragment not in merging:
                at = self._merged_at[fragment]
                age = None if at is None else self.total - at
                return Delivery(fragment, version, had == NOTHING, age)
        return None

    def delivered(self, rank: int, delivery: Delivery) -> None:
        """The learner has taken it: from now on its answers are differences to that."""
        fragment, learner = delivery.fragment, self.learners[rank]
        # Where servers changed it meanwhile, who knows what was read: it is delivered once more.
        if delivery.version == self._versions[fragment] and not self._is_merging(fragment):
            learner.versions[fragment] = delivery.version
        learner.steps[fragment] = learner.examples[fragment] = 0

    def to_answer(self, rank: int) -> Round | None:
        """A round that the learner has to answer now, and can: it took a step from its anchor."""
        learner = self.learners[rank]
        for one in self._open:
            current = learner.versions[one.fragment] == one.version
            if rank in one.asked and not one.over and current and learner.steps[one.fragment]:
                one.asked.discard(rank)
                one.answering.add(rank)
                return one
        return None

    def answered(self, rank: int, one: Round, finite: bool) -> bool:
        """An answer has arrived; returns whether it counts.

        Args:
            finite: whether its numbers are; if not, the learner takes all fragments anew.
        """
        learner = self.learners[rank]
        one.answering.discard(rank)
        current = one.version == self._versions[one.fragment] == learner.versions[one.fragment]
        counts = finite and current and not one.over and learner.alive
        if counts:
            # Tokens squared by steps, in the paper: the more of both since the fragment came.
            steps, examples = learner.steps[one.fragment], learner.examples[one.fragment]
            one.answers[rank] = examples**2 / steps
            learner.taken += 1
        else:
            learner.dropped += 1
        if not finite:
            self.spoil(rank)
        self._note_quorum(one)
        return counts

    def to_merge(self) -> Round | None:
        """A round that has just ended: whoever is told so lets the servers merge it."""
        now = self._clock()
        for one in list(self._open):
            if one.over or not self._ends(one, now):
                continue
            one.over = True
            one.began = now
            if one.answers:
                return one
            self._open.remove(one)  # all who were asked are gone, or had nothing finite to say
        return None

    def end(self, one: Round) -> None:
        """Servers have merged it."""
        if one not in self._open:
            return
        self._open.remove(one)
        self._merge_seconds = _average(self._merge_seconds or None, self._clock() - one.began)
        self._versions[one.fragment] += 1
        self._merged_at[one.fragment] = self.total
        self.merged += 1

    @property
    def _alive(self) -> int:
        return sum(learner.alive for learner in self.learners)

    def _is_merging(self, fragment: int) -> bool:
        return any(one.over and one.fragment == fragment for one in self._open)

    def _may_begin(self) -> bool:
        fragment = self._begun % len(self._versions)
        taken = {one.fragment for one in self._open}
        return self._alive > 0 and len(self._open) < AT_ONCE and fragment not in taken

    def _begin(self) -> None:
        fragment = self._begun % len(self._versions)
        asked = {rank for rank, learner in enumerate(self.learners) if learner.alive}
        self._open.append(Round(fragment, self._versions[fragment], self._clock(), asked))
        self._begun += 1
        self._due = 0.0

    def _note_quorum(self, one: Round) -> None:
        if one.quorum_at is None and len(one.answers) >= min(self._quorum, max(1, self._alive)):
            one.quorum_at = self._clock()

    def _ends(self, one: Round, now: float) -> bool:
        if not one.asked and not one.answering:
            return True
        return one.quorum_at is not None and now >= one.quorum_at + self._grace_of(one)

    def _grace_of(self, one: Round) -> float:
        """What is left of an interval: gamma (tau t_step - t_quorum - t_sync), within limits."""
        seconds = [learner.seconds for learner in self.learners if learner.alive]
        paces = [1 / one for one in seconds if one]
        step = len(paces) / sum(paces) if paces else 0.0
        quorum = (one.quorum_at or one.began) - one.began
        grace = self._grace * (self._every * step - quorum - self._merge_seconds)
        limit = grace if self._grace_seconds is None else self._grace_seconds
        return max(0.0, min(grace, limit))


def _average(last: float | None, new: float) -> float:
    return new if last is None else _MEMORY * last + (1 - _MEMORY) * new
