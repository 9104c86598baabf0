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
            except asyncio.CancelledError:
                if method.audited and not call.recorded:
                    if call.is_authenticated:
                        recorder.write_later(recorder.of_call(call, Outcome.FAILED, "CANCELLED"))
                    else:
                        recorder.count(of_call(call, Outcome.FAILED, "CANCELLED"))
                raise
            except Exception as error:
                outcome = Outcome.DENIED if isinstance(error, REFUSALS) else Outcome.FAILED
                if (method.audited or outcome is Outcome.DENIED) and not call.recorded:
                    reason = error.reason if isinstance(error, errors.RelayError) else "INTERNAL"
                    if isinstance(error, COUNTED) or not call.is_authenticated:
                        recorder.count(of_call(call, outcome, reason))
                    else:
                        await recorder.write(recorder.of_call(call, outcome, reason))
                raise
            if method.audited and not call.recorded:
                await recorder.write(recorder.of_call(call))
            return answer

        return audited

    return layer
