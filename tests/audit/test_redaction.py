"""What is written of parameters and requests: their shape, and no value that could be a secret."""

import json
import timeit
from typing import Any
from uuid import UUID

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from relay.v1 import actions_pb2, audit_pb2, auth_pb2, connections_pb2

from relay_grpc.audit.redaction import (
    PREFIX_LENGTH,
    masked_prefix,
    names_a_secret,
    origin_of,
    request_prefix,
    told_apart_by,
)
from relay_grpc.call import Method
from tests.contract.requests import all_fields, fitting, put
from tests.rpc.wire import METHODS

MARKS = set('{}[],:*."')
VALUES = st.none() | st.booleans() | st.floats(allow_nan=False) | st.text()
# On a busy machine examples come as slowly as they come.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def parameters(names: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    inner = st.recursive(VALUES, lambda one: st.lists(one, max_size=3) | st.dictionaries(names, one, max_size=3))
    return st.dictionaries(names, inner, max_size=4)


@UNHURRIED
@given(parameters(st.text()))
def test_nothing_but_the_names_of_the_schema_appears(value: Any) -> None:
    value["known"] = dict(value)
    prefix = masked_prefix(value, {"known"})
    assert set(prefix) <= MARKS | set("known"), prefix
    assert len(prefix) <= PREFIX_LENGTH


def with_other_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: with_other_values(one) for name, one in value.items()}
    return list(map(with_other_values, value)) if isinstance(value, list) else "another value"


@UNHURRIED
@given(parameters(st.text()))
def test_the_same_shape_has_the_same_prefix_whatever_the_values_are(value: Any) -> None:
    assert masked_prefix(value, set(value)) == masked_prefix(with_other_values(value), set(value))


def test_a_large_or_deep_value_costs_no_more_than_its_prefix() -> None:
    deep: Any = "value"
    for _ in range(32):
        deep = [deep]
    assert masked_prefix({"deep": deep, "long": "x" * 10**6}, {"deep", "long"}).startswith('{"deep":[[[')
    many = {f"n{i:06}": i for i in range(10_000)}
    assert masked_prefix(many, set(many)) == ("{" + ",".join(f"{json.dumps(name)}:*" for name in many))[:PREFIX_LENGTH]


# By the names that go around, in the spellings that go around.
SECRET_NAMES = (
    *("password", "Password", "db_password", "passwd", "pwd", "passphrase", "secret", "clientSecret", "SECRET_KEY"),
    *("token", "access_token", "refreshToken", "X-Auth-Token", "authorization", "Authorization", "Proxy-Authorization"),
    *("api_key", "apikey", "apiKey", "X-API-Key", "api-key", "private_key", "privateKey", "AWS_SECRET_ACCESS_KEY"),
    *(
        "cookie",
        "Set-Cookie",
        "credentials",
        "bearer",
        "jwt",
        "otp",
        "pin",
        "cvv",
        "session",
        "session-id",
        "signingKey",
    ),
)
PLAIN_NAMES = ("name", "url", "method", "payload", "author", "key_count", "keyboard", "spinner", "sessions_per_day")


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_secret_by_its_name_is_not_shown_however_it_is_spelt(name: str) -> None:
    assert names_a_secret(name)
    for value in (4711, True, None, "canary", ["canary"], {name: "canary"}):
        assert set(masked_prefix({"payload": {name: value}}, {"payload"})) <= MARKS | set("payload")


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_other_names_are_no_secrets(name: str) -> None:
    assert not names_a_secret(name)


