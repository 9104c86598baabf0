"""May the caller: in the workspace that it means, it needs every scope of the method's policy."""

from typing import Any

from relay_grpc import errors
from relay_grpc.auth.users import WORKSPACE_FIELD
from relay_grpc.call import Call, Method
from relay_grpc.interceptors.base import Handler


def authorization(method: Method, handler: Handler) -> Handler:
    """Layer: refuses keys of another workspace than the caller means, and who lacks a scope, naming what is missing."""

    def check(call: Call) -> None:
        if call.named_workspace not in (None, call.workspace_id):  # a user's is the one that they named
            raise errors.InvalidRequest([(WORKSPACE_FIELD, "this API key is of another workspace")])
        missing = method.scopes - call.principal.scopes
        if missing:
            listed = " ".join(sorted(missing))
            raise errors.PermissionDenied(
                f"{method.name} needs the scopes {' '.join(sorted(method.scopes))}; this caller lacks {listed}",
                metadata={"missing_scopes": listed},
            )

    async def authorized(call: Call, request: Any) -> Any:
        check(call)
        if method.streams:
            authenticate = call.recheck

            async def recheck() -> None:
                await authenticate()
                check(call)

            call.recheck = recheck
        return await handler(call, request)

    return authorized
