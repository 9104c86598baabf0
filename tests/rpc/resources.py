"""What requests name: which field of which method names what, and tenants that have some of everything.

A method or a text field that is missing here fails test_matrix.py: say what its request names, or that it names none.
"""

import re
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum, auto
from itertools import count
from pathlib import Path
from secrets import token_hex
from typing import Any
from uuid import uuid4

import asyncpg
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from relay_grpc.auth import keys
from relay_grpc.auth.scopes import SCOPES
from relay_grpc.call import Method
from tests.actions.caller import eventually
from tests.auth.issuer import AUDIENCE, Issuer, issuing
from tests.contract.requests import all_fields, fitting, put, rules_of
from tests.harness import Receiver, Relay, Tenant, receiving, running, settings_for
from tests.rpc.wire import METHODS, Wire, wired


class Kind(StrEnum):
    """What a field names, of a tenant's and of no other's."""

    API_KEY = auto()
    SECRET = auto()  # an API key's text
    CONNECTION = auto()
    PREVIEW = auto()
    EXECUTION = auto()  # that has succeeded
    PENDING = auto()  # an execution too
    UNKNOWN = auto()  # and another
    EVENT = auto()
    REQUEST = auto()  # a request id
    ROLE = auto()
    USER = auto()
    RECOVERY = auto()
    AUTHORIZATION = auto()  # of methods that are not built yet: nobody has one
    PAGE_TOKEN = auto()
    CURSOR = auto()  # of a tail
    # New names: what other tenants call theirs is free.
    NEW_CONNECTION = auto()
    NEW_ROLE = auto()
    NEW_USER = auto()
    IDEMPOTENCY_KEY = auto()


FREE = {Kind.NEW_CONNECTION, Kind.NEW_ROLE, Kind.NEW_USER, Kind.IDEMPOTENCY_KEY}
PAGE = {"page_token": Kind.PAGE_TOKEN}
NAMES: Mapping[str, Mapping[str, Kind]] = {
    "AuthService.WhoAmI": {},
    "AuthService.CreateApiKey": {"role": Kind.ROLE},
    "AuthService.GetApiKey": {"id": Kind.API_KEY},
    "AuthService.ListApiKeys": PAGE,
    "AuthService.RotateApiKey": {"id": Kind.API_KEY},
    "AuthService.RevokeApiKey": {"id": Kind.API_KEY},
    "AuthService.VerifyApiKey": {"key": Kind.SECRET},
    "AuthService.AssignRole": {"role": Kind.ROLE, "user_id": Kind.NEW_USER},
    "AuthService.ListRoleAssignments": PAGE,
    "AuthService.RemoveRole": {"user_id": Kind.USER},
    "AuthService.CreateRole": {"name": Kind.NEW_ROLE},
    "AuthService.ListRoles": PAGE,
    "AuthService.DeleteRole": {"name": Kind.ROLE},
    "ConnectionsService.CreateConnection": {"name": Kind.NEW_CONNECTION},
    "ConnectionsService.GetConnection": {"id": Kind.CONNECTION},
    "ConnectionsService.ListConnections": PAGE,
    "ConnectionsService.UpdateConnection": {"connection.id": Kind.CONNECTION, "connection.name": Kind.NEW_CONNECTION},
    "ConnectionsService.DeleteConnection": {"id": Kind.CONNECTION},
    "ConnectionsService.RotateSecret": {"id": Kind.CONNECTION},
    "ConnectionsService.StartAuthorization": {},
    "ConnectionsService.CompleteAuthorization": {"state": Kind.AUTHORIZATION, "code": Kind.AUTHORIZATION},
    "ActionsService.ListActions": PAGE,
    "ActionsService.Preview": {"connection_id": Kind.CONNECTION},
    "ActionsService.GetPreview": {"id": Kind.PREVIEW},
    "ActionsService.Execute": {"preview_id": Kind.PREVIEW, "idempotency_key": Kind.IDEMPOTENCY_KEY},
    "ActionsService.GetExecution": {"id": Kind.EXECUTION},
    "ActionsService.ListExecutions": {**PAGE, "connection_id": Kind.CONNECTION},
    "ActionsService.WatchExecution": {"id": Kind.EXECUTION},
    "ActionsService.ListAttempts": {**PAGE, "execution_id": Kind.EXECUTION},
    "ActionsService.CancelExecution": {"id": Kind.PENDING},
    "ActionsService.ResendExecution": {"id": Kind.EXECUTION},
    "ActionsService.ReconcileExecution": {"id": Kind.UNKNOWN},
    "ActionsService.RecoverExecutions": {"connection_id": Kind.CONNECTION},
    "ActionsService.GetRecovery": {"id": Kind.RECOVERY},
    "ActionsService.CancelRecovery": {"id": Kind.RECOVERY},
    "ActionsService.SetApprovalPolicy": {},
    "ActionsService.ListApprovalPolicies": PAGE,
    "ActionsService.ListPendingApprovals": PAGE,
    "ActionsService.Approve": {"preview_id": Kind.PREVIEW},
    "ActionsService.Reject": {"preview_id": Kind.PREVIEW},
    "AuditService.ListEvents": {**PAGE, "actor_id": Kind.API_KEY, "request_id": Kind.REQUEST},
    "AuditService.GetEvent": {"id": Kind.EVENT},
    "AuditService.ExportEvents": {},
    "AuditService.TailEvents": {"cursor": Kind.CURSOR},
    "AuditService.GetCheckpoint": {},
    "AuditService.GetInclusionProof": {"event_id": Kind.EVENT},
    "AuditService.GetConsistencyProof": {},
}
# Fields that narrow a listing down: with what is not there, it is empty.
FILTERS = {
    ("ActionsService.ListExecutions", "connection_id"),
    ("AuditService.ListEvents", "actor_id"),
    ("AuditService.ListEvents", "request_id"),
}
# Texts that name no row: of the catalogue, of the world outside, or for people.
PLAIN = {
    *("action", "connection.disabled_reason", "connection.provider", "connection.signing_secret"),
    *("connection.signing_keys.id", "connection.signing_keys.public_key", "connection.webhook.url", "digest"),
    *("issuer", "name", "parent", "policy.action", "provider", "reason", "role", "scopes", "signing_secret"),
    "webhook.url",
}
_TEXT = re.compile(r'"([^"\\]{8,})"')
_numbers = count()