@pytest.mark.parametrize(
    ("request_", "prefix"),
    [
        (audit_pb2.ListEventsRequest(), "{}"),
        (audit_pb2.ListEventsRequest(page_size=10, action="canary", outcome=3), '{"page_size":10,"action":*,'),
        (actions_pb2.ListExecutionsRequest(states=[1, 2]), '{"states":["EXECUTION_STATE_PENDING",...]}'),
        (actions_pb2.GetExecutionRequest(id=str(UUID(int=7))), f'{{"id":"{UUID(int=7)}"}}'),
        (actions_pb2.GetExecutionRequest(id="canary"), '{"id":*}'),
        (audit_pb2.ListEventsRequest(start_time=Timestamp(seconds=1)), '{"start_time":"1970-01-01T00:00:01Z"}'),
        (actions_pb2.RecoverExecutionsRequest(start_time=Timestamp(seconds=2**60)), '{"start_time":*}'),
        (auth_pb2.RotateApiKeyRequest(overlap=Duration(seconds=90)), '{"overlap":"90s"}'),
        (auth_pb2.CreateApiKeyRequest(limits={"calls_per_minute": 6}), '{"limits":{"calls_per_minute":6}}'),
        (auth_pb2.VerifyApiKeyRequest(key="canary"), '{"key":*}'),
        (connections_pb2.CreateConnectionRequest(name="canary", default=True), '{"name":*,"default":true}'),
        (
            connections_pb2.CreateConnectionRequest(webhook={"url": "https://canary:canary@relay.example:8443/canary?a=b#c"}),
            '{"webhook":{"url":"https://relay.example:8443"}}',
        ),
    ],
)  # fmt: skip
def test_a_request_is_told_by_its_fields_and_its_harmless_values(request_: Any, prefix: str) -> None:
    assert request_prefix(request_)[: len(prefix)] == prefix
    assert len(request_prefix(request_)) <= PREFIX_LENGTH


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://127.0.0.1:9/hook", "http://127.0.0.1:9"),
        ("HTTPS://Relay.Example?canary", "https://relay.example"),
        ("http://[::1]:9/x", "http://[::1]:9"),
        ("http://user:canary@relay.example", "http://relay.example"),
        *[
            (url, "*")
            for url in (
                *("", "canary", "ftp://canary/", "//canary/", "http://", "http:///canary", "\nhttp://relay.example/"),
                *("http://canary@canary@relay.example/", "http://relay.example\\@canary/", "http://can ary/"),
                *("http://relay.example:canary/", "http://relay.example:999999/", "http://canäry/", "http://h\0/"),
            )
        ],
    ],
)
def test_of_a_url_the_origin_is_told_and_of_anything_else_nothing(url: str, origin: str) -> None:
    assert origin_of(url) == origin


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_no_text_of_any_request_is_told(method: Method) -> None:
    """In every field, of requests that need not be valid."""
    for fields in all_fields(method.input_type.DESCRIPTOR):
        if fields[-1].type not in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
            continue
        for text in ("canary", "http://canary", "http://x/canary", "\x00canary", f"{UUID(int=7)}canary"):
            message = fitting(method.input_type.DESCRIPTOR)
            value = text.encode() if fields[-1].type == FieldDescriptor.TYPE_BYTES else text
            put(message, fields, [value] if fields[-1].is_repeated else value)
            for told in (request_prefix(message), _alone(message)):
                assert "canary" not in told.replace('"http://canary"', ""), (fields[-1].full_name, told)  # an origin


def _alone(message: Any) -> str:
    """The prefix of each of its fields, as if there were no other."""
    told = []
    for field, _ in message.ListFields():
        one = type(message)()
        one.CopyFrom(message)
        for other, _ in message.ListFields():
            if other.name != field.name:
                one.ClearField(other.name)
        told.append(request_prefix(one))
    return "".join(told)


def test_equal_requests_are_equal_whatever_their_secrets_and_others_are_not() -> None:
    def create(name: str = "x", secret: str = "", **headers: str) -> Any:
        webhook = {"url": "https://relay.example", "headers": headers}
        return connections_pb2.CreateConnectionRequest(name=name, webhook=webhook, signing_secret=secret)

    told = told_apart_by(create())
    request = create(secret="canary", authorization="canary", other="canary")
    assert told_apart_by(request) == told
    assert request == create(secret="canary", other="canary", authorization="canary")  # it is as it was
    assert told_apart_by(create(name="y")) != told
    assert b"canary" not in told_apart_by(
        connections_pb2.UpdateConnectionRequest(connection={"webhook": {"headers": {"x": "canary"}}})
    )
    forwards, backwards = actions_pb2.PreviewRequest(action="a"), actions_pb2.PreviewRequest(action="a")
    forwards.parameters.update({"canary": 1})
    assert told_apart_by(forwards) == told_apart_by(backwards)


def test_a_large_request_costs_no_more_than_its_prefix() -> None:
    def preview(size: int) -> Any:
        message = actions_pb2.PreviewRequest(action="webhook.send")
        message.parameters.update({"payload": {f"n{i}": ["x" * 100] for i in range(size)}})
        return message

    small, large = (
        min(timeit.repeat(lambda one=one: request_prefix(one), number=100, repeat=20))
        for one in (preview(1), preview(2000))
    )
    assert large < 10 * small
