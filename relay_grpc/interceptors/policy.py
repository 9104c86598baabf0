"""The API as its descriptors tell it: every method with its policy. The only reader of the options in policy.proto."""

from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from relay.v1 import actions_pb2, audit_pb2, auth_pb2, connections_pb2, policy_pb2

from relay_grpc.auth.scopes import SCOPES
from relay_grpc.call import Method

FILES: tuple[FileDescriptor, ...] = (
    auth_pb2.DESCRIPTOR,
    connections_pb2.DESCRIPTOR,
    actions_pb2.DESCRIPTOR,
    audit_pb2.DESCRIPTOR,
)


class PolicyError(Exception):
    """A method's policy is missing or contradicts itself: nothing may be served."""


def methods(files: Iterable[FileDescriptor] = FILES) -> Mapping[str, Method]:
    """Every RPC of these files by path. Raises PolicyError."""
    found = {}
    for file in files:
        for service in file.services_by_name.values():
            for descriptor in service.methods:
                method = _method(descriptor)
                found[method.path] = method
    return found


def _method(descriptor: MethodDescriptor) -> Method:
    options: Any = descriptor.GetOptions()
    policy = options.Extensions[policy_pb2.policy]
    scopes = frozenset(policy.scopes)
    if policy.access == policy_pb2.ACCESS_UNSPECIFIED:
        raise PolicyError(f"{descriptor.full_name} has no policy: add `option (policy)` to it in proto/")
    if (policy.access == policy_pb2.ACCESS_SCOPED) != bool(scopes):
        raise PolicyError(f"{descriptor.full_name}: ACCESS_SCOPED needs scopes, and ACCESS_AUTHENTICATED has none")
    if unknown := scopes - SCOPES:
        raise PolicyError(f"{descriptor.full_name}: no role has the scopes {', '.join(sorted(unknown))}")
    if not policy.calls and not policy.executions:
        raise PolicyError(f"{descriptor.full_name} costs nothing: give it calls or executions")
    return Method(
        service=descriptor.containing_service.name,
        rpc=descriptor.name,
        path=f"/{descriptor.containing_service.full_name}/{descriptor.name}",
        input_type=message_factory.GetMessageClass(descriptor.input_type),
        output_type=message_factory.GetMessageClass(descriptor.output_type),
        streams=descriptor.server_streaming,
        scopes=scopes,
        calls=policy.calls,
        executions=policy.executions,
        audited=policy.audited,
    )
