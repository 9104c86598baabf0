"""The blocking client. `relay.aio` is the same for asyncio; `relay._calls` says what each method does."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, Self

import grpc
from google.protobuf.message import Message

from relay import _calls, _channel
from relay._call import DEADLINE, Answer, Call, Item, Page, Stream
from relay.errors import from_rpc_error
from relay.v1 import actions_pb2_grpc, audit_pb2_grpc, auth_pb2_grpc, connections_pb2_grpc

Parameters = ParamSpec("Parameters")
Interceptor = (
    grpc.UnaryUnaryClientInterceptor
    | grpc.UnaryStreamClientInterceptor
    | grpc.StreamUnaryClientInterceptor
    | grpc.StreamStreamClientInterceptor
)


def connect(
    target: str,
    *,
    api_key: str | None = None,
    token: _channel.Token | None = None,
    workspace: str | None = None,
    tls: bool | grpc.ChannelCredentials | None = None,
    insecure: bool = False,
    interceptors: Sequence[Interceptor] = (),
) -> "Relay":
    """A client of the server at `target`: HOST:PORT, [IPV6]:PORT, dns:///HOST:PORT or unix:PATH.

    Use it in a `with` block or close() it. It connects with the first call, and any number of threads may share it.

    api_key, token: who calls; give one of them. A user's token may be a function that tells the current one: it is
        asked before each call.
    workspace: the id of the one that the calls mean. A user who has a role in several has to name it; a key belongs to
        one, and any other is refused.
    tls: None for TLS with the system's roots, except to localhost, loopback addresses and unix sockets, which get
        plaintext; True for TLS there too; credentials for roots or client certificates of your own.
    insecure: allows plaintext to any other host. Whoever sees that traffic has the credential.
    interceptors: outermost first, such as OpenTelemetry's.

    Raises ValueError for a target, credential or workspace that can't be one, and for plaintext that was not allowed.
    """
    caller = _channel.caller(api_key, token, workspace)
    endpoint = _channel.endpoint(target, tls, insecure)
    if endpoint.credentials is None:
        channel = grpc.insecure_channel(target, endpoint.options)
    else:
        channel = grpc.secure_channel(target, endpoint.credentials, endpoint.options)
    return Relay(grpc.intercept_channel(channel, *interceptors), caller)


class Relay:
    """The services of one server, behind one channel."""

    def __init__(self, channel: grpc.Channel, caller: _channel.Caller) -> None:
        self._channel = channel
        self.auth = Auth(channel, caller)
        self.connections = Connections(channel, caller)
        self.actions = Actions(channel, caller)
        self.audit = Audit(channel, caller)

    def close(self) -> None:
        """Closes the channel; calls under way end as Cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Service:
    """What the services share. stub: the generated stub, which sends neither credentials nor a deadline by itself."""

    def __init__(self, stub: Callable[[grpc.Channel], Any], channel: grpc.Channel, caller: _channel.Caller) -> None:
        self.stub = stub(channel)
        self._caller = caller

    def call(self, method: str, request: Message, *, timeout: float = DEADLINE) -> Any:
        """Any unary method of `stub` by its name: with credentials, a deadline and errors from relay.errors."""
        return self._send(Call(method, request, timeout))

    def _send(self, call: Call[Answer]) -> Answer:
        send: Callable[..., Answer] = getattr(self.stub, call.method)
        deadline = time.monotonic() + call.timeout
        while True:
            try:
                return send(call.request, timeout=deadline - time.monotonic(), metadata=self._caller())
            except grpc.RpcError as failure:
                error = from_rpc_error(failure)
                pause = call.pause(error, deadline - time.monotonic())
                if pause is None:
                    raise error from failure
            time.sleep(pause)

    def _unary(self, describe: Callable[Parameters, Call[Answer]]) -> Callable[Parameters, Answer]:
        @functools.wraps(describe)
        def method(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Answer:
            return self._send(describe(*args, **kwargs))

        return method

    def _paged(self, describe: Callable[Parameters, Page[Item]]) -> Callable[Parameters, Iterator[Item]]:
        @functools.wraps(describe)
        def method(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Iterator[Item]:
            page: Page[Item] | None = describe(*args, **kwargs)
            while page:
                answer = self._send(page)
                yield from page.items(answer)
                page = page.next(answer)

        return method

    def _streamed(self, describe: Callable[Parameters, Stream[Item]]) -> Callable[Parameters, Iterator[Item]]:
        @functools.wraps(describe)
        def method(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Iterator[Item]:
            stream = describe(*args, **kwargs)
            send: Callable[..., Any] = getattr(self.stub, stream.method)
            deadline = time.monotonic() + stream.timeout
            newest: Item | None = None
            while True:
                answers = send(stream.request, timeout=deadline - time.monotonic(), metadata=self._caller())
                try:
                    for answer in answers:
                        if answer != newest:  # a resumed stream begins with what may be known
                            newest, stream = answer, stream.after(answer)
                            yield answer
                    return
                except grpc.RpcError as failure:
                    error = from_rpc_error(failure)
                    pause = None if newest is None else stream.pause(error, deadline - time.monotonic())
                    if pause is None:
                        raise error from failure
                finally:
                    answers.cancel()  # for whoever stopped listening
                time.sleep(pause)

        return method


class Auth(Service):
    """AuthService."""

    def __init__(self, channel: grpc.Channel, caller: _channel.Caller) -> None:
        super().__init__(auth_pb2_grpc.AuthServiceStub, channel, caller)
        self.who_am_i = self._unary(_calls.who_am_i)
        self.create_api_key = self._unary(_calls.create_api_key)
        self.get_api_key = self._unary(_calls.get_api_key)
        self.list_api_keys = self._paged(_calls.list_api_keys)
        self.rotate_api_key = self._unary(_calls.rotate_api_key)
        self.revoke_api_key = self._unary(_calls.revoke_api_key)
        self.verify_api_key = self._unary(_calls.verify_api_key)
        self.create_role = self._unary(_calls.create_role)
        self.list_roles = self._paged(_calls.list_roles)
        self.delete_role = self._unary(_calls.delete_role)
        self.assign_role = self._unary(_calls.assign_role)
        self.list_role_assignments = self._paged(_calls.list_role_assignments)
        self.remove_role = self._unary(_calls.remove_role)


class Connections(Service):
    """ConnectionsService."""

    def __init__(self, channel: grpc.Channel, caller: _channel.Caller) -> None:
        super().__init__(connections_pb2_grpc.ConnectionsServiceStub, channel, caller)
        self.create_webhook = self._unary(_calls.create_webhook)
        self.get = self._unary(_calls.get_connection)
        self.list = self._paged(_calls.list_connections)
        self.update = self._unary(_calls.update_connection)
        self.delete = self._unary(_calls.delete_connection)
        self.rotate_secret = self._unary(_calls.rotate_secret)


class Actions(Service):
    """ActionsService."""

    def __init__(self, channel: grpc.Channel, caller: _channel.Caller) -> None:
        super().__init__(actions_pb2_grpc.ActionsServiceStub, channel, caller)
        self.list = self._paged(_calls.list_actions)
        self.preview = self._unary(_calls.preview)
        self.get_preview = self._unary(_calls.get_preview)
        self.execute = self._unary(_calls.execute)
        self.get_execution = self._unary(_calls.get_execution)
        self.list_executions = self._paged(_calls.list_executions)
        self.list_attempts = self._paged(_calls.list_attempts)
        self.watch_execution = self._streamed(_calls.watch_execution)
        self.cancel_execution = self._unary(_calls.cancel_execution)
        self.resend_execution = self._unary(_calls.resend_execution)
        self.reconcile_execution = self._unary(_calls.reconcile_execution)
        self.recover_executions = self._unary(_calls.recover_executions)
        self.get_recovery = self._unary(_calls.get_recovery)
        self.cancel_recovery = self._unary(_calls.cancel_recovery)


class Audit(Service):
    """AuditService."""

    def __init__(self, channel: grpc.Channel, caller: _channel.Caller) -> None:
        super().__init__(audit_pb2_grpc.AuditServiceStub, channel, caller)
        self.list_events = self._paged(_calls.list_events)
        self.get_event = self._unary(_calls.get_event)
        self.export_events = self._streamed(_calls.export_events)
        self.tail_events = self._streamed(_calls.tail_events)
        self.get_checkpoint = self._unary(_calls.get_checkpoint)
        self.get_inclusion_proof = self._unary(_calls.get_inclusion_proof)
        self.get_consistency_proof = self._unary(_calls.get_consistency_proof)
