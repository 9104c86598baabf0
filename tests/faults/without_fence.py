"""`relay` with a seeded defect: it stalls as in stalling.py, and what it then records needs no lease of its own.

It overwrites what the worker does that took over.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from relay_grpc.actions import leases
from relay_grpc.cli import main
from tests.faults import stalling as stalling

fenced = leases.complete


async def complete(connection: Any, completions: Sequence[leases.Completion]) -> Any:
    rows = await connection.fetch(
        "SELECT id, lease_token FROM action_executions WHERE id = ANY($1) AND lease_token IS NOT NULL",
        [one.execution_id for one in completions],
    )
    current = {row["id"]: row["lease_token"] for row in rows}
    return await fenced(
        connection, [replace(one, lease_token=current.get(one.execution_id, one.lease_token)) for one in completions]
    )


leases.complete = complete

if __name__ == "__main__":
    main()
