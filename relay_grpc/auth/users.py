"""What a user may do here: the way from a token to a principal.

The token says who the user is; what they may do in which workspace is what its admins assigned. That is read when it is
older than `STATUS_TTL` or the workspace has changed.
"""

import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn
from uuid import UUID

import asyncpg

from relay_grpc import errors
from relay_grpc.audit.event import SYSTEM_WORKSPACE
from relay_grpc.auth import scopes, store
from relay_grpc.auth.changes import Changes
from relay_grpc.auth.lookups import Lookups
from relay_grpc.auth.oidc import TokenVerifier
from relay_grpc.auth.tokens import Identity
from relay_grpc.auth.verifier import STATUS_TTL
from relay_grpc.db import Database
from relay_grpc.principal import NO_LIMITS, Limits, Principal, PrincipalType

MAX_USERS = 100_000
WORKSPACE_FIELD = "x-relay-workspace"

User = tuple[str, str]  # the issuer and the user's id there


@dataclass(frozen=True, slots=True)
class _Role:
    name: str
    scopes: frozenset[str]
    workspace_limits: Limits


@dataclass(frozen=True, slots=True)
class _Roles:
    """A user's roles by workspace, as they were at `read_at`."""

    by_workspace: dict[UUID, _Role]
    read_at: float


class UserVerifier:
    """Checks users' tokens. One per process; close it. status_ttl: seconds for which roles are believed."""

    def __init__(
        self, db: Database, tokens: TokenVerifier, changes: Changes, *, status_ttl: float = STATUS_TTL
    ) -> None:
        self._tokens = tokens
        self._changes = changes
        self._status_ttl = status_ttl
        self._lookups: Lookups[User, list[asyncpg.Record]] = Lookups(db, store.find_user_roles)
        self._known: OrderedDict[User, _Roles] = OrderedDict()

    async def verify(self, token: str, workspace: UUID | None) -> Principal:
        """The principal that the token's user is in this workspace. None: in the only one where they have a role.

        Raises Unauthenticated, PermissionDenied (ROLE_MISSING), InvalidRequest where there are several workspaces and
        none is named, and DependencyUnavailable.
        """
        identity = await self._tokens.verify(token)
        try:
            return await self._principal(identity, workspace)
        except errors.RelayError as error:
            error.principal = _stranger(identity)
            raise

    async def _principal(self, identity: Identity, workspace: UUID | None) -> Principal:
        roles = await self._roles((identity.issuer, identity.subject), workspace)
        if workspace is None:
            if len(roles) > 1:
                raise errors.InvalidRequest(
                    [(WORKSPACE_FIELD, "name the workspace in this metadata field: this user has a role in several")]
                )
            workspace = next(iter(roles), None)
        if workspace is None or workspace not in roles:
            _refuse(identity, workspace)
        return _principal(identity, workspace, roles[workspace])

    def issuer(self, asked: str) -> str:
        """The URL of the issuer that a request means. asked: "" for the only one. Raises InvalidRequest."""
        known = list(self._tokens.issuers)
        if asked in known:
            return asked
        if not asked and len(known) == 1:
            return known[0]
        if not known:
            problem = "this server takes no users' tokens: its operator names issuers in RELAY_OIDC_ISSUERS"
        elif not asked:
            problem = f"name one, such as {known[0]}: this server knows several"
        else:
            problem = f"this server does not know it; it knows {', '.join(known)}"
        raise errors.InvalidRequest([("issuer", problem)])

    async def close(self) -> None:
        await self._lookups.close()

    async def _roles(self, user: User, workspace: UUID | None) -> dict[UUID, _Role]:
        known = self._known.get(user)
        if known is not None and self._hold(known, workspace):
            return known.by_workspace
        rows, read_at = await self._lookups.find(user)
        roles = {row["workspace_id"]: _role(row) for row in rows or ()}
        self._known.pop(user, None)
        if roles:  # a user without any is not remembered: the first one is to work at once
            self._known[user] = _Roles(roles, read_at)
            if len(self._known) > MAX_USERS:
                self._known.popitem(last=False)
        return roles

    def _hold(self, known: _Roles, workspace: UUID | None) -> bool:
        """Whether this much is still to be believed. A role that is not among them may have been given since."""
        if time.monotonic() >= known.read_at + self._status_ttl:
            return False
        if workspace is not None and workspace not in known.by_workspace:
            return False
        asked: Iterable[UUID] = known.by_workspace if workspace is None else (workspace,)
        return all(self._changes.hold(one, known.read_at) for one in asked)


def _role(row: asyncpg.Record) -> _Role:
    return _Role(
        row["role"],
        scopes.of_role(row["role"], row["role_parent"], row["role_scopes"]),
        Limits(row["workspace_calls_per_minute"], row["workspace_executions_per_minute"]),
    )


def _stranger(identity: Identity) -> Principal:
    """A user who may do nothing. No workspace's log is theirs to write to: what they try is told in the system's."""
    return _principal(identity, SYSTEM_WORKSPACE, _Role("", frozenset(), NO_LIMITS))


def _principal(identity: Identity, workspace: UUID, role: _Role) -> Principal:
    return Principal(
        type=PrincipalType.USER,
        id=identity.subject,
        caller=f"user:{identity.issuer}#{identity.subject}",
        name=identity.name,
        workspace_id=workspace,
        role=role.name,
        scopes=role.scopes,
        expires_at=identity.expires_at,
        workspace_limits=role.workspace_limits,
        issuer=identity.issuer,
    )


def _refuse(identity: Identity, workspace: UUID | None) -> NoReturn:
    """A workspace that does not exist is answered like one where the user has no role."""
    where = f"in the workspace {workspace}" if workspace else "in any workspace"
    subject = identity.subject[: errors.MAX_TEXT]
    raise errors.PermissionDenied(
        f"the user {subject!r} of {identity.issuer} has no role {where}: ask an admin of it for one (AssignRole)",
        reason="ROLE_MISSING",
    )
