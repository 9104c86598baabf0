"""A verifier of the test's own on a database: what an instance of Relay checks keys with, and nothing else of it."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from relay_grpc import errors
from relay_grpc.auth.changes import Changes
from relay_grpc.auth.verifier import STATUS_TTL, KeyVerifier
from relay_grpc.db import Database
from relay_grpc.principal import Principal
from relay_grpc.setting_types import NamedKey
from relay_grpc.telemetry import Metrics
from tests.actions.caller import eventually

PEER = "192.0.2.1"


@dataclass
class Instance:
    verifier: KeyVerifier
    metrics: Metrics
    changes: Changes
    db: Database

    @property
    def hashes(self) -> int:
        """How many it has made."""
        return int(self.metrics.registry.get_sample_value("relay_key_hashes_total") or 0)

    async def verify(self, key: str, peer: str = PEER) -> Principal:
        return await self.verifier.verify(key, peer)

    async def refuses(self, key: str, peer: str = PEER) -> bool:
        """Whether the key is no credential, and for no other reason."""
        try:
            await self.verifier.verify(key, peer)
        except errors.Unauthenticated:
            return True
        return False


@asynccontextmanager
async def an_instance(
    url: str, peppers: Sequence[NamedKey], *, status_ttl: float = STATUS_TTL
) -> AsyncIterator[Instance]:
    metrics = Metrics()
    db = await Database.open(url, connections=1)
    changes = Changes(db, metrics)
    verifier = KeyVerifier(db, metrics, changes, peppers, status_ttl=status_ttl)
    try:
        # What was read before it listens is read again then.
        await eventually(lambda: metrics.registry.get_sample_value("relay_changes_listening"))
        yield Instance(verifier, metrics, changes, db)
    finally:
        await verifier.close()
        await changes.close()
        await db.close()
