"""Who gets what out of every method: the matrix of matrix.py, and proof that it finds what it looks for."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.message_factory import GetMessageClass

from relay_grpc.call import Method
from tests.harness import Databases
from tests.rpc.holes import names_of_others_are_refused, no_policy_holds, no_query_names_its_workspace
from tests.rpc.matrix import Matrix, matrix_of
from tests.rpc.resources import Neighbours, neighbours, unfilled
from tests.rpc.wire import METHODS

# With rows of each kind: what is read, listed, named and changed.
TELLING = (
    "AuthService.ListApiKeys",
    "AuthService.RevokeApiKey",
    "ConnectionsService.GetConnection",
    "ActionsService.ListAttempts",
    "AuditService.ListEvents",
)


@pytest.fixture(scope="module")
async def two(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Neighbours]:
    async with databases.new() as url, neighbours(url, tmp_path_factory.mktemp("data")) as two:
        yield two


@pytest.fixture(scope="module")
async def matrix(two: Neighbours) -> Matrix:
    return await matrix_of(two)


def test_every_method_is_in_the_matrix_with_all_that_its_request_names() -> None:
    assert unfilled(METHODS) == []


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
async def test_each_gets_its_own_and_finds_nothing_of_another_tenant(matrix: Matrix, method: Method) -> None:
    assert await matrix.breaches(method) == []


def test_a_method_or_a_name_that_nobody_spoke_of_is_missed() -> None:
    file = FileDescriptorProto(name="tests/rpc/next.proto", package="tests.rpc.next", syntax="proto3")
    text = {"number": 1, "type": FieldDescriptorProto.TYPE_STRING, "label": FieldDescriptorProto.LABEL_OPTIONAL}
    file.message_type.add(name="Inner").field.add(name="next_id", **text)
    inner = file.message_type.add(name="Outer").field.add(name="inner", **text)
    inner.type, inner.type_name = FieldDescriptorProto.TYPE_MESSAGE, ".tests.rpc.next.Inner"
    made = descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
    get = METHODS["AuthService.GetApiKey"]
    grown = replace(get, input_type=GetMessageClass(made.message_types_by_name["Outer"]))
    assert unfilled(METHODS | {"AuthService.Next": get}) == ["AuthService.Next"]
    assert unfilled({"AuthService.GetApiKey": grown}) == [
        "AuthService.GetApiKey: inner.next_id",
        "AuthService.GetApiKey has no text id",
    ]


async def test_the_policies_of_postgres_hold_where_no_query_names_its_workspace(
    matrix: Matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_query_names_its_workspace(monkeypatch)
    for name in TELLING:
        assert await matrix.breaches(METHODS[name]) == []


async def test_the_matrix_finds_what_comes_through_where_both_walls_are_down(
    databases: Databases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_query_names_its_workspace(monkeypatch)
    no_policy_holds(monkeypatch)
    async with databases.new() as url, neighbours(url, tmp_path) as two:
        matrix = await matrix_of(two)
        for name in TELLING:
            found = await matrix.breaches(METHODS[name])
            assert any(": tells " in breach or "a row changed" in breach for breach in found), name


async def test_the_matrix_finds_an_answer_that_tells_what_is_there_from_what_is_not(
    two: Neighbours, matrix: Matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    names_of_others_are_refused(monkeypatch, two.postgres)
    found = await matrix.breaches(METHODS["ConnectionsService.GetConnection"])
    assert any("PERMISSION_DENIED" in breach and "foreign id" in breach for breach in found)
    assert not any(": tells " in breach for breach in found)
