"""What a call that did not succeed raises: one class per gRPC status code, all of them RelayError."""

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status


class RelayError(Exception):
    """A call that did not succeed. The gRPC error is its __cause__.

    message: what is wrong, for people.
    code: the gRPC status code.
    reason: a relay.v1.ErrorReason without its prefix, such as "PREVIEW_EXPIRED". Where Relay did not answer itself (a
        proxy did, or the deadline passed here): the code's name, such as "UNAVAILABLE".
    metadata: what programs need to know about the reason, such as {"missing_scopes": "actions:execute"}.
    retry_after: seconds until a retry can succeed. None: not told.
    request_id: finds the call in Relay's logs and audit log. None: not told.
    violations: (field, what is wrong with it) for each wrong field of the request.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str = "",
        *,
        code: grpc.StatusCode | None = None,
        reason: str = "",
        metadata: dict[str, str] | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
        violations: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.reason = reason or self.code.name
        self.metadata = metadata or {}
        self.retry_after = retry_after
        self.request_id = request_id
        self.violations = violations

    def __str__(self) -> str:
        request = f" (request {self.request_id})" if self.request_id else ""
        return f"{self.reason}: {self.message}{request}"


class InvalidRequest(RelayError):
    """`violations` names the fields that are wrong."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class Unauthenticated(RelayError):
    """No credential, or one that is unknown, wrong, expired or revoked."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(RelayError):
    """The caller may not do this: it lacks metadata["missing_scopes"], or `message` says what else."""

    code = grpc.StatusCode.PERMISSION_DENIED


class NotFound(RelayError):
    """No such resource in the caller's workspace."""

    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(RelayError):
    """The name is taken."""

    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(RelayError):
    """The state the call needs is not there; `reason` tells which, and whether to preview again."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Contention(RelayError):
    """Another call held what this one needs until the deadline. Nothing was done."""

    code = grpc.StatusCode.ABORTED


class RateLimited(RelayError):
    """A budget of this minute is spent, or too many wrong credentials came: try again after `retry_after`.

    Without one, the message was too large.
    """

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(RelayError):
    """No server was reached, or it could not take the call, after the retries that are safe."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(RelayError):
    """The deadline passed. Whether the call was done is not known: repeat `execute` with the same preview and key."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(RelayError):
    """The call was given up, as when its client is closed."""

    code = grpc.StatusCode.CANCELLED


class Unimplemented(RelayError):
    """The server does not have this method, or not yet."""

    code = grpc.StatusCode.UNIMPLEMENTED


class Internal(RelayError):
    """A defect of Relay. Report the `request_id`."""

    code = grpc.StatusCode.INTERNAL


_CLASSES: dict[grpc.StatusCode, type[RelayError]] = {kind.code: kind for kind in RelayError.__subclasses__()}


def from_rpc_error(failure: grpc.RpcError) -> RelayError:
    """The RelayError for a failed call, with what its google.rpc details tell."""
    pairs: Any = failure.trailing_metadata()
    trailers: dict[str, Any] = dict(tuple(pairs or ()))
    info, retry, request = ErrorInfo(), RetryInfo(), BadRequest()
    try:
        for packed in Status.FromString(trailers.get("grpc-status-details-bin", b"")).details:
            for detail in (info, retry, request):
                packed.Unpack(detail)  # does nothing where the type is another
    except DecodeError:
        pass  # whatever answered was not Relay: the status code still tells
    code = failure.code()
    return _CLASSES.get(code, RelayError)(
        failure.details() or "",
        code=code,
        reason=info.reason,
        metadata=dict(info.metadata),
        retry_after=retry.retry_delay.ToTimedelta().total_seconds() if retry.HasField("retry_delay") else None,
        request_id=info.metadata.get("request_id") or trailers.get("x-request-id"),
        violations=tuple((violation.field, violation.description) for violation in request.field_violations),
    )
