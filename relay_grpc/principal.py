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
class Principal:
    """A caller that the server knows.

    id: the key's UUID or the user's id at its issuer. caller: what previews are bound to; a key's lineage, so that
    rotation does not break them, or the user.
    """

    type: PrincipalType
    id: str
    caller: str
    name: str
    workspace_id: UUID
    role: str
    scopes: frozenset[str]
    expires_at: datetime | None = None
