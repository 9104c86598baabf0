"""Whose key is it: the way from a presented key to a principal.

1. A keyed hash of the presented text finds what was proven before, in about a microsecond; it is proven until it is
   evicted. Only the key's status is read again, when it is older than `STATUS_TTL` or its workspace has changed.
2. Its shape and checksum, offline.
3. One look-up, in a batch with whatever else is looked up.
4. A MAC proves it at once; where none can tell, exactly one Argon2 hash does, unless there were too many wrong ones.

Nothing of the way tells an unknown key from a wrong one: not the answer, not its time.
"""

import asyncio
import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg

from relay_grpc import errors
from relay_grpc.auth import keys, scopes, store
from relay_grpc.auth.changes import Changes
from relay_grpc.auth.hashes import Hashes
from relay_grpc.auth.lookups import Found, Lookups
from relay_grpc.auth.proofs import KeyMac, Peppers, SealedKey
from relay_grpc.auth.throttle import network_of
from relay_grpc.db import Database
from relay_grpc.principal import Limits, Principal, PrincipalType
from relay_grpc.setting_types import NamedKey
from relay_grpc.telemetry import Metrics

STATUS_TTL = 5.0  # seconds for which a change can go unnoticed while nobody tells of changes
MAX_PROOFS = 100_000
MAX_REFUSALS = 10_000  # apart, so that guesses can't push good keys out


class KeyState(StrEnum):
    """What became of a key that is not just looked for by its holder."""

    VALID = "valid"
    NOT_FOUND = "not_found"
    REVOKED = "revoked"
    EXPIRED = "expired"


class Examined(NamedTuple):
    """principal: None where the key was not found."""

    state: KeyState
    principal: Principal | None = None


@dataclass(frozen=True, slots=True)
class _Proof:
    """A presented key that was proven to be the one with this hash, and how that stood at `read_at`."""

    key_hash: str
    key_id: UUID
    principal: Principal
    is_revoked: bool
    has_expired: bool  # by the database's clock, which ours may be behind
    read_at: float

    @property
    def state(self) -> KeyState:
        expires_at = self.principal.expires_at
        if self.is_revoked:
            return KeyState.REVOKED
        has_expired = self.has_expired or (expires_at is not None and expires_at <= datetime.now(UTC))
        return KeyState.EXPIRED if has_expired else KeyState.VALID


class _Refusal(NamedTuple):
    """A presented key that was proven not to be the one with this hash. None: there was no key of its id."""

    key_hash: str | None
    read_at: float


