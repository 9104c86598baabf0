"""Calls without a client: any method by its descriptor, any bytes, any metadata, and all of what comes back."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from relay_grpc.call import Method
from relay_grpc.interceptors.policy import methods
from tests.harness import Relay

METHODS = {method.name: method for method in methods().values()}
ENDLESS = {"AuditService.TailEvents"}
DETAILS = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.QuotaFailure,
    error_details_pb2.RetryInfo,
)
# What only a text that was not meant for a client holds.
INTERNALS = re.compile(
    r"traceback|exception|\bFile \"|\.py\b|relay_grpc|asyncpg|postgres|\bsql\b|relation \"|redis", re.IGNORECASE
)


@dataclass(frozen=True)
class Answer:
    """How a call ended. status: the google.rpc.Status that came with an error; None: gRPC itself refused the call.

    replies: what came before the end, whatever that was.
    """

    code: str
    text: str = ""
    replies: list[Any] = field(default_factory=list)
    trailing: dict[str, str | bytes] = field(default_factory=dict)
    status: status_pb2.Status | None = None

    @property
    def reply(self) -> Any:
        assert self.code == "OK", self
        (only,) = self.replies
        return only

    def detail(self, kind: type[Message]) -> Any:
        """The one detail of this kind."""
        assert self.status is not None, self
        message = kind()
        (found,) = (detail for detail in self.status.details if detail.Is(kind.DESCRIPTOR))
        found.Unpack(message)
        return message

    @property
    def reason(self) -> str:
        """Why it failed, after a look at what every error has to carry."""
        assert self.status is not None, self
        assert self.status.message == self.text
        assert not INTERNALS.search(str(self.status)), self
        info = self.detail(error_details_pb2.ErrorInfo)
        assert info.domain == "relay.v1"
        assert info.metadata["request_id"] == self.trailing["x-request-id"]
        assert all(any(detail.Is(kind.DESCRIPTOR) for kind in DETAILS) for detail in self.status.details)
        return str(info.reason)

    @property
    def violations(self) -> dict[str, str]:
        """What is wrong, by field path."""
        return {one.field: one.description for one in self.detail(error_details_pb2.BadRequest).field_violations}


class Wire:
    """One connection. key: the API key of calls that name none."""

    def __init__(self, channel: grpc.aio.Channel, key: str) -> None:
        self._channel = channel
        self._key = key

    async def call(
        self,
        method: Method | str,
        request: Message | bytes = b"",
        key: str | None = None,
        timeout: float | None = None,
        most: int | None = None,
        **metadata: str,
    ) -> Answer:
        """key: "" sends none. metadata: names with _ for -.

        timeout: seconds; None: 30, or 1 for what ends only with it. most: replies after which the caller goes away.
        """
        method = METHODS[method] if isinstance(method, str) else method
        key = self._key if key is None else key
        timeout = timeout or (1 if method.name in ENDLESS and most is None else 30)
        headers = [("authorization", f"Bearer {key}")] if key else []
        headers += [(name.replace("_", "-"), value) for name, value in metadata.items()]
        kind = self._channel.unary_stream if method.streams else self._channel.unary_unary
        send: Any = kind(method.path, response_deserializer=method.output_type.FromString)
        content = request if isinstance(request, bytes) else request.SerializeToString()
        call = send(content, metadata=headers, timeout=timeout)
        replies: list[Any] = []
        try:
            if not method.streams:
                replies.append(await call)
            else:
                async for reply in call:
                    replies.append(reply)
                    if len(replies) == most:
                        call.cancel()
                        return Answer("OK", "", replies)
        except grpc.aio.AioRpcError as error:
            trailing: dict[str, Any] = dict(error.trailing_metadata() or ())
            packed = trailing.pop("grpc-status-details-bin", None)
            status = None if packed is None else status_pb2.Status.FromString(packed)
            return Answer(error.code().name, error.details() or "", replies, trailing, status)
        return Answer("OK", "", replies, dict(await call.trailing_metadata()))


@asynccontextmanager
async def wired(relay: Relay, key: str | None = None) -> AsyncIterator[Wire]:
    """key: the tenant's admin key where none is named."""
    async with grpc.aio.insecure_channel(str(relay.app.listen)) as channel:
        yield Wire(channel, relay.tenant.admin if key is None else key)
