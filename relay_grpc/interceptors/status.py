"""Errors become statuses here, and nowhere else."""

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from relay_grpc import errors
from relay_grpc.call import Call, Method

if TYPE_CHECKING:
    from relay_grpc.interceptors.base import Handler

log = logging.getLogger(__name__)
DOMAIN = "relay.v1"
CODES = {name: grpc.StatusCode[name] for name in grpc.StatusCode.__members__}


def status(method: Method, handler: "Handler") -> "Handler":
    """Layer: catches whatever the call raises and notes it as a google.rpc.Status for `finish`."""

    async def answer(call: Call, request: Any) -> Any:
        try:
            return await handler(call, request)
        except errors.RelayError as error:
            call.code = error.code
            if error.code == "UNAVAILABLE":
                log.warning("%s %s: %s (%r)", call.request_id, method.name, error, error.__cause__)
            call.failure = _status(call, error.code, error.message, error.reason, _details(error), error.metadata)
        except asyncio.CancelledError:
            call.code = "CANCELLED"
            raise
        except Exception:
            log.exception("%s %s: a defect", call.request_id, method.name)
            call.code = "INTERNAL"
            call.failure = _status(
                call, "INTERNAL", f"internal error; the log knows it as request {call.request_id}", "INTERNAL"
            )
        return None

    return answer


async def finish(call: Call, context: Any) -> None:
    """Sends the trailing metadata, and the failure if there is one."""
    trailing: list[tuple[str, str | bytes]] = [("x-request-id", call.request_id), *call.trailing.items()]
    if call.failure is None:
        context.set_trailing_metadata(trailing)
        return
    trailing.append(("grpc-status-details-bin", call.failure.SerializeToString()))
    await context.abort(CODES[call.code], call.failure.message, tuple(trailing))


def _details(error: errors.RelayError) -> list[Message]:
    """The google.rpc messages that this error has besides its ErrorInfo."""
    details: list[Message] = []
    if isinstance(error, errors.InvalidRequest):
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=field, description=problem)
            for field, problem in error.violations
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    if isinstance(error, errors.RateLimited):
        violation = error_details_pb2.QuotaFailure.Violation(
            subject=error.subject, description=error.message, quota_metric=error.quota, quota_value=error.limit
        )
        details.append(error_details_pb2.QuotaFailure(violations=[violation]))
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return details


def _status(
    call: Call,
    code: str,
    message: str,
    reason: str,
    details: list[Message] | None = None,
    metadata: dict[str, str] | None = None,
) -> status_pb2.Status:
    info = error_details_pb2.ErrorInfo(
        reason=reason, domain=DOMAIN, metadata={"request_id": call.request_id, **(metadata or {})}
    )
    packed = []
    for detail in (info, *(details or ())):
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=CODES[code].value[0], message=message, details=packed)
