"""Who calls."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID


class PrincipalType(StrEnum):
    """relay.v1.PrincipalType."""

    API_KEY = "api_key"
    USER = "user"


@dataclass(frozen=True, slots=True)
class Limits:
    """Units a minute of the two budgets. None: no limit that is told here."""

    calls: int | None = None
    executions: int | None = None


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller that the server knows.

    id: the key's UUID or the user's id at its issuer. caller: what previews are bound to, and what `limits` are counted
    for; a key's lineage, so that rotation does not break them, or the user. expires_at: when the credential does.
    limits: the caller's own. workspace_limits: the workspace's, where its operator set other ones than the settings'.
    issuer: a user's, without which the id is nobody's in particular.
    """

    type: PrincipalType
    id: str
    caller: str
    name: str
    workspace_id: UUID
    role: str
    scopes: frozenset[str]
    expires_at: datetime | None = None
    limits: Limits = NO_LIMITS
    workspace_limits: Limits = NO_LIMITS
    issuer: str = ""

    @property
    def actor(self) -> str:
        """What the audit log and every `creator` call it: the key's UUID, or ISSUER#USER; no issuer has a "#" in it."""
        return f"{self.issuer}#{self.id}" if self.issuer else self.id
