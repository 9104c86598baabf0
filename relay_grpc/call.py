"""One RPC under way: all that the layers and the servicers know of it besides its messages."""

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from google.rpc import status_pb2

from relay_grpc.ids import uuid7
from relay_grpc.principal import Principal


@dataclass(frozen=True, slots=True)
class Method:
    """An RPC of the API and its policy, from its descriptor.

    name: "ActionsService.Execute". path: "/relay.v1.ActionsService/Execute". calls, executions: its cost in units of
    the two budgets.
    """

    service: str
    rpc: str
    path: str
    input_type: type[Any]
    output_type: type[Any]
    streams: bool
    scopes: frozenset[str]
    calls: int
    executions: int
    audited: bool

    @property
    def name(self) -> str:
        return f"{self.service}.{self.rpc}"


async def _nobody() -> None:
    raise LookupError("a caller was to be checked again that never was checked")


@dataclass(slots=True)
class Call:
    """The state of one RPC. The layers fill it from the outside in; servicers read it and never see the transport.

    deadline: on time.monotonic(), infinite where the caller set none. send: writes a message of a streaming answer.
    request: its bytes, and from validation on its message. code, failure: how it ended. target, idempotency_key_hash:
    what it was about, where its own transaction does not tell the audit log. recorded: its audit event is committed.
    trailing: metadata for the answer. named_workspace: the one that the caller says it means; None: it says nothing.
    proven: who calls, where they may not: the key has ended, or the user has no role. recheck: raises as the layers do
    where a stream's caller may no longer call.
    """

    method: Method
    metadata: Mapping[str, str]
    peer: str
    request_id: str
    deadline: float
    send: Callable[[Any], Awaitable[None]]
    request: Any = b""
    started: float = field(default_factory=time.monotonic)
    trace_id: str = ""
    traceparent: str = ""
    code: str = "OK"
    failure: status_pb2.Status | None = None
    target: str = ""
    idempotency_key_hash: str = ""
    recorded: bool = False
    trailing: dict[str, str] = field(default_factory=dict)
    named_workspace: UUID | None = None
    proven: Principal | None = None
    recheck: Callable[[], Awaitable[None]] = _nobody
    _principal: Principal | None = None
    _event_id: UUID | None = None

    @property
    def principal(self) -> Principal:
        """Who calls. Set by the authentication layer, so known to everything inside it."""
        if self._principal is None:
            raise LookupError(f"{self.method.name} asked for its principal before authentication")
        return self._principal

    @principal.setter
    def principal(self, principal: Principal) -> None:
        self._principal = principal

    @property
    def is_authenticated(self) -> bool:
        return self._principal is not None

    @property
    def workspace_id(self) -> UUID:
        return self.principal.workspace_id

    @property
    def event_id(self) -> UUID:
        """Of whatever event tells of this call, made when the first one does; Postgres keeps one, whoever writes it."""
        if self._event_id is None:
            self._event_id = uuid7()
        return self._event_id

    def time_remaining(self) -> float:
        """Seconds until the caller's deadline; infinite where there is none."""
        return self.deadline - time.monotonic()