def unfilled(methods: Mapping[str, Method]) -> list[str]:
    """What NAMES does not say of these methods' requests, and what it says that is not so."""
    missing = sorted(methods.keys() - NAMES.keys())
    for name in sorted(methods.keys() & NAMES.keys()):
        texts = {
            path(fields): fields[-1]
            for fields in all_fields(methods[name].input_type.DESCRIPTOR)
            if fields[-1].type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
        }
        told = NAMES[name].keys()
        missing += [f"{name}: {text}" for text in texts.keys() - told - PLAIN]
        missing += [f"{name}: {text}" for text in texts.keys() - told if rules_of(texts[text]).string.uuid]
        missing += [f"{name} has no text {text}" for text in told - texts.keys()]
    return missing


def path(fields: tuple[FieldDescriptor, ...]) -> str:
    return ".".join(one.name for one in fields)


def request(method: Method, values: Mapping[str, str]) -> Message:
    """A request that a tenant with a default connection may make. values: by path."""
    message: Any = fitting(method.input_type.DESCRIPTOR)
    match method.name:
        case "ActionsService.Preview":
            message.action = "webhook.send"
            message.parameters.update({"payload": {}})
        case "ConnectionsService.CreateConnection":
            message.webhook.url = "http://127.0.0.1:9/"
        case "ConnectionsService.UpdateConnection":
            message.update_mask.paths.append("name")
        case "AuthService.CreateApiKey":
            message.role = "viewer"
        case "AuthService.AssignRole":
            message.role = "viewer"
        case "AuthService.CreateRole":
            message.parent, message.scopes[:] = "viewer", ["actions:read"]
    for name, value in values.items():
        put(message, next(fields for fields in all_fields(message.DESCRIPTOR) if path(fields) == name), value)
    return message


def nobodys(kind: Kind) -> str:
    """What could be such a thing's name, and is not."""
    match kind:
        case Kind.SECRET:
            return keys.generate(live=False).text
        case Kind.API_KEY | Kind.CONNECTION | Kind.PREVIEW | Kind.EVENT | Kind.RECOVERY:
            return str(uuid4())
        case Kind.EXECUTION | Kind.PENDING | Kind.UNKNOWN:
            return str(uuid4())
        case _:
            return f"nobodys-{token_hex(8)}"


