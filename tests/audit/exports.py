"""A log in memory and the exports of it, by the server's own functions: what verifiers are tested with."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from relay.proofs import VerifierKey, canonical, commitment, leaf_hash

from relay_grpc.audit import export
from relay_grpc.audit.checkpoint import Signer
from relay_grpc.audit.event import ERASABLE, SALT_BYTES
from relay_grpc.audit.merkle import Tree, consistency, grow, inclusion
from relay_grpc.ids import uuid7

SIGNER = Signer({"test-key": bytes(range(32))})
KEYS = [VerifierKey.parse(key) for key in SIGNER.verifier_keys]


def row_of(workspace: UUID, index: int, **values: Any) -> dict[str, Any]:
    """A row as places.events_at reads it."""
    row: dict[str, Any] = {
        "leaf_index": index,
        "id": uuid7(),
        "workspace_id": workspace,
        "created_at": datetime(2026, 1, 2, 3, 4, 5, index, tzinfo=UTC),
        "actor_type": "user",
        "action": "ActionsService.Execute",
        "action_type": "webhook.send",
        "provider": "independent",
        "status": "success",
        "reason": "",
        "scopes": ["actions:execute"],
        "request_id": f"request {index} \x1f\u2028\N{GRINNING FACE}",
        "trace_id": "",
        "duration": timedelta(milliseconds=index),
        "count": 1,
        **dict.fromkeys(ERASABLE, ""),
        "actor_id": f"user-{index}",
        "peer": "192.0.2.1",
        **values,
    }
    row["salts"] = b"".join(uuid4().bytes for _ in ERASABLE)
    row["commitments"] = [
        commitment(row["salts"][SALT_BYTES * n : SALT_BYTES * (n + 1)], row[name]) if row[name] else None
        for n, name in enumerate(ERASABLE)
    ]
    return row


@dataclass
class Log:
    """A workspace's log of these rows."""

    workspace: UUID = field(default_factory=uuid4)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, count: int = 1, **values: Any) -> None:
        for _ in range(count):
            self.rows.append(row_of(self.workspace, len(self.rows), **values))

    @property
    def tree(self) -> Tree:
        return Tree(grow(0, {}, [leaf_hash(self.leaf(n)) for n in range(len(self.rows))]))

    def leaf(self, index: int) -> bytes:
        return canonical(export.leaf_of(self.rows[index]))

    def note(self, size: int) -> str:
        return SIGNER.note(self.workspace, size, self.tree.hash(0, size))

    def path(self, index: int) -> list[bytes]:
        return [self.tree.hash(*part) for part in inclusion(index, len(self.rows))]

    def consistency(self, first: int) -> list[bytes]:
        return [self.tree.hash(*part) for part in consistency(first, len(self.rows))]

    def export(self, first: int = 0, end: int | None = None, dropped: int | None = None) -> list[bytes]:
        """Events from `first` up to `end`; with times as if they had been asked for where a bound is given.

        dropped: the leaf of the event that tells of the newest drop; then `first` is what that leaves.
        """
        size, tree = len(self.rows), self.tree
        last: dict[str, Any] = {
            "checkpoint": self.note(size),
            "first": first,
            "end": size if end is None else end,
            "start_time": "2026-01-01T00:00:00+00:00" if first and dropped is None else None,
            "end_time": None if end is None else "2026-02-01T00:00:00+00:00",
            "left": [hashed.hex() for hashed in tree.perfect(0, first)],
            "right": [hashed.hex() for hashed in tree.perfect(size if end is None else end, size)],
            "dropped": None,
            "values": export.VALUES_STAY,
        }
        if dropped is not None:
            last["dropped"] = {
                "leaf_index": dropped,
                "event": export.leaf_of(self.rows[dropped]),
                "path": [hashed.hex() for hashed in self.path(dropped)],
            }
        return [*(export.jsonl(row) for row in self.rows[first : last["end"]]), export.line(last)]


def changed(lines: Sequence[bytes], at: int, **fields: Any) -> list[bytes]:
    """The lines with these fields of one of them set, deep ones by names with two underscores between."""
    content = json.loads(lines[at])
    for name, value in fields.items():
        *outer, inner = name.split("__")
        place = content
        for key in outer:
            place = place[key]
        place[inner] = value
    made = list(lines)
    made[at] = export.line(content)
    return made
