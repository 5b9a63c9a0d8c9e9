"""Bit rates and times as people write them: "100mbit", "1.5Gbit/s", "5ms"."""

from __future__ import annotations

import re

_THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_RATE = re.compile(r"(\d+(?:\.\d+)?) ?([kmg]?)(?:bit(?:/s|ps)?|b(?:/s|ps))", re.IGNORECASE)
_BYTES = re.compile(r"B(?:/s|ps)?$|bytes?", re.ASCII)
_LOWEST, _HIGHEST = 10**4, 10**11  # bits per second; a frame takes over a second below

_MICROSECONDS = {"us": 1, "ms": 10**3, "s": 10**6}
_TIME = re.compile(r"(\d+(?:\.\d+)?) ?(us|ms|s)", re.IGNORECASE)
_LONGEST = 10 * 10**6  # microseconds


def bits_per_second(text: str) -> int:
    """Reads a bit rate, 10kbit to 100gbit.

    Args:
        text: a number and a unit: bit, kbit, mbit or gbit, with or without "/s" or "ps"; or bps,
            b/s, kbps, Mb/s and so on. Upper and lower case are the same, but for a B that means
            bytes, which is refused.

    Raises:
        ValueError: what it must be.

    Example:
    >>> bits_per_second("100mbit"), bits_per_second("2.5 Gbps")
    (100000000, 2500000000)
    """
    found = _RATE.fullmatch(text.strip())
    if _BYTES.search(text.strip()):
        raise ValueError("must be in bits per second, not bytes, as in 100mbit or 1gbit")
    if not found:
        raise ValueError("must be a number and a unit, as in 100mbit, 1gbit or 2.5Mbps")
    return _within(found, _THOUSANDS, _LOWEST, _HIGHEST, "10kbit to 100gbit")


def microseconds(text: str) -> int:
    """Reads a time, 1us to 10s.

    Args:
        text: a number and a unit: us, ms or s.

    Raises:
        ValueError: what it must be.

    Example:
    >>> microseconds("200us"), microseconds("0.5ms")
    (200, 500)
    """
    found = _TIME.fullmatch(text.strip())
    if not found:
        raise ValueError("must be a number and a unit, as in 5ms, 200us or 0.1s")
    return _within(found, _MICROSECONDS, 1, _LONGEST, "1us to 10s")


def _within(found: re.Match, units: dict[str, int], lowest: int, highest: int, allowed: str) -> int:
    """The number found times its unit, if it is from `lowest` to `highest`."""
    number = round(float(found[1]) * units[found[2].lower()])
    if not lowest <= number <= highest:
        raise ValueError(f"must be from {allowed}")
    return number
