"""Damage to a message of wal2json."""

from __future__ import annotations

import random
from collections.abc import Sequence

BITES = [b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"null", b"true", b"1e5", b"-", b"0", b"\x00", b"\xff",
         b"\\ud800", b"\\u0000", b"9" * 25, b"9" * 4_301, b"1e99999999999999999999", b'"action":"C",', b"\xe2\x80\xa8",
         b'"columns":[],', b'"value":1,', b"[" * 2_000, b" "]  # fmt: skip


def mutate(chance: random.Random, message: bytes, others: Sequence[bytes]) -> bytes:
    """One to three times: a bit or byte changed, a piece cut out, put in, said twice, or of another message."""
    changed = bytearray(message)
    for _ in range(chance.randint(1, 3)):
        at, end = sorted((chance.randrange(len(changed) + 1), chance.randrange(len(changed) + 1)))
        piece = changed[at : min(end, at + 40)]
        match chance.choice(("bit", "byte", "cut", "short", "insert", "twice", "splice", "number")):
            case "bit" if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
            case "byte" if at < len(changed):
                changed[at] = chance.randrange(256)
            case "cut":
                del changed[at : at + chance.randint(1, 12)]
            case "short":
                del changed[chance.choice((at, end)) :]
            case "insert":
                changed[at:at] = chance.choice(BITES)
            case "twice":
                changed[at:at] = piece
            case "splice":
                other = chance.choice(others)
                changed[at:end] = other[chance.randrange(len(other)) :]
            case "number":
                changed = bytearray(changed.replace(b'"value":', b'"value":' + chance.choice(BITES), 1))
    return bytes(changed)
