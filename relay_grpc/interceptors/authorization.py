"""May the caller: it needs every scope of the method's policy."""

from typing import Any

from relay_grpc import errors
from relay_grpc.call import Call, Method
from relay_grpc.interceptors.base import Handler


def authorization(method: Method, handler: Handler) -> Handler:
    """Layer: refuses callers that lack a scope, naming what is missing."""

    async def authorized(call: Call, request: Any) -> Any:
        missing = method.scopes - call.principal.scopes
        if missing:
            listed = " ".join(sorted(missing))
            raise errors.PermissionDenied(
                f"{method.name} needs the scopes {' '.join(sorted(method.scopes))}; this caller lacks {listed}",
                metadata={"missing_scopes": listed},
            )
        return await handler(call, request)

    return authorized
