"""Which exchange is cheapest: what each sends per worker and step, as formulas."""

from __future__ import annotations

from tfqcomm.compressors.base import Compressor

SCHEDULES = ("auto", "dense", "all_gather", "two_phase", "majority_vote")


def bytes_per_worker(schedule: str, payload: int, elements: int, world: int) -> float:
    """Bytes one of `world` workers sends per step.

    Args:
        schedule: "dense", "all_gather", "two_phase" or "majority_vote"; "shared_support" sends no
            more than those.
        payload: bytes of one worker's encoded message, p.
        elements: its floats, d.
        world: workers, W.
    """
    if schedule == "dense":
        return 2 * (world - 1) / world * 4 * elements
    if schedule == "all_gather":
        return (world - 1) * payload
    return 2 * (world - 1) / world * payload


def choose(schedule: str, compressor: Compressor, sizes: list[int], world: int) -> str:
    """Resolves "auto" to the schedule that sends the fewest bytes.

    * An adaptive codec has a schedule of its own: k first, then an all-gather.
    * So has one with a scale that all replicas share: levels are summed as integers.
    * And one of low rank: factors of matrices are summed.
    * And one whose entries one replica chooses: values are summed. Where positions and values are
      more than all numbers it is not compressed.
    * Codecs whose words may be summed are summed: a ring all-reduce of the payload.
    * Two-phase encodes the mean again. A sparse codec would lose most of the mean's entries in
      that, so for those the choice is between gathering and not compressing at all.
    * Of equals, gathering: one round of messages and one lossy step instead of two.

    Args:
        schedule: what the user asked for; anything but "auto" is returned as it is.
        sizes: elements of the tensors that would be compressed.
    """
    if compressor.adaptive:
        return "adaptive"
    if compressor.integer:
        return "integer"
    if compressor.low_rank:
        return "low_rank"
    if schedule != "auto":
        return schedule
    if compressor.linear:
        return "dense"
    payload = 4 * sum(compressor.num_words(n) for n in sizes)
    candidates = ["all_gather", "dense"] if compressor.sparse else ["all_gather", "two_phase"]
    if compressor.shared_support:
        candidates = ["shared_support", "dense"]
    return min(candidates, key=lambda s: bytes_per_worker(s, payload, sum(sizes), world))


def check(schedule: str, compressor: Compressor) -> None:
    """Refuses schedules that a compressor cannot follow.

    Raises:
        ValueError: naming what fits.
    """
    if schedule not in SCHEDULES:
        raise ValueError(
            f"Argument `schedule` must be one of {SCHEDULES}. Received: schedule={schedule!r}"
        )
    if compressor.adaptive and schedule not in ("auto", "all_gather"):
        raise ValueError(
            "Argument `schedule` must be 'auto' or 'all_gather' for a compressor that adapts. "
            f"Received: schedule={schedule!r}, compressor={compressor}"
        )
    if compressor.integer and schedule != "auto":
        raise ValueError(
            "Argument `schedule` must be 'auto' for a compressor whose scale all replicas share. "
            f"Received: schedule={schedule!r}, compressor={compressor}"
        )
    if compressor.shared_support and schedule != "auto":
        raise ValueError(
            "Argument `schedule` must be 'auto' for a compressor whose support all replicas share. "
            f"Received: schedule={schedule!r}, compressor={compressor}"
        )
    if compressor.low_rank and schedule != "auto":
        raise ValueError(
            "Argument `schedule` must be 'auto' for a compressor of low rank. "
            f"Received: schedule={schedule!r}, compressor={compressor}"
        )
    if schedule == "dense" and not compressor.linear:
        raise ValueError(
            "Argument `schedule` must be 'auto', 'all_gather' or 'two_phase' for a compressor "
            "whose words cannot be summed by an all-reduce. "
            f"Received: schedule='dense', compressor={compressor}"
        )
    if schedule == "majority_vote" and not compressor.signs:
        raise ValueError(
            "Argument `schedule` must not be 'majority_vote' for a compressor that sends more than "
            "signs: take 'block_sign'. "
            f"Received: schedule='majority_vote', compressor={compressor}"
        )
    if schedule in ("all_gather", "two_phase") and compressor.lossless:
        raise ValueError(
            "Argument `schedule` must be 'auto' or 'dense' without compression. "
            f"Received: schedule={schedule!r}, compressor={compressor}"
        )
