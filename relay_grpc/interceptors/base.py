"""How a method's layers become one handler, once, at start; and where that handler meets grpc.aio.

A layer takes a Method and the next handler and returns a handler. A handler takes the Call and the request and returns
the answer. A streaming method's answers go out through `call.send` instead, so every layer serves both kinds.
"""

import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import grpc

from relay_grpc import errors
from relay_grpc.call import Call, Method
from relay_grpc.interceptors import status

Handler = Callable[[Call, Any], Awaitable[Any]]
Layer = Callable[[Method, Handler], Handler]
Servicer = Any  # an object whose methods are named like the service's RPCs and take (request, call)
_REQUEST_ID = re.compile(r"[0-9A-Za-z._-]{1,64}")


def compose(layers: Sequence[Layer], method: Method, handler: Handler) -> Handler:
    """The handler inside all layers; the first is the outermost."""
    return reduce(lambda inner, layer: layer(method, inner), reversed(layers), handler)


def register(
    server: grpc.aio.Server, methods: Mapping[str, Method], servicers: Mapping[str, Servicer], layers: Sequence[Layer]
) -> None:
    """Serves the methods. servicers: by service name; a method that its servicer lacks answers UNIMPLEMENTED."""
    handlers: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}
    for method in methods.values():
        handler = compose(layers, method, _innermost(method, servicers[method.service]))
        kind = grpc.unary_stream_rpc_method_handler if method.streams else grpc.unary_unary_rpc_method_handler
        service = method.path.split("/")[1]
        # Requests stay bytes until the validation layer, so that one that can't be parsed is an error like any other.
        handlers.setdefault(service, {})[method.rpc] = kind(
            _adapter(method, handler), response_serializer=method.output_type.SerializeToString
        )
    for service, by_name in handlers.items():
        server.add_registered_method_handlers(service, by_name)


def _innermost(method: Method, servicer: Servicer) -> Handler:
    function: Any = getattr(servicer, method.rpc, None)

    async def unary(call: Call, request: Any) -> Any:
        return await function(request, call)

    async def stream(call: Call, request: Any) -> None:
        async for message in function(request, call):
            await call.send(message)

    async def unimplemented(call: Call, request: Any) -> Any:
        raise errors.Unimplemented(f"{method.name} is part of the API and not built yet")

    if function is None:
        return unimplemented
    return stream if method.streams else unary


def _adapter(method: Method, handler: Handler) -> Callable[[bytes, Any], Awaitable[Any]]:
    async def serve(request: bytes, context: Any) -> Any:
        metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        remaining = context.time_remaining()
        request_id = metadata.get("x-request-id", "")
        call = Call(
            method=method,
            metadata=metadata,
            peer=_host(context.peer()),
            request_id=request_id if _REQUEST_ID.fullmatch(request_id) else secrets.token_hex(16),
            deadline=float("inf") if remaining is None else time.monotonic() + remaining,
            send=context.write,
        )
        answer = await handler(call, request)
        await status.finish(call, context)
        return answer

    return serve


def _host(peer: str) -> str:
    """The address of a gRPC peer: "ipv4:127.0.0.1:4711" and "ipv6:%5B::1%5D:4711" without kind and port."""
    kind, _, address = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return kind
    return address.rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")
