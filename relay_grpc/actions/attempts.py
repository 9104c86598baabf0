"""One attempt: the connection's secrets are opened, its provider is called, and a result comes of it."""

import json
import logging
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import asyncpg

from relay_grpc.actions.execution import AttemptResult, Job, Outcome
from relay_grpc.actions.providers import Provider
from relay_grpc.actions.signing import Key, Scheme
from relay_grpc.audit import event
from relay_grpc.connections.secrets import HEADERS, Sealed, Undecryptable, Vault
from relay_grpc.telemetry import Tracer

log = logging.getLogger(__name__)
INTERRUPTED = AttemptResult(
    Outcome.INTERRUPTED, error="the instance that ran it stopped or lost its lease; it may have been delivered"
)

NOT_BEGUN = AttemptResult(
    Outcome.INTERRUPTED, error="the instance that was to run it stood still until it was too late", sent=False
)


class Attempts:
    """Makes attempts with these providers, and remembers nothing of them."""

    def __init__(self, vault: Vault, providers: Sequence[Provider], tracer: Tracer) -> None:
        self._vault = vault
        self._providers = {provider.name: provider for provider in providers}
        self._tracer = tracer

    async def make(self, row: asyncpg.Record) -> AttemptResult:
        """row: as it was leased. Raises only for defects."""
        attributes = {"relay.provider": row["provider"], "relay.action": row["action_type"]}
        with self._tracer.client("delivery.attempt", row["traceparent"], attributes) as trace:
            try:
                job = self._job(row, trace.traceparent)
            except Undecryptable as error:
                log.error("execution %s can't be signed: %s", row["id"], error)
                return _unsendable("a secret of the connection can't be decrypted")
            if not job.keys:
                return _unsendable("the connection has no valid signing secret")
            return await self._providers[row["provider"]].execute(job)

    def _job(self, row: asyncpg.Record, traceparent: str) -> Job:
        opened = [(secret["kind"], self._open(row, secret)) for secret in json.loads(row["secrets"] or "[]")]
        return Job(
            execution_id=row["id"],
            action=row["action_type"],
            parameters=row["parameters"],
            configuration=json.loads(row["configuration"]),
            keys=tuple(Key(Scheme(kind), raw) for kind, raw in opened if kind != HEADERS),
            headers=next((json.loads(raw) for kind, raw in opened if kind == HEADERS), {}),
            traceparent=traceparent,
        )

    def _open(self, row: asyncpg.Record, secret: Any) -> bytes:
        return self._vault.open(
            Sealed(
                secret["encryption_key_id"], bytes.fromhex(secret["wrapped_key"]), bytes.fromhex(secret["ciphertext"])
            ),
            workspace_id=row["workspace_id"],
            connection_id=row["connection_id"],
            secret_id=UUID(secret["id"]),
        )


def _unsendable(error: str) -> AttemptResult:
    return AttemptResult(Outcome.UNSENDABLE, error=error, sent=False)


def event_of(row: asyncpg.Record, result: AttemptResult, took: float) -> event.Event:
    """The audit event of an attempt. took: seconds."""
    delivered = result.outcome is Outcome.SUCCESS
    return event.Event(
        workspace_id=row["workspace_id"],
        action="delivery.attempt",
        status=event.Outcome.SUCCESS if delivered else event.Outcome.FAILED,
        reason="" if delivered else result.outcome.name,
        target=f"executions/{row['id']}",
        action_type=row["action_type"],
        provider=row["provider"],
        trace_id=row["traceparent"][3:35],
        duration=took,
    )
