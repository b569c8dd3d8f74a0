"""Named random streams."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part: independent random streams for (purpose, seed, task, epoch …)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
