"""Who calls, and in which workspace: from the credential in the metadata to a principal."""

from collections.abc import Mapping
from functools import partial
from typing import Any
from uuid import UUID

from relay_grpc import errors
from relay_grpc.auth.users import WORKSPACE_FIELD, UserVerifier
from relay_grpc.auth.verifier import KeyVerifier
from relay_grpc.call import Call, Method
from relay_grpc.interceptors.base import Handler, Layer

KEY_PREFIX = "rk_"  # of every API key, and of no token


def authentication(keys: KeyVerifier, users: UserVerifier) -> Layer:
    def layer(method: Method, handler: Handler) -> Handler:
        async def authenticate(call: Call) -> None:
            credential, is_key = _credential(call.metadata)
            call.named_workspace = _workspace(call.metadata)
            try:
                if is_key:
                    call.principal = await keys.verify(credential, call.peer)
                else:
                    call.principal = await users.verify(credential, call.named_workspace)
            except errors.RelayError as error:
                call.proven = error.principal
                raise

        async def authenticated(call: Call, request: Any) -> Any:
            await authenticate(call)
            if method.streams:
                call.recheck = partial(authenticate, call)
            return await handler(call, request)

        return authenticated

    return layer


def _credential(metadata: Mapping[str, str]) -> tuple[str, bool]:
    """What the caller presents, and whether it is to be an API key; else it is a user's token.

    `authorization: Bearer KEY-OR-TOKEN` (RFC 6750; the scheme in any case), or else `x-api-key: KEY`.
    """
    scheme, _, presented = metadata.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and presented:
        credential = presented.strip()
        return credential, credential.startswith(KEY_PREFIX)
    key = metadata.get("x-api-key", "")
    if not key:
        raise errors.Unauthenticated
    return key, True


def _workspace(metadata: Mapping[str, str]) -> UUID | None:
    """The workspace that the caller means. None: it names none."""
    named = metadata.get(WORKSPACE_FIELD)
    if named is None:
        return None
    try:
        return UUID(named)
    except ValueError:
        raise errors.InvalidRequest([(WORKSPACE_FIELD, "should be the id of a workspace, a UUID")]) from None