@dataclass(eq=False)
class Estate:
    """A tenant with some of everything.

    mark: in every name that it gives. postgres: a connection past every wall. issuer: whose users it has.
    standing: one of each kind, which is not used up.
    """

    tenant: Tenant
    mark: str
    wire: Wire
    postgres: Any
    issuer: str = ""
    default_connection: str = ""
    standing: dict[Kind, str] = field(default_factory=dict)

    async def settle(self, webhook_url: str, kinds: Iterable[Kind]) -> None:
        """Makes one of each of these kinds. Its default connection delivers to the URL."""
        method = METHODS["ConnectionsService.CreateConnection"]
        new = method.input_type(name=f"{self.mark}-default", webhook={"url": webhook_url}, default=True)
        self.default_connection = (await self.wire.call(method, new, self.tenant.admin)).reply.id
        for kind in kinds:
            self.standing[kind] = await (self.taken(kind) if kind in FREE else self.new(kind))

    async def add_attempt(self) -> None:
        """A second one, of its standing execution: deliveries to tests succeed at once."""
        await self.postgres.execute(
            """
            INSERT INTO execution_attempts
              (execution_id, number, workspace_id, started_at, outcome, status_code, response_excerpt, error)
            SELECT execution_id, 2, workspace_id, started_at, outcome, status_code, $2, error
              FROM execution_attempts WHERE execution_id = $1
            """,
            self.standing[Kind.EXECUTION],
            f"{self.mark}-excerpt",
        )

    async def new(self, kind: Kind, key: str = "") -> str:
        """The name of a new one. key: of the caller that is to use it, for what is bound to its caller."""
        name = f"{self.mark}-{next(_numbers)}"
        match kind:
            case Kind.API_KEY | Kind.SECRET:
                made = await self._do("AuthService.CreateApiKey", {"name": name})
                return str(made.id if kind is Kind.API_KEY else made.secret)
            case Kind.CONNECTION:
                return str((await self._do("ConnectionsService.CreateConnection", {"name": name})).id)
            case Kind.PREVIEW:
                return await self._preview(key)
            case Kind.EXECUTION:
                return await self._execute(name)
            case Kind.PENDING | Kind.UNKNOWN:
                return await self._unsettled(name, kind)
            case Kind.RECOVERY:
                return str((await self._do("ActionsService.RecoverExecutions", {})).id)
            case Kind.EVENT | Kind.REQUEST:
                column = {Kind.EVENT: "id", Kind.REQUEST: "request_id"}[kind]
                query = f"SELECT {column} FROM audit_events WHERE workspace_id = $1 AND request_id <> ''"
                return str(await self.postgres.fetchval(query, self.tenant.workspace_id))
            case Kind.CURSOR:
                return self.standing.get(kind) or await self._cursor()  # an old one: much comes after it
            case Kind.ROLE:
                insert = "INSERT INTO custom_roles (workspace_id, name, parent, scopes, created_by)"
                values = "VALUES ($1, $2, 'viewer', '{actions:read}', $2)"
                await self.postgres.execute(f"{insert} {values}", self.tenant.workspace_id, name)
                return name
            case Kind.USER:
                await self.give_role(name, "viewer")
                return name
            case _:
                return nobodys(kind)

    async def give_role(self, user: str, role: str) -> None:
        await self.postgres.execute(
            """
            INSERT INTO user_roles (id, workspace_id, issuer, user_id, role, created_by)
            VALUES (gen_random_uuid(), $1, $2, $3, $4, $3)
            """,
            self.tenant.workspace_id,
            self.issuer,
            user,
            role,
        )

    async def taken(self, kind: Kind) -> str:
        """A new name that it gave to something itself. kind: one of FREE."""
        if kind is Kind.IDEMPOTENCY_KEY:
            await self._execute(name := f"{self.mark}-{next(_numbers)}")
            return name
        if kind is Kind.NEW_CONNECTION:
            await self._do("ConnectionsService.CreateConnection", {"name": (name := f"{self.mark}-{next(_numbers)}")})
            return name
        return await self.new({Kind.NEW_ROLE: Kind.ROLE, Kind.NEW_USER: Kind.USER}[kind])

    async def _do(self, name: str, values: Mapping[str, str]) -> Any:
        return (await self.wire.call(name, request(METHODS[name], values), self.tenant.admin)).reply

    async def _preview(self, key: str = "") -> str:
        message: Any = request(METHODS["ActionsService.Preview"], {"connection_id": self.default_connection})
        message.parameters.update({"payload": {"text": f"{self.mark}-{next(_numbers)}"}})
        return str((await self.wire.call("ActionsService.Preview", message, key or self.tenant.admin)).reply.id)

    async def _execute(self, idempotency_key: str) -> str:
        values = {"preview_id": await self._preview(), "idempotency_key": idempotency_key}
        return str((await self._do("ActionsService.Execute", values)).id)

    async def _cursor(self) -> str:
        """Where its log ends now."""
        tail = await self.wire.call("AuditService.TailEvents", key=self.tenant.admin, most=1)
        return str(tail.reply.cursor)

    async def _unsettled(self, idempotency_key: str, kind: Kind) -> str:
        """An execution in a state that deliveries to tests do not leave it in."""
        execution_id = await self._execute(idempotency_key)
        async with self.postgres.transaction():
            await self.postgres.execute("SET LOCAL session_replication_role = replica")  # no way leads there
            await self.postgres.execute(
                """
                UPDATE action_executions
                   SET status = $2, completed_at = NULL,
                       next_attempt_at = CASE WHEN $2::execution_state = 'pending' THEN now() + interval '1 hour' END
                 WHERE id = $1
                """,
                execution_id,
                str(kind),
            )
        return execution_id

    async def settled(self) -> None:
        """Waits until nothing of it goes on by itself."""

        async def still() -> bool:
            return not await self.postgres.fetchval(
                """
                SELECT EXISTS (SELECT FROM action_executions WHERE workspace_id = $1
                                  AND (status = 'executing' OR next_attempt_at <= now()))
                    OR EXISTS (SELECT FROM recoveries WHERE workspace_id = $1 AND completed_at IS NULL)
                    OR EXISTS (SELECT FROM audit_pending WHERE workspace_id = $1)
                """,
                self.tenant.workspace_id,
            )

        await eventually(still)

    async def rows(self) -> set[str]:
        """All that it has: table and row, as JSON, but for what changes by itself."""
        await self.settled()
        tables = await self.postgres.fetch(
            """
            SELECT relname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
             WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
               AND attname = 'workspace_id'
            """
        )
        query = " UNION ALL ".join(
            f"SELECT '{table} ' || (to_jsonb(t) - '{{last_used_at,key_mac,pepper_id,hashes}}'::text[])::text AS row"
            f"  FROM {table} t WHERE workspace_id = $1"
            for (table,) in tables
        )
        return {text for (text,) in await self.postgres.fetch(query, self.tenant.workspace_id)}

    async def marks(self) -> set[str]:
        return self.marks_in(await self.rows())

    def marks_in(self, rows: Iterable[str]) -> set[str]:
        """Every text that it has, long enough to know it by, but for the words of the API."""
        keys = {self.tenant.admin, self.tenant.developer, self.tenant.viewer}
        return keys.union(*map(_TEXT.findall, rows)) - SCOPES - METHODS.keys()


