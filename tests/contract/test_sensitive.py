"""What is marked (sensitive) goes nowhere but where it has to: not into logs, audit events, errors or metrics."""

import base64
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.struct_pb2 import Struct
from prometheus_client import generate_latest
from relay.v1 import actions_pb2, auth_pb2, connections_pb2, policy_pb2

from relay_grpc.audit.redaction import names_a_secret
from relay_grpc.call import Method
from relay_grpc.interceptors.policy import FILES
from tests.contract.requests import all_fields, fitting, put
from tests.harness import Receiver, Relay
from tests.rpc.wire import METHODS, Answer, Wire

CANARY = "canary4711"
SIGNING_SECRET = "whsec_" + base64.b64encode((CANARY * 3).encode()).decode()
LEAKS = (CANARY, SIGNING_SECRET.removeprefix("whsec_").rstrip("="), base64.b64encode(CANARY.encode() * 3).decode())


def sensitive(kind: Descriptor) -> Iterator[tuple[FieldDescriptor, ...]]:
    for fields in all_fields(kind):
        if fields[-1].GetOptions().Extensions[policy_pb2.sensitive]:
            yield fields


FIELDS = [
    pytest.param(method, fields, id=f"{method.name}-{'.'.join(one.name for one in fields)}")
    for method in METHODS.values()
    for fields in sensitive(method.input_type.DESCRIPTOR)
]


def planted(field: FieldDescriptor) -> list[Any]:
    """Values with the canary in them: one within the field's bounds, others beyond."""
    if field.message_type and field.message_type.GetOptions().map_entry:
        return [{"x": CANARY}, {"x": f"{CANARY}\n"}, {"x": CANARY * 500}, {f"{CANARY} ": CANARY}, {"host": CANARY}]
    if field.message_type:
        parameters = [Struct(), Struct(), Struct()]
        parameters[0].update({"payload": {"to": [CANARY], "note": CANARY}})
        parameters[1].update({"payload": CANARY, "method": CANARY})
        parameters[2].update({"payload": {"long": CANARY * 30_000}})
        return parameters
    return [SIGNING_SECRET, CANARY, CANARY * 500, f"{CANARY}\0"]


async def assert_no_leak(relay: Relay, caplog: pytest.LogCaptureFixture, answers: list[Answer]) -> None:
    await relay.app.recorder.flush(everything=True)
    events = await relay.sql("SELECT to_jsonb(a)::text AS text FROM audit_events a")
    assert events
    told = {
        "log": caplog.text + "".join(str(vars(record)) for record in caplog.records),
        "audit log": "".join(event["text"] for event in events),
        "errors": "".join(f"{answer.text} {answer.status} {answer.trailing}" for answer in answers),
        "metrics": generate_latest(relay.app.metrics.registry).decode(),
    }
    assert [(place, leak) for place, text in told.items() for leak in LEAKS if leak in text] == []


@pytest.mark.parametrize(("method", "fields"), FIELDS)
async def test_a_sensitive_field_of_a_request_is_told_to_nobody(
    relay: Relay, wire: Wire, caplog: pytest.LogCaptureFixture, method: Method, fields: tuple[FieldDescriptor, ...]
) -> None:
    caplog.set_level(logging.DEBUG)
    answers = []
    for value in planted(fields[-1]):
        request = fitting(method.input_type.DESCRIPTOR)
        put(request, fields, value)
        answers += [await wire.call(method, request), await wire.call(method, request.SerializeToString() + b"\xff")]
    assert all(answer.code != "INTERNAL" for answer in answers)
    await assert_no_leak(relay, caplog, answers)


def test_these_fields_are_sensitive() -> None:
    files = {field.containing_type.file for method in METHODS.values() for field in method.input_type.DESCRIPTOR.fields}
    marked = {
        f"{message.name}.{fields[-1].name}"
        for file in files
        for message in file.message_types_by_name.values()
        for fields in sensitive(message)
        if len(fields) == 1
    }
    assert marked == {
        "ApiKey.secret",
        "VerifyApiKeyRequest.key",
        "Connection.signing_secret",
        "CreateConnectionRequest.signing_secret",
        "RotateSecretRequest.signing_secret",
        "WebhookConfiguration.headers",
        "StartAuthorizationResponse.authorization_url",
        "CompleteAuthorizationRequest.state",
        "CompleteAuthorizationRequest.code",
        "PreviewRequest.parameters",
        "Preview.parameters",
    }


# Named like secrets, and none: they are told to whoever may ask for the page or the call.
NO_SECRETS = {"page_token", "next_page_token"}


def test_what_is_named_like_a_secret_is_sensitive() -> None:
    """In any message of the API. Events mask it either way."""
    named = {
        field.full_name: field.GetOptions().Extensions[policy_pb2.sensitive]
        for file in FILES
        for message in file.message_types_by_name.values()
        for field in message.fields
        if names_a_secret(field.name) and field.name not in NO_SECRETS and field.type == field.TYPE_STRING
    }
    assert named
    assert [name for name, marked in named.items() if not marked] == []


async def test_the_main_job_tells_its_secrets_to_nobody(
    relay: Relay, wire: Wire, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    """From the key that is made to the delivery: the parameters, the signing secret and the key go their way alone."""
    caplog.set_level(logging.DEBUG)
    answers = []

    async def do(name: str, request: Any, key: str | None = None) -> Any:
        answers.append(await wire.call(name, request, key, x_request_id="main-job"))
        return answers[-1].reply

    webhook = connections_pb2.WebhookConfiguration(url=receiver.url, body_signature=True)
    connection = await do(
        "ConnectionsService.CreateConnection",
        connections_pb2.CreateConnectionRequest(name="leaks", webhook=webhook, signing_secret=SIGNING_SECRET),
    )
    old = await do("AuthService.CreateApiKey", auth_pb2.CreateApiKeyRequest(name="leaks", role="developer"))
    key = await do("AuthService.RotateApiKey", auth_pb2.RotateApiKeyRequest(id=old.id))
    verdict = await do("AuthService.VerifyApiKey", auth_pb2.VerifyApiKeyRequest(key=key.secret))
    assert verdict.code == auth_pb2.VERIFICATION_CODE_VALID
    request = actions_pb2.PreviewRequest(action="webhook.send", connection_id=connection.id)
    request.parameters.update({"payload": {"to": CANARY, "all": [{"deep": CANARY}]}})
    preview = await do("ActionsService.Preview", request, key.secret)
    execution = await do("ActionsService.Execute", actions_pb2.ExecuteRequest(preview_id=preview.id), key.secret)
    assert execution.state == actions_pb2.EXECUTION_STATE_SUCCESS
    assert CANARY in receiver.requests[0][1].decode()
    receiver.verify(SIGNING_SECRET)
    await assert_no_leak(relay, caplog, answers)
    for secret in (old.secret, key.secret):
        assert secret not in caplog.text
        assert not await relay.sql("SELECT FROM audit_events a WHERE to_jsonb(a)::text LIKE '%' || $1 || '%'", secret)
