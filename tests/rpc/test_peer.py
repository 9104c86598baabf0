"""Where a call comes from: the other end of its connection, and a header only where a trusted proxy wrote it."""

from collections.abc import AsyncIterator
from ipaddress import ip_network
from uuid import uuid4

import pytest
from google.rpc.error_details_pb2 import RetryInfo

from relay_grpc.audit.event import SYSTEM_WORKSPACE
from relay_grpc.interceptors.peer import address_of
from tests.auth.forgery import forged
from tests.harness import Databases, Relay, running, settings_for
from tests.rpc.wire import Answer, Wire, wired

PROXIES = [ip_network(text) for text in ("10.0.0.0/8", "2001:db8:ff::/48", "127.0.0.1")]


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.1:4711", "192.0.2.1"),
        ("ipv6:%5B2001:db8::1%5D:4711", "2001:db8::1"),
        ("ipv6:[2001:db8::1]:4711", "2001:db8::1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:4711", "fe80::1"),
        ("ipv6:%5B::ffff:192.0.2.1%5D:4711", "192.0.2.1"),
        ("unix:/run/relay.sock", "unix"),
        ("unix:", "unix"),
    ],
)
def test_a_connection_has_an_address_or_a_kind(peer: str, address: str) -> None:
    assert address_of(peer, [], []) == address_of(peer, [], PROXIES) == address
    forged = [("x-forwarded-for", "198.51.100.7")]
    assert address_of(peer, forged, []) == address_of(peer, forged, PROXIES) == address


@pytest.mark.parametrize(
    ("headers", "address"),
    [
        (["198.51.100.7"], "198.51.100.7"),
        ([" 198.51.100.7 "], "198.51.100.7"),
        (["203.0.113.9, 198.51.100.7"], "198.51.100.7"),  # whatever the caller itself wrote stands to the left
        (["203.0.113.9, 198.51.100.7, 10.1.2.3, 2001:db8:ff::5"], "198.51.100.7"),
        (["203.0.113.9", "198.51.100.7", "10.1.2.3"], "198.51.100.7"),
        (["10.9.9.9, 10.1.2.3"], "10.9.9.9"),  # within the proxies' own network
        (["2001:db8::7"], "2001:db8::7"),
        (["198.51.100.7:4711"], "198.51.100.7"),
        (["[2001:db8::7]:4711"], "2001:db8::7"),
        (["::ffff:198.51.100.7"], "198.51.100.7"),
        (["198.51.100.7, somebody"], "10.1.1.1"),
        (["198.51.100.7, somebody, 10.1.2.3"], "10.1.2.3"),  # who passed on what is no address
        ([""], "10.1.1.1"),
        ([","], "10.1.1.1"),
        ([], "10.1.1.1"),
    ],
)
@pytest.mark.parametrize("peer", ["ipv4:10.1.1.1:4711", "ipv6:%5B::ffff:10.1.1.1%5D:4711"])
def test_the_caller_behind_proxies_is_the_last_that_is_none(peer: str, headers: list[str], address: str) -> None:
    metadata: list[tuple[str, str | bytes]] = [("x-forwarded-for", value) for value in headers]
    assert address_of(peer, [("x-real-ip", "1.2.3.4"), *metadata], PROXIES) == address


@pytest.fixture(scope="module")
async def behind_a_proxy(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Relay]:
    settings = settings_for(tmp_path_factory.mktemp("data"), RELAY_TRUSTED_PROXIES="127.0.0.0/8, ::1/128")
    async with databases.new() as url, running(url, settings) as relay:
        yield relay


async def logged_peer(relay: Relay, wire: Wire, forwarded_for: str) -> str:
    request_id = uuid4().hex
    await wire.call("AuditService.ListEvents", x_request_id=request_id, x_forwarded_for=forwarded_for)
    (row,) = await relay.sql("SELECT peer FROM audit_events WHERE request_id = $1", request_id)
    return str(row["peer"])


async def test_a_trusted_proxy_is_believed_and_nobody_else(relay: Relay, behind_a_proxy: Relay) -> None:
    async with wired(relay) as direct, wired(behind_a_proxy) as proxied:
        assert await logged_peer(relay, direct, "198.51.100.7") == "127.0.0.1"
        assert await logged_peer(behind_a_proxy, proxied, "203.0.113.9, 198.51.100.7") == "198.51.100.7"


async def test_wrong_keys_are_counted_for_whom_they_come_from_and_not_for_the_proxy(behind_a_proxy: Relay) -> None:
    async with wired(behind_a_proxy) as wire:

        async def guess(peer: str) -> Answer:
            return await wire.call("AuthService.WhoAmI", key=forged(), x_forwarded_for=f"198.51.100.9, {peer}")

        answers = [await guess("192.0.2.66") for _ in range(14)]
        assert [answer.code for answer in answers] == ["UNAUTHENTICATED"] * 10 + ["RESOURCE_EXHAUSTED"] * 4
        assert {answer.reason for answer in answers[10:]} == {"AUTHENTICATION_THROTTLED"}
        assert all(
            0 < answer.detail(RetryInfo).retry_delay.ToTimedelta().total_seconds() <= 60 for answer in answers[10:]
        )
        assert (await guess("192.0.2.67")).code == "UNAUTHENTICATED"
        assert (await wire.call("AuthService.WhoAmI", x_forwarded_for="192.0.2.66")).code == "OK"
    await behind_a_proxy.app.recorder.flush(everything=True)
    rows = await behind_a_proxy.sql(
        "SELECT workspace_id, actor_type, status, reason, sum(count) AS count FROM audit_events "
        "WHERE peer = '192.0.2.66' GROUP BY 1, 2, 3, 4 ORDER BY 4"
    )
    assert [tuple(row) for row in rows] == [
        (SYSTEM_WORKSPACE, "unknown", "denied", "AUTHENTICATION_THROTTLED", 4),
        (SYSTEM_WORKSPACE, "unknown", "denied", "CREDENTIALS_INVALID", 10),
    ]