class KeyVerifier:
    """Checks presented keys. One per process; close it. status_ttl: seconds for which a key's status is believed."""

    def __init__(
        self,
        db: Database,
        metrics: Metrics,
        changes: Changes,
        peppers: Sequence[NamedKey],
        *,
        status_ttl: float = STATUS_TTL,
    ) -> None:
        self._db = db
        self._metrics = metrics
        self._changes = changes
        self._peppers = Peppers(peppers)
        self._status_ttl = status_ttl
        self._lookups = Lookups(db, store.find_keys)
        self._hashes = Hashes(metrics)
        self._proofs: OrderedDict[bytes, _Proof] = OrderedDict()
        self._refusals: OrderedDict[bytes, _Refusal] = OrderedDict()
        self._under_way: dict[bytes, asyncio.Task[_Proof | None]] = {}
        self._cache_key = secrets.token_bytes(32)
        self._used: set[UUID] = set()
        self._macs: dict[UUID, KeyMac] = {}  # to be written

    async def verify(self, presented: str, peer: str) -> Principal:
        """The key's principal. peer: the address of whoever presents it.

        Raises Unauthenticated for every key that is not valid, Throttled after too many of them, Overloaded when too
        many keys wait to be proven, and DependencyUnavailable.
        """
        digest = self._digest(presented)
        proof = self._proofs.get(digest)
        if proof is None or not self._is_fresh(proof):
            proof = await self._check(digest, presented, peer)
        if proof is None or proof.state is not KeyState.VALID:
            self._metrics.auth_failures.labels("invalid").inc()
            raise errors.Unauthenticated(proof.principal if proof else None)
        self._used.add(proof.key_id)
        return proof.principal

    async def examine(self, presented: str, workspace_id: UUID) -> Examined:
        """What this workspace may know of a key that somebody presented to it; this is no use of the key.

        The key of another workspace is answered like one that does not exist, and nothing is told of a key whose secret
        is wrong. Raises Throttled, Overloaded and DependencyUnavailable.
        """
        public_id = keys.public_id_of(presented)
        if public_id is None:
            return Examined(KeyState.NOT_FOUND)
        found = await self._lookups.find(public_id)
        if found.row is None or found.row["workspace_id"] != workspace_id:
            return Examined(KeyState.NOT_FOUND)
        if self._peppers.tell(found.row, presented) is False:
            return Examined(KeyState.NOT_FOUND)
        digest = self._digest(presented)
        proof = await self._prove(digest, presented, found, {"workspace": str(workspace_id)})
        return Examined(proof.state, proof.principal) if proof else Examined(KeyState.NOT_FOUND)

    async def seal(self, key_text: str) -> SealedKey:
        """What is to be stored of a new key."""
        return await self._hashes.seal(self._peppers, key_text)

    async def note_used(self) -> None:
        """Writes down which keys were used since the last time, and the MACs that were missing."""
        used, self._used = self._used, set()
        macs, self._macs = self._macs, {}
        if not used and not macs:
            return
        try:
            async with self._db.worker() as connection:
                await store.touch_keys(connection, used)
                if macs:
                    await store.set_macs(connection, macs)
        except BaseException as error:  # a stop too: what is lost midway is written the next time
            self._used |= used
            self._macs = macs | self._macs
            if not isinstance(error, errors.RelayError):
                raise

    async def close(self) -> None:
        self._hashes.close()
        await self._lookups.close()

    def _digest(self, presented: str) -> bytes:
        return hashlib.blake2b(presented.encode(), digest_size=16, key=self._cache_key).digest()

    def _is_fresh(self, proof: _Proof) -> bool:
        is_young = time.monotonic() < proof.read_at + self._status_ttl
        return is_young and self._changes.hold(proof.principal.workspace_id, proof.read_at)

    async def _check(self, digest: bytes, presented: str, peer: str) -> _Proof | None:
        """Reads the key's status, and proves it unless it was. None: it is no key."""
        refusal = self._refusals.get(digest)
        if refusal and time.monotonic() < refusal.read_at + self._status_ttl:
            return None
        public_id = keys.public_id_of(presented)
        if public_id is None:
            self._metrics.auth_failures.labels("malformed").inc()
            raise errors.Unauthenticated
        while True:
            try:
                proof = await self._look_up_once(digest, presented, public_id, peer)
            except errors.Throttled:
                self._metrics.auth_failures.labels("throttled").inc()
                raise
            # A change may have overtaken the look-up, which began before this call or waited for a hash.
            if proof is None or self._changes.hold(proof.principal.workspace_id, proof.read_at):
                return proof

    async def _look_up_once(self, digest: bytes, presented: str, public_id: str, peer: str) -> _Proof | None:
        """Callers that present one key at one time share one look-up, which none of them can cancel."""
        task = self._under_way.get(digest)
        if task is None:
            task = self._under_way[digest] = asyncio.create_task(self._look_up(digest, presented, public_id, peer))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen: nobody may be left
        return await asyncio.shield(task)

    async def _look_up(self, digest: bytes, presented: str, public_id: str, peer: str) -> _Proof | None:
        try:
            found = await self._lookups.find(public_id)
            return await self._prove(digest, presented, found, {"peer": network_of(peer), "key": public_id})
        finally:
            del self._under_way[digest]  # now, not in a callback: one that has ended is nothing to wait for

    async def _prove(
        self, digest: bytes, presented: str, found: Found[asyncpg.Record], subjects: Mapping[str, str]
    ) -> _Proof | None:
        """The proof, with the status that was found, kept for later. subjects: of the throttle."""
        row, read_at = found
        key_hash = row["key_hash"] if row else None
        proof, refusal = self._proofs.get(digest), self._refusals.get(digest)
        if proof and proof.key_hash == key_hash:
            proven = True
        elif refusal and refusal.key_hash == key_hash:
            proven = False
        elif row and self._peppers.tell(row, presented):
            proven = True
        else:
            proven = await self._hashes.match(key_hash, presented, subjects)
        if row is None or not proven:
            _keep(self._refusals, digest, _Refusal(key_hash, read_at), MAX_REFUSALS)
            return None
        if proof is None and (mac := self._peppers.mac(presented)) != (row["key_mac"], row["pepper_id"]):
            self._macs[row["id"]] = mac
        is_revoked, has_expired = row["revoked_at"] is not None, row["has_expired"]
        proof = _Proof(row["key_hash"], row["id"], principal_of(row), is_revoked, has_expired, read_at)
        _keep(self._proofs, digest, proof, MAX_PROOFS)
        return proof


def principal_of(row: asyncpg.Record) -> Principal:
    return Principal(
        type=PrincipalType.API_KEY,
        id=str(row["id"]),
        caller=f"key:{row['lineage_id']}",
        name=row["name"],
        workspace_id=row["workspace_id"],
        role=row["role"],
        scopes=scopes.kept(scopes.of_role(row["role"], row["role_parent"], row["role_scopes"]), row["scopes"]),
        expires_at=row["expires_at"],
        limits=Limits(row["calls_per_minute"], row["executions_per_minute"]),
        workspace_limits=Limits(row["workspace_calls_per_minute"], row["workspace_executions_per_minute"]),
    )


def _keep(cache: OrderedDict[bytes, Any], digest: bytes, entry: Any, most: int) -> None:
    """Puts the entry in as the youngest one, and the oldest one out where there are too many."""
    cache[digest] = entry
    cache.move_to_end(digest)
    if len(cache) > most:
        cache.popitem(last=False)
