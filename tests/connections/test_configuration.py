"""What is stored of a webhook's configuration, and which headers may be sent along."""

from datetime import timedelta

import pytest
from relay.v1 import connections_pb2

from relay_grpc import errors
from relay_grpc.actions.execution import RETRY_SCHEDULE, delays
from relay_grpc.connections import configuration

URL = "https://hooks.example/in"


def webhook(**fields: object) -> connections_pb2.WebhookConfiguration:
    return connections_pb2.WebhookConfiguration(url=URL, **fields)  # type: ignore[arg-type]


def policy(*seconds: float) -> connections_pb2.RetryPolicy:
    return connections_pb2.RetryPolicy(delays=[timedelta(seconds=each) for each in seconds])


def test_what_is_unset_has_no_member() -> None:
    assert configuration.merged({}, configuration.stored(webhook())) == {"url": URL, "body_signature": False}


@pytest.mark.parametrize(
    "asked",
    [
        webhook(),
        webhook(body_signature=True, timeout=timedelta(seconds=2.5)),
        webhook(retry_policy=policy(1, 1.5, 86400)),
        webhook(retry_policy=policy()),
        webhook(headers={"X-Tenant": "", "authorization": ""}),
    ],
    ids=["bare", "timeout", "delays", "one attempt", "headers"],
)
def test_what_is_stored_is_what_was_set(asked: connections_pb2.WebhookConfiguration) -> None:
    kept = configuration.merged({}, configuration.stored(asked))
    assert configuration.message(kept) == asked
    assert configuration.message(kept).HasField("retry_policy") == asked.HasField("retry_policy")


def test_attempts_go_by_what_is_stored() -> None:
    assert delays(configuration.stored(webhook(retry_policy=policy(1, 60)))) == (
        timedelta(seconds=1),
        timedelta(minutes=1),
    )
    assert delays(configuration.stored(webhook(retry_policy=policy()))) == ()
    assert delays(configuration.merged({}, configuration.stored(webhook()))) == RETRY_SCHEDULE


def test_the_values_of_headers_are_not_stored() -> None:
    kept = configuration.stored(webhook(headers={"b": "secret", "A": "secret"}))
    assert kept["headers"] == ["A", "b"]
    assert "secret" not in str(kept)


def test_a_change_touches_its_own_members_alone() -> None:
    before = configuration.merged(
        {}, configuration.stored(webhook(timeout=timedelta(seconds=5), retry_policy=policy(9)))
    )
    after = configuration.merged(before, configuration.stored(connections_pb2.WebhookConfiguration(), ["timeout"]))
    assert after == {"url": URL, "body_signature": False, "retry_delays": [9]}


@pytest.mark.parametrize(
    "name",
    [
        *("Host", "user-agent", "Content-Type", "content-length", "CONTENT-ENCODING", "accept-encoding"),
        *("webhook-id", "Webhook-Signature", "webhook-anything", "X-Signature", "traceparent", "tracestate"),
        *("connection", "Keep-Alive", "TE", "Trailer", "transfer-encoding", "Upgrade", "expect", "HTTP2-Settings"),
        *("proxy-authorization", "Proxy-Connection"),
    ],
)
def test_what_relay_or_http_sets_is_refused(name: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="is set by Relay or by HTTP"):
        configuration.headers({name: "x"}, {}, "webhook.headers")


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"x-a": "1", "X-A": "2"}, "two names differ in upper and lower case alone"),
        ({"x-a": ""}, "a value is empty"),
        ({"x-a": " 1"}, "a value begins or ends with a space"),
        ({"x-a": "   "}, "a value begins or ends with a space"),
    ],
)
def test_headers_that_could_not_be_sent_as_told_are_refused(asked: dict[str, str], problem: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=problem) as refusal:
        configuration.headers(asked, {}, "webhook.headers")
    assert {field for field, _ in refusal.value.violations} == {"webhook.headers"}


def test_an_empty_value_stands_for_the_kept_one_in_any_case() -> None:
    asked = {"Authorization": "", "x-new": "n"}
    assert configuration.headers(asked, {"authorization": "kept", "x-old": "o"}, "") == {
        "Authorization": "kept",
        "x-new": "n",
    }
    with pytest.raises(errors.InvalidRequest, match="there is none to keep"):
        configuration.headers({"x-other": ""}, {"authorization": "kept"}, "")
