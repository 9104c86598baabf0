"""Whose key is it: the way from a presented key to a principal.

A key is proven once per process by Argon2id, off the event loop. From then on a keyed hash of the presented text finds
the proof in memory, in about a microsecond, and only the key's status is read again when it is older than `STATUS_TTL`.
"""

import asyncio
import hashlib
import secrets
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

import argon2
import asyncpg

from relay_grpc import errors
from relay_grpc.auth import keys, scopes, store
from relay_grpc.db import Database
from relay_grpc.principal import Principal, PrincipalType
from relay_grpc.telemetry import Metrics

# OWASP Password Storage Cheat Sheet: 19 MiB, 2 passes, 1 lane; about 30 ms.
HASHER = argon2.PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)
HASH_THREADS = 2
MAX_WAITING_HASHES = 64
STATUS_TTL = 5.0  # seconds for which another instance's revocation can go unnoticed
CACHE_SIZE = 100_000


@dataclass(slots=True)
class _Proof:
    """What a presented key turned out to be. principal None: it is no good."""

    principal: Principal | None
    key_hash: str
    fresh_until: float


class KeyVerifier:
    """Checks presented keys. One per process; close it. status_ttl: seconds for which a key's status is believed."""

    def __init__(self, db: Database, metrics: Metrics, *, status_ttl: float = STATUS_TTL) -> None:
        self._db = db
        self._metrics = metrics
        self._status_ttl = status_ttl
        self._proofs: OrderedDict[bytes, _Proof] = OrderedDict()
        self._under_way: dict[bytes, asyncio.Task[Principal | None]] = {}
        self._cache_key = secrets.token_bytes(32)
        self._threads = ThreadPoolExecutor(HASH_THREADS, "argon2")
        self._waiting_hashes = 0
        self._nobody = HASHER.hash(secrets.token_bytes(32))
        self._used: set[UUID] = set()
        self._changes = 0  # keys forgotten so far

    async def verify(self, presented: str) -> Principal:
        """The key's principal.

        Raises Unauthenticated for every key that is not valid, Overloaded when too many keys wait to be proven, and
        DependencyUnavailable.
        """
        digest = hashlib.blake2b(presented.encode(), digest_size=16, key=self._cache_key).digest()
        proof = self._proofs.get(digest)
        if proof is not None and proof.fresh_until > time.monotonic():
            principal = proof.principal
        else:
            public_id = keys.public_id_of(presented)
            if public_id is None:
                self._metrics.auth_failures.labels("malformed").inc()
                raise errors.Unauthenticated
            principal = await self._look_up_once(digest, presented, public_id)
        if principal is None or (principal.expires_at and principal.expires_at <= datetime.now(UTC)):
            self._metrics.auth_failures.labels("invalid").inc()
            raise errors.Unauthenticated
        self._used.add(UUID(principal.id))
        return principal

    async def _look_up_once(self, digest: bytes, presented: str, public_id: str) -> Principal | None:
        """Callers that present one key at one time share one look-up, which none of them can cancel."""
        task = self._under_way.get(digest)
        if task is None:
            task = self._under_way[digest] = asyncio.create_task(self._look_up(digest, presented, public_id))
            task.add_done_callback(lambda _: self._under_way.pop(digest))
        return await asyncio.shield(task)

    async def _look_up(self, digest: bytes, presented: str, public_id: str) -> Principal | None:
        asked, changes = time.monotonic(), self._changes
        async with self._db.anyone() as connection:
            row = await store.find_key(connection, public_id)
        proof = self._proofs.get(digest)
        if proof is not None and row is not None and proof.key_hash == row["key_hash"]:
            proven = proof.principal is not None or await self._matches(row["key_hash"], presented)
        else:
            # An unknown id costs a hash too: the time to refuse tells nothing about which ids exist.
            proven = await self._matches(row["key_hash"] if row else self._nobody, presented)
        principal = principal_of(row) if row and proven and row["revoked_at"] is None else None
        # What a key's change overtook on its way here is no longer to be believed.
        fresh_until = asked + self._status_ttl if changes == self._changes else 0.0
        self._proofs[digest] = _Proof(principal, row["key_hash"] if row else "", fresh_until)
        self._proofs.move_to_end(digest)
        if len(self._proofs) > CACHE_SIZE:
            self._proofs.popitem(last=False)
        return principal

    async def _matches(self, key_hash: str, presented: str) -> bool:
        if self._waiting_hashes >= MAX_WAITING_HASHES:
            raise errors.Overloaded("too many new keys at once; try again")
        self._waiting_hashes += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, _verify, key_hash, presented)
        finally:
            self._waiting_hashes -= 1
            self._metrics.key_hashes.inc()

    async def hash(self, key: str) -> str:
        """The Argon2id hash to store for a new key, in PHC string format."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, HASHER.hash, key)

    def forget(self, key_id: UUID) -> None:
        """Reads this key's status anew on its next use: it was changed."""
        self._changes += 1
        for proof in self._proofs.values():
            if proof.principal and proof.principal.id == str(key_id):
                proof.fresh_until = 0.0

    async def note_used(self) -> None:
        """Writes down which keys were used since the last time."""
        used, self._used = self._used, set()
        if used:
            try:
                async with self._db.worker() as connection:
                    await store.touch_keys(connection, used)
            except errors.DependencyUnavailable:
                self._used |= used

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def principal_of(row: asyncpg.Record) -> Principal:
    return Principal(
        type=PrincipalType.API_KEY,
        id=str(row["id"]),
        caller=f"key:{row['lineage_id']}",
        name=row["name"],
        workspace_id=row["workspace_id"],
        role=row["role"],
        scopes=scopes.effective(row["role"], row["scopes"]),
        expires_at=row["expires_at"],
    )


def _verify(key_hash: str, presented: str) -> bool:
    try:
        return HASHER.verify(key_hash, presented)
    except argon2.exceptions.VerificationError:
        return False
