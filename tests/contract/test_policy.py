"""Every method carries its policy, and a server with one that does not can't start."""

from typing import Any
from uuid import uuid4

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from relay.v1 import policy_pb2

from relay_grpc.interceptors.policy import PolicyError, methods
from tests.rpc.wire import METHODS


def test_there_are_47_methods_and_each_has_a_policy() -> None:
    assert len(METHODS) == 47
    assert {method.name for method in METHODS.values() if not method.scopes} == {
        "AuthService.WhoAmI",
        "AuthService.VerifyApiKey",
    }


def file_with(policy: policy_pb2.Policy | None) -> FileDescriptor:
    """A file whose one method has this policy."""
    name = f"t{uuid4().hex}"
    empty = "google.protobuf.Empty"
    file = FileDescriptorProto(
        name=f"{name}.proto", package=name, dependency=["relay/v1/policy.proto", "google/protobuf/empty.proto"]
    )
    method = file.service.add(name="Service").method.add(name="Do", input_type=empty, output_type=empty)
    if policy is not None:
        method.options.Extensions[policy_pb2.policy].CopyFrom(policy)
    return descriptor_pool.Default().AddSerializedFile(file.SerializeToString())


@pytest.mark.parametrize(
    ("policy", "complaint"),
    [
        (None, "has no policy"),
        (policy_pb2.Policy(calls=1), "has no policy"),
        (policy_pb2.Policy(access=policy_pb2.ACCESS_SCOPED, calls=1), "needs scopes"),
        (policy_pb2.Policy(access=policy_pb2.ACCESS_AUTHENTICATED, scopes=["keys:read"], calls=1), "needs scopes"),
        (policy_pb2.Policy(access=policy_pb2.ACCESS_SCOPED, scopes=["keys:all"], calls=1), "keys:all"),
        (policy_pb2.Policy(access=policy_pb2.ACCESS_SCOPED, scopes=["keys:read"]), "costs nothing"),
    ],
    ids=["none", "access", "no scopes", "needless scopes", "unknown scope", "no cost"],
)
def test_a_method_without_a_sound_policy_keeps_the_server_from_starting(policy: Any, complaint: str) -> None:
    file = file_with(policy)
    with pytest.raises(PolicyError, match=complaint) as caught:
        methods([file])
    assert f"{file.package}.Service.Do" in str(caught.value)


def test_a_sound_policy_is_read_as_it_is_written() -> None:
    policy = policy_pb2.Policy(
        access=policy_pb2.ACCESS_SCOPED, scopes=["keys:read", "audit:read"], calls=2, executions=3
    )
    (method,) = methods([file_with(policy)]).values()
    assert (method.scopes, method.calls, method.executions, method.audited) == (
        {"keys:read", "audit:read"},
        2,
        3,
        False,
    )
