"""Who calls: from the credential in the metadata to a principal."""

from collections.abc import Mapping
from typing import Any

from relay_grpc import errors
from relay_grpc.auth.verifier import KeyVerifier
from relay_grpc.call import Call, Method
from relay_grpc.interceptors.base import Handler, Layer


def authentication(verifier: KeyVerifier) -> Layer:
    def layer(method: Method, handler: Handler) -> Handler:
        async def authenticated(call: Call, request: Any) -> Any:
            call.principal = await verifier.verify(_credential(call.metadata))
            return await handler(call, request)

        return authenticated

    return layer


def _credential(metadata: Mapping[str, str]) -> str:
    """`authorization: Bearer KEY` (RFC 6750; the scheme in any case), or else `x-api-key: KEY`."""
    scheme, _, token = metadata.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return token.strip()
    key = metadata.get("x-api-key", "")
    if not key:
        raise errors.Unauthenticated
    return key
