"""Workers compare what they are about to do, before a difference can hang or corrupt a run.

All questions are collectives of one fixed size, asked on the same group in program order. So a
worker that is about to create a variable and one that already wants to train still meet, and each
hears what the other is doing: first a digest of it, and only where digests differ the text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable

import numpy as np
import tensorflow as tf

_DIGEST_WORDS = 8  # SHA-256


def check_agreement(
    all_gather: Callable[[tf.Tensor], tf.Tensor],
    names: list[str],
    topic: str,
    facts: dict[str, str],
    notes: dict[str, str],
    evidence: bytes = b"",
    advice: str = "Start all workers with the same model, optimizer and compressor.",
) -> bool:
    """Compares `facts` across processes.

    Args:
        all_gather: int32[w] -> int32[P * w].
        names: the processes' addresses, in rank order.
        topic: what this process is about to do; compared as well.
        facts: what must be equal, by name.
        notes: what may differ, but helps to find the place.
        evidence: compared in the same exchange; it may differ.
        advice: what to do where facts differ.

    Returns:
        Whether `evidence` is the same everywhere.

    Raises:
        ValueError: on every process, with the facts that differ, and between whom.
    """
    facts = {name: _without_addresses(fact) for name, fact in facts.items()}
    text = _to_words(json.dumps({"step": topic, **facts, **notes}).encode())
    # int32[17]: digest of the facts | length of the text | digest of the evidence
    parts = [_digest(json.dumps([topic, facts]).encode()), np.array([len(text)]), _digest(evidence)]
    records = all_gather(tf.constant(np.concatenate(parts).astype(np.int32)))
    records = records.numpy().reshape([len(names), -1])
    equal = (records == records[0]).all(axis=0)
    if equal[:_DIGEST_WORDS].all():
        return bool(equal[_DIGEST_WORDS + 1 :].all())
    padded = np.zeros([records[:, _DIGEST_WORDS].max()], np.int32)
    padded[: len(text)] = text
    texts = all_gather(tf.constant(padded)).numpy().reshape([len(names), -1])
    raise ValueError(
        "The workers of this cluster were given different programs:\n"
        + "\n".join(_differences([_to_facts(words) for words in texts], names))
        + f"\n{advice}"
    )


def _digest(data: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(data).digest(), "<i4")


def _without_addresses(fact: str) -> str:
    """Python's default `repr` ends in an address, which differs between equal programs."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", fact)


def _to_words(text: bytes) -> np.ndarray:
    words = np.zeros([-(-len(text) // 4)], "<i4")
    words.view(np.uint8)[: len(text)] = np.frombuffer(text, np.uint8)
    return words.astype(np.int32)


def _to_facts(words: np.ndarray) -> dict[str, str]:
    return json.loads(words.astype("<i4").tobytes().rstrip(b"\0"))


def _differences(facts: list[dict[str, str]], names: list[str]) -> list[str]:
    """One paragraph for each fact that is not the same on all processes."""
    lines = []
    for key in dict.fromkeys(key for one in facts for key in one):
        values = [one.get(key, "(nothing)") for one in facts]
        if len(set(values)) > 1:
            lines.append(f"  {key}:")
            lines += [
                f"    worker {rank} ({name}): {value}"
                for rank, (name, value) in enumerate(zip(names, values, strict=True))
            ]
    return lines
