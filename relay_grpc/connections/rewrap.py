"""Rotating the operator's encryption keys under way: secrets are encrypted under the first of them, batch by batch.

Only the key of each secret is encrypted anew, not the secret. Servers that have both keys serve meanwhile. Every batch
is a transaction with its event, so a run that breaks off is continued by the next.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from relay_grpc.audit.event import SYSTEM_WORKSPACE
from relay_grpc.connections.secrets import Sealed, Undecryptable, Vault
from relay_grpc.owner import as_owner, record

if TYPE_CHECKING:
    from relay_grpc.db import Connection

BATCH = 500


@dataclass(frozen=True, slots=True)
class Rewrapped:
    """count: secrets encrypted under the first key by this run. left: those that are not, and why, by their id.

    by_key: how many secrets each key encrypts now, by its id.
    """

    count: int
    left: Mapping[UUID, str]
    by_key: Mapping[str, int]


async def rewrap(url: str, encryption_keys: Mapping[str, bytes], told: Callable[[int], None]) -> Rewrapped:
    """Goes through all secrets once. told: called with the number of those done after each batch.

    encryption_keys: by id, the first of them is the one to use. Raises DatabaseUnusable.
    """
    vault, current = Vault(encryption_keys), next(iter(encryption_keys))
    count, left, last = 0, dict[UUID, str](), UUID(int=0)
    while True:
        async with as_owner(url) as connection:
            rows = await _lock(connection, current, after=last)
            if not rows:
                return Rewrapped(count, left, await _count(connection))
            problems = await _rewrap(connection, vault, rows)
            done = len(rows) - len(problems)
            if done:
                target = f"encryptionKeys/{current}"
                await record(connection, SYSTEM_WORKSPACE, "operator.RewrapSecrets", target, note=f"{done} secrets")
        count, left, last = count + done, left | problems, rows[-1]["id"]
        told(count)


async def _rewrap(connection: "Connection", vault: Vault, rows: list[asyncpg.Record]) -> dict[UUID, str]:
    """Returns why secrets were left as they are, by id."""
    wrapped, problems = [], dict[UUID, str]()
    for row in rows:
        sealed = Sealed(row["encryption_key_id"], row["wrapped_key"], row["ciphertext"])
        try:
            new = vault.rewrap(
                sealed, workspace_id=row["workspace_id"], connection_id=row["connection_id"], secret_id=row["id"]
            )
        except Undecryptable as error:
            problems[row["id"]] = str(error)
        else:
            wrapped.append((row["id"], new.encryption_key_id, new.wrapped_key))
    await connection.executemany(
        "UPDATE connection_secrets SET encryption_key_id = $2, wrapped_key = $3 WHERE id = $1", wrapped
    )
    return problems


async def _lock(connection: "Connection", current: str, *, after: UUID) -> list[asyncpg.Record]:
    """The next secrets that the current key does not encrypt, so that none is changed meanwhile."""
    return await connection.fetch(
        """
        SELECT id, workspace_id, connection_id, encryption_key_id, wrapped_key, ciphertext FROM connection_secrets
         WHERE encryption_key_id <> $1 AND id > $2
         ORDER BY id LIMIT $3 FOR NO KEY UPDATE
        """,
        current,
        after,
        BATCH,
    )


async def _count(connection: "Connection") -> Mapping[str, int]:
    rows = await connection.fetch("SELECT encryption_key_id, count(*) FROM connection_secrets GROUP BY 1 ORDER BY 1")
    return {row["encryption_key_id"]: row["count"] for row in rows}