@dataclass(frozen=True)
class Neighbours:
    """Two tenants of one server, with some of everything, and what is around them."""

    relay: Relay
    wire: Wire
    receiver: Receiver
    issuer: Issuer
    postgres: Any
    ours: Estate
    theirs: Estate


@asynccontextmanager
async def neighbours(url: str, folder: Path, **environ: str) -> AsyncIterator[Neighbours]:
    """On a server of their own, on this database. It takes users' tokens and a proxy's word on whence calls come."""
    async with AsyncExitStack() as stack:
        issuer = await stack.enter_async_context(issuing())
        trusted = {"RELAY_TRUSTED_PROXIES": "127.0.0.0/8", "RELAY_OIDC_ISSUERS": f"{issuer.url} {AUDIENCE}"}
        relay = await stack.enter_async_context(running(url, settings_for(folder, **trusted, **environ)))
        wire = await stack.enter_async_context(wired(relay))
        receiver = await stack.enter_async_context(receiving())
        postgres = await asyncpg.connect(url)
        stack.push_async_callback(postgres.close)
        tenants = {"ours": relay.tenant, "theirs": await relay.new_tenant()}
        ours, theirs = (Estate(tenant, name, wire, postgres, issuer.url) for name, tenant in tenants.items())
        for estate in (ours, theirs):
            await estate.settle(receiver.url, [*Kind] * 2)
            await estate.add_attempt()
        yield Neighbours(relay, wire, receiver, issuer, postgres, ours, theirs)
