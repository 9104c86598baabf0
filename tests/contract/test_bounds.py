"""Every field of every request has bounds, and whatever is beyond them is refused by name, without its value."""

import math
from typing import Any
from uuid import UUID

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp
from relay.v1 import actions_pb2, auth_pb2, connections_pb2

from relay_grpc.call import Method
from tests.contract.requests import TIMESTAMP, VALIDATOR, Edge, all_fields, edges, fitting, put, rules_of, told
from tests.harness import Relay
from tests.rpc.wire import METHODS, Wire

CANARY = "canary4711"
EDGES = [
    pytest.param(method, edge, id=f"{method.name}-{edge.path}-{edge.rule}")
    for method in METHODS.values()
    for edge in edges(method.input_type.DESCRIPTOR)
]
FIELDS = [
    pytest.param(method, fields, id=f"{method.name}-{'.'.join(one.name for one in fields)}")
    for method in METHODS.values()
    for fields in all_fields(method.input_type.DESCRIPTOR)
]
FREE = "its type is bound enough"
INNER = "its fields have rules"
UNREAD = "answers alone hold it: UpdateConnection never reads it"
MASKED = "UpdateConnection checks what its mask names: see below"
UNBUILT = "its method is not built yet: whoever builds it gives it a bound"
WITHOUT_RULES = {
    "CreateConnectionRequest.webhook": "the oneof around it has the rule",
    "WebhookConfiguration.body_signature": FREE,
    "WebhookConfiguration.retry_policy": INNER,
    "CreateConnectionRequest.default": FREE,
    "CreateConnectionRequest.validate_only": FREE,
    "UpdateConnectionRequest.validate_only": FREE,
    "ExecuteRequest.validate_only": FREE,
    "RecoverExecutionsRequest.end_time": FREE,
    "RecoverExecutionsRequest.validate_only": FREE,
    "ListEventsRequest.start_time": FREE,
    "ListEventsRequest.end_time": FREE,
    "ExportEventsRequest.start_time": FREE,
    "ExportEventsRequest.end_time": FREE,
    "CreateApiKeyRequest.limits": INNER,
    "ApprovalPolicy.action": UNBUILT,
    "Connection.id": MASKED,
    "Connection.name": MASKED,
    "Connection.version": FREE,
    "Connection.enabled": FREE,
    "Connection.default": FREE,
    "Connection.webhook": INNER,
    "Connection.provider": UNREAD,
    "Connection.create_time": UNREAD,
    "Connection.update_time": UNREAD,
    "Connection.signing_secret": UNREAD,
    "Connection.health": UNREAD,
    "ConnectionHealth.breaker_state": UNREAD,
    "ConnectionHealth.consecutive_failures": UNREAD,
    "ConnectionHealth.failing_since_time": UNREAD,
    "ConnectionHealth.next_probe_time": UNREAD,
    "Connection.signing_keys": UNREAD,
    "SigningKey.id": UNREAD,
    "SigningKey.scheme": UNREAD,
    "SigningKey.public_key": UNREAD,
    "SigningKey.create_time": UNREAD,
    "SigningKey.expire_time": UNREAD,
}


def request_with(method: Method, fields: Any, value: Any) -> Any:
    request = fitting(method.input_type.DESCRIPTOR)
    put(request, fields, value)
    return request


