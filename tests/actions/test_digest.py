"""The digest that Postgres recomputes when a preview is executed is the one that the preview was given."""

from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import asyncpg
import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_grpc.actions.preview import DIGEST_SQL, digest
from tests.harness import Databases

# What a Struct and a column can hold: no NUL, no lone surrogates, and of numbers IEEE 754 doubles.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
CALLERS = TEXT | st.sampled_from(["key:1", 'user:https://a"b#\\', "user:ä\x01\x1f\x7f\u2028\U0001f600\b\f\n\r\t/<&"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)


@pytest.fixture(scope="module")
async def connection(databases: Databases) -> AsyncIterator[Any]:
    async with databases.new() as url:
        made = await asyncpg.connect(url)
        yield made
        await made.close()


@settings(max_examples=200, deadline=None)
@given(
    action=TEXT,
    versions=st.tuples(st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1)),
    ids=st.tuples(st.uuids(), st.uuids()),
    caller=CALLERS,
    parameters=st.dictionaries(TEXT, VALUES, max_size=4),
)
async def test_postgres_and_python_compute_the_same_digest(
    connection: Any,
    action: str,
    versions: tuple[int, int],
    ids: tuple[UUID, UUID],
    caller: str,
    parameters: dict[str, Any],
) -> None:
    preview = "(SELECT $1::text action_type, $2::int action_version, $3::uuid workspace_id, $4::text caller,"
    preview += " $5::uuid connection_id, $6::int connection_version, $7::text parameters) p"
    canonical = rfc8785.dumps(parameters).decode()
    computed = await connection.fetchval(
        f"SELECT {DIGEST_SQL} FROM {preview}", action, versions[0], ids[0], caller, ids[1], versions[1], canonical
    )
    assert computed == digest(
        action=action,
        action_version=versions[0],
        workspace_id=ids[0],
        caller=caller,
        connection_id=ids[1],
        connection_version=versions[1],
        parameters=parameters,
    )
