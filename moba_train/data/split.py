"""Which texts are for validation: by a hash of the text alone, so the same on every machine. Standard library only."""

from __future__ import annotations

import hashlib

__all__ = ["text_hash", "valid_threshold"]


def text_hash(text: str) -> int:
    """The first 64 bits of the text's sha256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def valid_threshold(fraction: float, lowest: int) -> int:
    """Texts with a hash below this are for validation; where none would be, the one with the `lowest` hash is."""
    return max(int(fraction * (1 << 64)), lowest + 1)
