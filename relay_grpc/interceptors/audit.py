"""Records what no transaction of the call recorded: refusals, failures, and reads that are audited."""

import asyncio
from typing import Any

from relay_grpc import errors
from relay_grpc.audit.event import Outcome, of_call
from relay_grpc.audit.recorder import Recorder
from relay_grpc.call import Call, Method
from relay_grpc.interceptors.base import Handler, Layer

COUNTED = (errors.Unauthenticated, errors.Throttled, errors.RateLimited)  # anybody can cause any number of them
REFUSALS = (errors.PermissionDenied, *COUNTED)


def audit(recorder: Recorder) -> Layer:
    def layer(method: Method, handler: Handler) -> Handler:
        async def audited(call: Call, request: Any) -> Any:
            try:
                answer = await handler(call, request)
            except errors.RelayError as error:
                denied = isinstance(error, REFUSALS)
                if isinstance(error, COUNTED) or (denied and not call.is_authenticated):
                    recorder.count(of_call(call, Outcome.DENIED, error.reason))
                elif call.is_authenticated and (denied or method.audited) and not call.recorded:
                    await recorder.write(of_call(call, Outcome.DENIED if denied else Outcome.FAILED, error.reason))
                raise
            except asyncio.CancelledError:
                if call.is_authenticated and method.audited and not call.recorded:
                    recorder.write_later(of_call(call, Outcome.FAILED, "CANCELLED"))
                raise
            except Exception:
                if call.is_authenticated and method.audited and not call.recorded:
                    await recorder.write(of_call(call, Outcome.FAILED, "INTERNAL"))
                raise
            if method.audited and not call.recorded:
                await recorder.write(of_call(call))
            return answer

        return audited

    return layer
