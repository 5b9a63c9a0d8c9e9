"""Workers compare what they are about to do, before a difference can hang or corrupt a run.

All questions are collectives of one fixed size, asked on the same group in program order. So a
worker that is about to create a variable and one that already wants to train still meet, and each
hears what the other is doing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import numpy as np
import tensorflow as tf

_RECORD_WORDS = 1024  # 4 KiB: a digest of everything, and as much of the text as fits
_DIGEST_WORDS = 8


def check_agreement(
    all_gather: Callable[[tf.Tensor], tf.Tensor],
    names: list[str],
    topic: str,
    facts: dict[str, str],
    notes: dict[str, str],
) -> None:
    """Compares `facts` across processes.

    Args:
        all_gather: int32[w] -> int32[P * w].
        names: the processes' addresses, in rank order.
        topic: what this process is about to do; compared as well.
        facts: what must be equal, by name.
        notes: what may differ, but helps to find the place.

    Raises:
        ValueError: on every process, with the facts that differ, and between whom.
    """
    record = _to_record(topic, facts, notes)
    records = all_gather(tf.constant(record)).numpy().reshape([-1, _RECORD_WORDS])
    if (records[:, :_DIGEST_WORDS] == records[0, :_DIGEST_WORDS]).all():
        return
    raise ValueError(
        "The workers of this cluster were given different programs:\n"
        + "\n".join(_differences(records, names))
        + "\nStart all workers with the same model, optimizer and compressor."
    )


def _to_record(topic: str, facts: dict[str, str], notes: dict[str, str]) -> np.ndarray:
    digest = hashlib.sha256(json.dumps([topic, facts]).encode()).digest()
    digest = np.frombuffer(digest, "<i4")
    text = json.dumps([topic, *facts.items(), *notes.items()], separators=(",", ":")).encode()
    body = np.zeros([_RECORD_WORDS - _DIGEST_WORDS], "<i4")
    clipped = text[: body.nbytes]
    body.view(np.uint8)[: len(clipped)] = np.frombuffer(clipped, np.uint8)
    return np.concatenate([digest, body]).astype(np.int32)


def _differences(records: np.ndarray, names: list[str]) -> list[str]:
    """One line for each fact that is not the same on all processes."""
    texts = [_to_facts(record) for record in records]
    keys = list(dict.fromkeys(key for text in texts for key in text))
    lines = []
    for key in keys:
        values = [text.get(key, "(nothing)") for text in texts]
        if len(set(values)) > 1:
            lines.append(f"  {key}:")
            lines += [
                f"    worker {rank} ({names[rank]}): {value}" for rank, value in enumerate(values)
            ]
    return lines or ["  (they differ beyond what fits into the comparison)"]


def _to_facts(record: np.ndarray) -> dict[str, str]:
    text = record[_DIGEST_WORDS:].astype("<i4").tobytes().rstrip(b"\0").decode(errors="replace")
    try:
        topic, *facts = json.loads(text)
    except json.JSONDecodeError:  # longer than the record: the digest alone was complete
        return {"program": text[:2000]}
    return {"step": topic, **dict(facts)}
