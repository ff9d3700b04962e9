"""Names for the contents of KV blocks.

The keys and values of a token depend on all tokens before it, so the name of a block covers the whole prefix: it is the
SHA-256 of the name of the block before it and of its own tokens. Equal names mean equal prefixes; SHA-256 because a
collision, which a hostile prompt could seek in a weaker hash, would show one user another's context.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable
from hashlib import sha256


def root_hash(cache_salt: str | None, private_to: int | None = None) -> bytes:
    """The parent of a first block.

    Args:
        cache_salt: requests with different salts never share blocks.
        private_to: a number that only the sequences of one request have, when nobody else may share their blocks.

    Returns:
        32 bytes.
    """
    # JSON keeps the two apart whatever the salt contains.
    return sha256(json.dumps([cache_salt, private_to]).encode()).digest()


def chain_hashes(parent: bytes, token_ids: Iterable[int], block_size: int) -> list[bytes]:
    """Names of the full blocks that `token_ids` fill; tokens of a last, partly filled block are ignored.

    Args:
        parent: name of the block before, or a root hash.
        token_ids: ids in `[0, 2**31)`; the first is the first of a block.
        block_size: tokens per block.

    Returns:
        One hash of 32 bytes per full block.
    """
    packed = array("i", token_ids)
    size_bytes = packed.itemsize * block_size
    data = packed.tobytes()
    hashes: list[bytes] = []
    for start in range(0, len(data) - size_bytes + 1, size_bytes):
        parent = sha256(parent + data[start : start + size_bytes]).digest()
        hashes.append(parent)
    return hashes
