"""Parameters: canonical, within bounds, as the schema says, and refused by name without quoting a value."""

import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from relay._vendor.buf.validate import validate_pb2
from relay.v1 import actions_pb2

from relay_grpc import errors
from relay_grpc.actions.catalogue import (
    CATALOGUE,
    MAX_DEPTH,
    MAX_PARAMETERS_BYTES,
    MAX_VALUES,
    Delivery,
    find,
)

SEND = find("webhook.send")
SCALARS = st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text()  # as of a Struct
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)
# A busy machine is no defect.
PROPERTY = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PAYLOADS = st.dictionaries(st.text(), VALUES)


def refused(parameters: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(errors.InvalidRequest) as refusal:
        SEND.canonical(parameters)
    return dict(refusal.value.violations)


def read(text: str) -> Any:
    """JSON with all numbers as IEEE 754 doubles, as RFC 8785 and Struct have them."""
    return json.loads(text, parse_int=float)


def nested(depth: int) -> Any:
    """A list in a list ... so deep."""
    value: Any = []
    for _ in range(depth - 1):
        value = [value]
    return value


@PROPERTY
@given(PAYLOADS)
def test_canonical_json_says_the_same_and_is_its_own_canonical_json(payload: dict[str, Any]) -> None:
    text = SEND.canonical({"payload": payload})
    assert read(text) == {"payload": payload}
    assert SEND.canonical(read(text)) == text


@PROPERTY
@given(PAYLOADS, st.randoms(use_true_random=False))
def test_canonical_json_does_not_depend_on_the_order_of_fields(payload: dict[str, Any], random: Any) -> None:
    names = list(payload)
    random.shuffle(names)
    shuffled = {name: payload[name] for name in names}
    assert SEND.canonical({"method": "PUT", "payload": shuffled}) == SEND.canonical(
        {"payload": payload, "method": "PUT"}
    )


def test_canonical_json_is_that_of_the_rfc() -> None:
    """The sample of RFC 8785, section 3.2.2, with its numbers and its order by UTF-16."""
    payload = {
        "numbers": [333333333.33333329, 1e30, 4.50, 2e-3, 0.000000000000000000000000001, -0.0],
        "literals": [None, True, False],
        "\U0001f600": "smiley",
        "\ufb33": "dalet",
    }
    assert SEND.canonical({"payload": payload}) == (
        '{"payload":{"literals":[null,true,false],'
        '"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27,0],"\U0001f600":"smiley","\ufb33":"dalet"}}'
    )


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({}, "parameters"),
        ({"payload": "secret"}, "parameters.payload"),
        ({"payload": ["secret"]}, "parameters.payload"),
        ({"payload": None}, "parameters.payload"),
        ({"payload": {}, "method": "secret"}, "parameters.method"),
        ({"payload": {}, "method": None}, "parameters.method"),
        ({"payload": {}, "url": "secret"}, "parameters"),
        ({"payload": {}, "secret": 1}, "parameters"),
    ],
    ids=str,
)
def test_what_the_schema_forbids_is_named_and_not_quoted(parameters: dict[str, Any], field: str) -> None:
    violations = refused(parameters)
    assert list(violations) == [field]
    assert violations[field]
    assert "secret" not in violations[field]


def test_all_violations_are_told_together() -> None:
    assert set(refused({"payload": 1, "method": "GET"})) == {"parameters.payload", "parameters.method"}


def test_depth_is_bounded() -> None:
    fits = MAX_DEPTH - 2  # parameters and payload are the first two levels
    SEND.canonical({"payload": {"list": nested(fits)}})
    for depth in (fits + 1, 100_000):
        assert "levels" in refused({"payload": {"list": nested(depth)}})["parameters"]


def test_the_number_of_values_is_bounded() -> None:
    fits = MAX_VALUES - 3  # parameters, payload and the list are values too
    SEND.canonical({"payload": {"list": [0] * fits}})
    assert "values" in refused({"payload": {"list": [0] * (fits + 1)}})["parameters"]


@pytest.mark.parametrize("character", ["x", "é", "\U0001f600"])
def test_the_size_is_bounded_in_bytes(character: str) -> None:
    overhead = len(SEND.canonical({"payload": {"text": ""}}))
    count, rest = divmod(MAX_PARAMETERS_BYTES - overhead, len(character.encode()))
    SEND.canonical({"payload": {"text": character * count + "x" * rest}})
    assert "bytes" in refused({"payload": {"text": character * count + "x" * (rest + 1)}})["parameters"]


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_numbers_that_json_has_not_are_refused(number: float) -> None:
    assert "finite" in refused({"payload": {"deep": [{"er": number}]}})["parameters"]


def test_the_catalogue_can_be_asked_for() -> None:
    field = actions_pb2.PreviewRequest.DESCRIPTOR.fields_by_name["action"]
    name = re.compile(field.GetOptions().Extensions[validate_pb2.field].string.pattern)
    names = [action.name for action in CATALOGUE]
    assert len(set(names)) == len(names)
    for action in CATALOGUE:
        assert find(action.name) is action
        assert name.fullmatch(action.name)
        assert action.version >= 1
        actions_pb2.Delivery.Value(f"DELIVERY_{Delivery(action.delivery).name}")
    with pytest.raises(errors.NotFound, match=r"webhook\.sent"):
        find("webhook.sent")