@pytest.mark.parametrize(("method", "edge"), EDGES)
async def test_what_is_just_out_of_bounds_is_refused_by_its_name(wire: Wire, method: Method, edge: Edge) -> None:
    inside = VALIDATOR.collect_violations(request_with(method, edge.fields, edge.inside))
    assert edge.fields[-1].name not in {one.proto.field.elements[-1].field_name for one in inside}

    answer = await wire.call(method, request_with(method, edge.fields, edge.outside))
    assert (answer.code, answer.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert edge.path in answer.violations


def test_the_only_fields_without_rules_are_these() -> None:
    found = set()
    for method in METHODS.values():
        for fields in all_fields(method.input_type.DESCRIPTOR):
            field, rules = fields[-1], rules_of(fields[-1])
            name = f"{field.containing_type.name}.{field.name}"
            if not rules.required and not rules.WhichOneof("type"):
                found.add(name)
            elif rules.WhichOneof("type") == "repeated" and not rules.repeated.items.WhichOneof("type"):
                found.add(f"{name}[]")
    assert found == set(WITHOUT_RULES)


async def test_fields_that_wait_for_a_bound_are_of_methods_that_are_not_built(wire: Wire) -> None:
    for method in METHODS.values():
        names = {
            f"{fields[-1].containing_type.name}.{fields[-1].name}"
            for fields in all_fields(method.input_type.DESCRIPTOR)
        }
        if any(WITHOUT_RULES.get(f"{name}{item}") == UNBUILT for name in names for item in ("", "[]")):
            assert (await wire.call(method, fitting(method.input_type.DESCRIPTOR))).code == "UNIMPLEMENTED"


@pytest.mark.parametrize(
    ("method", "fields"), [case for case in FIELDS if case.values[1][-1].type == case.values[1][-1].TYPE_STRING]
)
async def test_a_text_with_a_nul_is_refused_because_the_database_has_none(
    wire: Wire, method: Method, fields: Any
) -> None:
    text = ["a\0"] if fields[-1].is_repeated else "a\0"
    answer = await wire.call(method, request_with(method, fields, text))
    assert (answer.code, answer.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert any(path.startswith(told(fields)) for path in answer.violations)


@pytest.mark.parametrize("seconds", [-62135596801, 253402300800, 2**63 - 1])
@pytest.mark.parametrize(
    ("method", "fields"),
    [
        case
        for case in FIELDS
        if (message := case.values[1][-1].message_type) is not None and message.full_name == TIMESTAMP
    ],
)
async def test_a_time_outside_the_years_1_to_9999_is_refused(
    wire: Wire, method: Method, fields: Any, seconds: int
) -> None:
    answer = await wire.call(method, request_with(method, fields, Timestamp(seconds=seconds)))
    assert (answer.code, answer.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert told(fields) in answer.violations


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
async def test_bytes_that_are_no_message_are_refused(wire: Wire, method: Method) -> None:
    answer = await wire.call(method, b"\xff" * 20)
    assert (answer.code, answer.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert answer.violations == {"": f"the bytes are not a {method.input_type.__name__}"}


async def test_a_message_beyond_1_mib_is_refused_by_grpc_itself(wire: Wire) -> None:
    """Before any of Relay's code sees it, so without an ErrorInfo: code and text are gRPC's."""
    request = fitting(actions_pb2.PreviewRequest.DESCRIPTOR)
    request.parameters.update({"payload": {"text": "x" * 1024 * 1024}})
    answer = await wire.call("ActionsService.Preview", request)
    assert (answer.code, answer.status) == ("RESOURCE_EXHAUSTED", None)
    assert "1048576" in answer.text


async def test_metadata_beyond_8_kib_is_refused_by_grpc_itself(wire: Wire) -> None:
    assert (await wire.call("AuthService.WhoAmI", x_note="x" * 7 * 1024)).code == "OK"
    answer = await wire.call("AuthService.WhoAmI", x_note="x" * 8 * 1024)
    assert (answer.code, answer.status) == ("RESOURCE_EXHAUSTED", None)


@pytest.mark.parametrize(
    ("path", "connection"),
    [
        ("id", {"id": "x"}),
        ("id", {}),
        ("name", {"id": str(UUID(int=1))}),
        ("name", {"id": str(UUID(int=1)), "name": "x" * 65}),
        ("webhook.url", {"id": str(UUID(int=1)), "webhook": {}}),
    ],
)
async def test_a_change_of_a_connection_keeps_the_bounds_of_a_new_one(
    wire: Wire, path: str, connection: dict[str, Any]
) -> None:
    mask = FieldMask(paths=[path if path != "id" else "enabled"])
    request = connections_pb2.UpdateConnectionRequest(connection=connection, update_mask=mask)
    answer = await wire.call("ConnectionsService.UpdateConnection", request)
    assert (answer.code, answer.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert set(answer.violations) == {f"connection.{path}"}


@pytest.mark.parametrize("paths", [[], ["id"], ["version"], ["signing_keys"], ["webhook.nothing"], ["", "name"]])
async def test_a_mask_names_what_can_be_changed(wire: Wire, paths: list[str]) -> None:
    request = connections_pb2.UpdateConnectionRequest(
        connection={"id": str(UUID(int=1)), "name": "x"}, update_mask=FieldMask(paths=paths)
    )
    answer = await wire.call("ConnectionsService.UpdateConnection", request)
    assert (answer.code, answer.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert all(path.startswith("update_mask") for path in answer.violations)


def nested(depth: int) -> Any:
    """Parameters of this many levels, the outermost object counted."""
    value: Any = CANARY
    for _ in range(depth - 2):
        value = [value]
    return {"payload": value}


@pytest.mark.parametrize(
    ("parameters", "field", "problem"),
    [
        (nested(33), "parameters", "32 levels deep"),
        ({"payload": {"many": [CANARY] * 10_000}}, "parameters", "10000 values"),
        ({"payload": {"large": CANARY * 30_000}}, "parameters", "262144 bytes"),
        ({"payload": {"number": math.nan}}, "parameters", "finite"),
        ({"payload": {"number": -math.inf}}, "parameters", "finite"),
        ({"payload": CANARY}, "parameters.payload", "object"),
        ({"payload": {}, "method": CANARY}, "parameters.method", "POST"),
        ({"payload": {}, CANARY: CANARY}, "parameters", "does not know"),
        ({}, "parameters", "payload"),
    ],
    ids=["deep", "many", "large", "nan", "infinity", "type", "enum", "additional", "missing"],
)
async def test_parameters_beyond_the_bounds_are_refused_without_their_values(
    wire: Wire, parameters: dict[str, Any], field: str, problem: str
) -> None:
    request = actions_pb2.PreviewRequest(action="webhook.send", parameters=Struct())
    request.parameters.update(parameters)
    answer = await wire.call("ActionsService.Preview", request)
    assert (answer.code, answer.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert problem in answer.violations[field]
    assert CANARY not in str(answer.status)


async def test_parameters_deeper_than_the_parser_goes_are_no_message(wire: Wire) -> None:
    request = actions_pb2.PreviewRequest(action="webhook.send")
    request.parameters.update(nested(60))
    answer = await wire.call("ActionsService.Preview", request)
    assert (answer.code, answer.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")


async def test_every_wrong_field_is_named_at_once(wire: Wire) -> None:
    answer = await wire.call("AuthService.CreateApiKey", auth_pb2.CreateApiKeyRequest(role="No", scopes=["no", "no"]))
    assert set(answer.violations) == {"name", "role", "scopes", "scopes[0]", "scopes[1]"}
    assert all(f"{field}: {problem}" in answer.text for field, problem in answer.violations.items())


async def test_parameters_keep_every_character(relay: Relay) -> None:
    payload = {"".join(map(chr, range(256))): "\0\U0010ffff", "number": -0.5}
    async with relay.connect(relay.tenant.admin) as client:
        connection = await client.connections.create_webhook("characters", "http://127.0.0.1:9/")
        preview = await client.actions.preview("webhook.send", {"payload": payload}, connection_id=connection.id)
        assert MessageToDict((await client.actions.get_preview(preview.id)).parameters) == {"payload": payload}


@pytest.mark.parametrize("names", [[f"n{number}" for number in range(2000)], ["x" * 20_000]], ids=["many", "long"])
async def test_however_much_is_wrong_the_answer_fits_its_trailers(wire: Wire, names: list[str]) -> None:
    request = actions_pb2.PreviewRequest(action="webhook.send", parameters={"payload": {}} | dict.fromkeys(names, 1))
    answer = await wire.call("ActionsService.Preview", request)
    assert (answer.code, answer.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert answer.violations
