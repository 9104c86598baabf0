"""Calls of audited RPCs that end in a certain way, what they changed, and what the log says of them."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any
from uuid import UUID, uuid4

from relay_grpc.call import Method
from tests.rpc.resources import FREE, NAMES, Kind, Neighbours, nobodys, request
from tests.rpc.wire import METHODS, Answer

AUDITED = {name: method for name, method in METHODS.items() if method.audited}
ENDLESS = {"AuditService.TailEvents"}  # its caller ends it
ENDED = {"ActionsService.CancelRecovery"}  # a recovery of nothing is over at once, and its cancellation is no change
READS = {method.name for method in AUDITED.values() if method.service == "AuditService"}
CHANGES = AUDITED.keys() - READS - ENDED
IN_EVERY_RUN = (
    "AuthService.CreateApiKey",
    "ConnectionsService.DeleteConnection",
    "ActionsService.Preview",
    "ActionsService.Execute",
    "AuditService.GetEvent",
)
# What a change may write to.
TABLES = (
    *("api_keys", "custom_roles", "user_roles", "connections", "connection_secrets", "previews", "action_executions"),
    "recoveries",
)
# Their columns that calls change, and nothing in the background.
OF = {"api_keys": " OF revoked_at, retires_at", "recoveries": " OF cancelled"}
_peers: Iterator[int] = count(1)


@dataclass(frozen=True)
class Told:
    """What an event says of a call."""

    workspace_id: UUID
    actor_type: str
    actor_id: str
    outcome: str
    reason: str
    params_hash: str
    params_prefix: str


@dataclass(frozen=True)
class Ended:
    """A call that has ended. changed: whether it did anything. events: all that tell of it."""

    answer: Answer
    changed: bool
    events: list[Told]

    @property
    def told(self) -> Told:
        (only,) = self.events
        return only


async def names_for(two: Neighbours, method: Method, key: str = "") -> dict[str, str]:
    """What a request of the method may name, all of it new."""
    kinds = {field: kind for field, kind in NAMES[method.name].items() if kind is not Kind.PAGE_TOKEN}
    return {field: await two.ours.new(kind, key) for field, kind in kinds.items()}


def nobodys_names(method: Method) -> dict[str, str]:
    """Those for which there must be something; there is nothing."""
    unnamed = FREE | {Kind.PAGE_TOKEN, Kind.CURSOR, Kind.ROLE}
    return {field: nobodys(kind) for field, kind in NAMES[method.name].items() if kind not in unnamed}


async def unleashed(two: Neighbours, method: Method, content: Any, key: str | None = None, **more: Any) -> Ended:
    """Makes the call, from an address of its own, and looks at what came of it when all is quiet."""
    request_id, number = f"outcome-{uuid4().hex}", next(_peers)
    before = await state(two)
    answer = await two.wire.call(
        method,
        content,
        two.ours.tenant.admin if key is None else key,
        **{"timeout": 1.5 if method.name in ENDLESS else 30, "x_forwarded_for": f"10.7.{number // 200}.{number % 200}"}
        | {"x_request_id": request_id}
        | more,
    )
    return Ended(answer, await state(two) != before, await events(two, str(more.get("x_request_id", request_id))))


async def successful(two: Neighbours, method: Method) -> Any:
    """A request that succeeds."""
    return request(method, await names_for(two, method))


async def events(two: Neighbours, request_id: str) -> list[Told]:
    """All that tell of a call, those among them that count."""
    await two.relay.app.recorder.flush(everything=True)
    rows = await two.postgres.fetch(
        """
        SELECT workspace_id, actor_type, actor_id, status AS outcome, reason, params_hash, params_prefix, count
          FROM audit_events WHERE request_id = $1
        """,
        request_id,
    )
    assert {row["count"] for row in rows} <= {1}
    return [Told(**{name: value for name, value in row.items() if name != "count"}) for row in rows]


async def state(two: Neighbours) -> set[str]:
    """All that the tenant has, but for its log."""
    return {row for row in await two.ours.rows() if not row.startswith("audit_")}


@asynccontextmanager
async def defective(two: Neighbours) -> AsyncIterator[None]:
    """Nothing can be changed, and no event be read: a defect each time. Events can be written."""
    await two.postgres.execute(
        """
        CREATE FUNCTION seeded() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN 1 / 0; END $$
        """
    )
    for table in TABLES:
        change = f"INSERT OR DELETE OR UPDATE{OF.get(table, '')}"
        await two.postgres.execute(f"CREATE TRIGGER seeded BEFORE {change} ON {table} EXECUTE FUNCTION seeded()")
    await two.postgres.execute("REVOKE SELECT ON audit_events, audit_leaves, audit_checkpoints FROM relay_app")
    try:
        yield
    finally:
        await two.postgres.execute("GRANT SELECT ON audit_events, audit_leaves, audit_checkpoints TO relay_app")
        await two.postgres.execute("DROP FUNCTION seeded() CASCADE")


@asynccontextmanager
async def held_up(two: Neighbours) -> AsyncIterator[None]:
    """Changes and reads of the log wait; whoever calls is known all the same."""
    async with two.postgres.transaction():
        await two.postgres.execute(f"LOCK TABLE {', '.join(TABLES)} IN EXCLUSIVE MODE")
        await two.postgres.execute("LOCK TABLE audit_leaves, audit_checkpoints IN ACCESS EXCLUSIVE MODE")
        yield


@asynccontextmanager
async def slow_commits(url: Any, marker: str, seconds: float) -> AsyncIterator[None]:
    """The commit of an event whose request id begins with the marker takes so long. url: a superuser's connection."""
    await url.execute(
        f"""
        CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS $$
          BEGIN PERFORM pg_sleep({seconds}); RETURN NULL; END $$
        """
    )
    await url.execute(
        f"""
        CREATE CONSTRAINT TRIGGER slowly AFTER INSERT ON audit_logs DEFERRABLE INITIALLY DEFERRED
          FOR EACH ROW WHEN (NEW.request_id LIKE '{marker}%') EXECUTE FUNCTION slowly()
        """
    )
    try:
        yield
    finally:
        await url.execute("DROP FUNCTION slowly() CASCADE")
