"""How a method's layers become one handler, once, at start; and where that handler meets grpc.aio.

A layer takes a Method and the next handler and returns a handler. A handler takes the Call and the request and returns
the answer. A streaming method's answers go out through `call.send` instead, so every layer serves both kinds.
"""

import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import grpc

from relay_grpc import errors
from relay_grpc.call import Call, Method
from relay_grpc.interceptors import status
from relay_grpc.interceptors.peer import Network, address_of

Handler = Callable[[Call, Any], Awaitable[Any]]
Layer = Callable[[Method, Handler], Handler]
Servicer = Any  # an object whose methods are named like some of a service's RPCs and take (request, call)
_REQUEST_ID = re.compile(r"(?!rk_)[0-9A-Za-z._-]{1,64}")  # an API key in the wrong place is not to be logged


def _new_request_id() -> str:
    return f"{random.getrandbits(128):032x}"  # names a call, and is no secret


def compose(layers: Sequence[Layer], method: Method, handler: Handler) -> Handler:
    """The handler inside all layers; the first is the outermost."""
    return reduce(lambda inner, layer: layer(method, inner), reversed(layers), handler)


def register(
    server: grpc.aio.Server,
    methods: Mapping[str, Method],
    servicers: Mapping[str, Sequence[Servicer]],
    layers: Sequence[Layer],
    *,
    proxies: Sequence[Network] = (),
) -> None:
    """Serves the methods. servicers: by service name; a method that none of them has answers UNIMPLEMENTED.

    proxies: whose word on where a call comes from is believed.
    """
    handlers: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}
    for method in methods.values():
        handler = compose(layers, method, _innermost(method, servicers[method.service]))
        kind = grpc.unary_stream_rpc_method_handler if method.streams else grpc.unary_unary_rpc_method_handler
        service = method.path.split("/")[1]
        # Requests stay bytes until the validation layer, so that one that can't be parsed is an error like any other.
        handlers.setdefault(service, {})[method.rpc] = kind(
            _adapter(method, handler, proxies), response_serializer=method.output_type.SerializeToString
        )
    for service, by_name in handlers.items():
        server.add_registered_method_handlers(service, by_name)


def _innermost(method: Method, servicers: Sequence[Servicer]) -> Handler:
    function: Any = next((getattr(one, method.rpc) for one in servicers if hasattr(one, method.rpc)), None)

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


def _adapter(method: Method, handler: Handler, proxies: Sequence[Network]) -> Callable[[bytes, Any], Awaitable[Any]]:
    async def serve(request: bytes, context: Any) -> Any:
        received = context.invocation_metadata()
        metadata = {key: value for key, value in received if isinstance(value, str)}
        remaining = context.time_remaining()
        request_id = metadata.get("x-request-id", "")
        call = Call(
            method=method,
            metadata=metadata,
            peer=address_of(context.peer(), received, proxies),
            request_id=request_id if _REQUEST_ID.fullmatch(request_id) else _new_request_id(),
            deadline=float("inf") if remaining is None else time.monotonic() + remaining,
            send=context.write,
            request=request,
        )
        answer = await handler(call, request)
        await status.finish(call, context)
        return answer

    return serve
