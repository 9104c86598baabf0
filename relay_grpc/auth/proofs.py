"""What proves that somebody knows a key's secret: a MAC under a pepper in microseconds, or else an Argon2 hash. No I/O.

The hash is what is stored for good. The MAC beside it, HMAC-SHA256 under a pepper that is not in the database, spares
the hash: a restart with thousands of active keys comes up at once. Where the pepper is lost, or another is the first by
now, one hash proves the key and its MAC is made anew.
"""

import hashlib
import hmac
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import argon2

from relay_grpc.setting_types import NamedKey

if TYPE_CHECKING:
    from asyncpg import Record

# OWASP Password Storage Cheat Sheet: 19 MiB, 2 passes, 1 lane; about 30 ms.
HASHER = argon2.PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)


class KeyMac(NamedTuple):
    """A key's MAC, and the id of the pepper that it was made with."""

    mac: bytes
    pepper_id: str


class SealedKey(NamedTuple):
    """What is stored of a key. key_hash: Argon2id in PHC string format. key_mac, pepper_id: see KeyMac."""

    key_hash: str
    key_mac: bytes
    pepper_id: str


class Peppers:
    """peppers: at least one; the first makes MACs, all of them check."""

    def __init__(self, peppers: Sequence[NamedKey]) -> None:
        self._first = peppers[0]
        self._by_id = {pepper.id: pepper.key for pepper in peppers}

    def mac(self, key_text: str) -> KeyMac:
        return KeyMac(_mac(self._first.key, key_text), self._first.id)

    def tell(self, row: "Record", presented: str) -> bool | None:
        """Whether this is the row's key. None: it has no MAC under a pepper that is known here."""
        pepper = self._by_id.get(row["pepper_id"])
        return None if pepper is None else hmac.compare_digest(_mac(pepper, presented), row["key_mac"])

    def seal(self, key_text: str) -> SealedKey:
        """What is to be stored of a new key. It takes the time of a hash."""
        return SealedKey(HASHER.hash(key_text), *self.mac(key_text))


def matches(key_hash: str, presented: str) -> bool:
    """Whether the Argon2 hash is the key's."""
    try:
        return HASHER.verify(key_hash, presented)
    except argon2.exceptions.VerificationError:
        return False


def _mac(pepper: bytes, key_text: str) -> bytes:
    return hmac.digest(pepper, key_text.encode(), hashlib.sha256)
