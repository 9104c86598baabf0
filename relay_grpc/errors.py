"""The one tree of errors that Relay raises at its callers.

`message` is for the person who reads it and reaches the client word for word; what a person may not see goes into the
exception's cause (`raise ... from`). interceptors/status.py is the only place that turns these into gRPC statuses.
Every class names the google.rpc.Code it stands for, and each instance one relay.v1.ErrorReason.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from relay.v1 import errors_pb2

if TYPE_CHECKING:
    from relay_grpc.principal import Principal

MAX_VIOLATIONS = 10
MAX_TEXT = 160  # characters


class RelayError(Exception):
    """An error that a client may see.

    reason: a relay.v1.ErrorReason without its prefix, such as "PREVIEW_EXPIRED".
    metadata: string pairs for google.rpc.ErrorInfo.
    retry_after: seconds until a retry can succeed, for google.rpc.RetryInfo.
    principal: who was proven to call and may not, for the audit log: no caller is told.
    """

    code: ClassVar[str]
    reason: str
    retry_after: float | None = None
    principal: "Principal | None" = None

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.reason
        self.metadata = dict(metadata or {})
        self.retry_after = self.retry_after if retry_after is None else retry_after
        errors_pb2.ErrorReason.Value(f"ERROR_REASON_{self.reason}")  # a reason that is not in the API is a defect


class InvalidRequest(RelayError):
    """A field of the request is wrong. violations: (field path, what is wrong with it), for google.rpc.BadRequest."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_REQUEST"

    def __init__(self, violations: Sequence[tuple[str, str]], *, reason: str | None = None) -> None:
        # All of it travels twice in the trailers, which hold 8 KiB.
        kept = [(field[:MAX_TEXT], problem[:MAX_TEXT]) for field, problem in violations[:MAX_VIOLATIONS]]
        super().__init__("; ".join(f"{field}: {problem}" for field, problem in kept)[: 5 * MAX_TEXT], reason=reason)
        self.violations = tuple(kept)


class Unauthenticated(RelayError):
    """No credential, or one that is unknown, wrong, expired or revoked: one text for all of them."""

    code = "UNAUTHENTICATED"
    reason = "CREDENTIALS_INVALID"

    def __init__(self, principal: "Principal | None" = None) -> None:
        self.principal = principal
        super().__init__(
            "no valid credential: send the metadata 'authorization: Bearer KEY-OR-TOKEN' or 'x-api-key: KEY'"
        )


class PermissionDenied(RelayError):
    """The caller is known and may not do this."""

    code = "PERMISSION_DENIED"
    reason = "SCOPE_MISSING"


class Throttled(RelayError):
    """Too many wrong credentials came from here, or for this key: no more are looked at for now."""

    code = "RESOURCE_EXHAUSTED"
    reason = "AUTHENTICATION_THROTTLED"

    def __init__(self, retry_after: float) -> None:
        super().__init__(
            f"too many wrong credentials; try again in {math.ceil(retry_after)} s", retry_after=retry_after
        )


class NotFound(RelayError):
    """No such resource in the caller's workspace."""

    code = "NOT_FOUND"
    reason = "RESOURCE_NOT_FOUND"

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"{kind} {name!r} does not exist in this workspace")


class AlreadyExists(RelayError):
    """The name is taken."""

    code = "ALREADY_EXISTS"
    reason = "RESOURCE_ALREADY_EXISTS"


class FailedPrecondition(RelayError):
    """The request is right and the state it needs is not there. Name the reason."""

    code = "FAILED_PRECONDITION"


class NotLoggedYet(RelayError):
    """What was asked for is not in a signed audit log yet."""

    code = "UNAVAILABLE"
    reason = "NOT_LOGGED_YET"
    retry_after = 1.0


class LogDamaged(RelayError):
    """The audit log is not what was signed."""

    code = "DATA_LOSS"
    reason = "LOG_DAMAGED"


class Contention(RelayError):
    """Another call holds what this one needs."""

    code = "ABORTED"
    reason = "CONTENTION"
    retry_after = 0.2


class RateLimited(RelayError):
    """A budget of this minute is spent. subject, quota, limit: for google.rpc.QuotaFailure."""

    code = "RESOURCE_EXHAUSTED"
    reason = "RATE_LIMITED"

    def __init__(self, *, subject: str, quota: str, limit: int, retry_after: float) -> None:
        super().__init__(
            f"the budget of {limit} {quota} per minute of {subject} is spent; try again in {retry_after:.1f} s",
            retry_after=retry_after,
        )
        self.subject, self.quota, self.limit = subject, quota, limit


class Overloaded(RelayError):
    """This instance has more work than it can take, or is stopping."""

    code = "UNAVAILABLE"
    reason = "OVERLOADED"
    retry_after = 1.0


class DependencyUnavailable(RelayError):
    """Something Relay depends on does not answer."""

    code = "UNAVAILABLE"
    reason = "DEPENDENCY_UNAVAILABLE"
    retry_after = 1.0


class Unimplemented(RelayError):
    """The method is part of the API and not built yet."""

    code = "UNIMPLEMENTED"
    reason = "METHOD_UNIMPLEMENTED"
