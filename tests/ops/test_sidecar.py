import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import aiohttp
import grpc
import pytest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from relay.v1 import actions_pb2, audit_pb2, auth_pb2, connections_pb2

from relay_grpc import sidecar as sidecar_module
from relay_grpc.actions.execution import Outcome, State
from relay_grpc.auth.tokens import Defect
from relay_grpc.sidecar import Sidecar
from relay_grpc.telemetry import Metrics

SECURITY_HEADERS = {
    "Cache-Control": "no-store, max-age=0",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Strict-Transport-Security": "max-age=63072000; includeSubDomains",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "deny",
    "X-Permitted-Cross-Domain-Policies": "none",
}
FRAMING_HEADERS = {"Allow", "Connection", "Content-Length", "Content-Type", "Date"}

FAMILIES = {
    "relay_rpc": {"service", "method", "code"},
    "relay_rpc_duration_seconds": {"service", "method", "le"},
    "relay_action_duration_seconds": {"provider", "action", "le"},
    "relay_attempts": {"provider", "outcome"},
    "relay_executions": {"provider", "action", "state"},
    "relay_executions_in_flight": set(),
    "relay_oldest_due_seconds": set(),
    "relay_breaker_transitions": {"to"},
    "relay_connections_disabled": {"reason"},
    "relay_rate_limited": {"budget", "holder"},
    "relay_rate_limit_shadowed": {"budget", "holder"},
    "relay_rate_limiter_degraded": set(),
    "relay_instances": set(),
    "relay_auth_failures": {"reason"},
    "relay_oidc_readings": {"outcome"},
    "relay_key_hashes": set(),
    "relay_changes_listening": set(),
    "relay_audit_events": {"outcome"},
    "relay_audit_integration_seconds": {"le"},
    "relay_audit_oldest_pending_seconds": set(),
    "relay_audit_damaged_logs": set(),
    "relay_audit_unpublished_seconds": set(),
    "relay_audit_publish_failures": set(),
    "relay_audit_contradicted_logs": set(),
    "relay_audit_default_events": set(),
    "relay_audit_partition_failures": set(),
    "relay_group_commit_size": {"queue", "le"},
}


async def healthy() -> dict[str, bool]:
    return {"postgres": True}


@asynccontextmanager
async def serving(metrics: Metrics | None = None, ready=healthy) -> AsyncIterator[aiohttp.ClientSession]:
    sidecar = Sidecar("127.0.0.1", 0, metrics=metrics, ready=ready)
    port = await sidecar.start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
            yield client
    finally:
        await sidecar.stop()


async def read(client: aiohttp.ClientSession, path: str, method: str = "GET") -> tuple[int, str]:
    async with client.request(method, path) as response:
        return response.status, await response.text()


def check_headers(headers: dict[str, str]) -> None:
    assert headers.keys() - FRAMING_HEADERS == SECURITY_HEADERS.keys() | {"Permissions-Policy"}
    assert {name: headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
    features = headers["Permissions-Policy"].split(", ")
    assert all(feature.endswith("=()") for feature in features)
    assert {"camera=()", "geolocation=()", "microphone=()", "usb=()"} <= set(features)


class BrokenCollector(Collector):
    """Answers while it is registered, then raises."""

    def __init__(self) -> None:
        self.works = True

    def collect(self) -> Iterator[GaugeMetricFamily]:
        if not self.works:
            raise RuntimeError("a secret of the inside")
        yield GaugeMetricFamily("relay_test", "A gauge.", 1)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/livez", 200),
        ("HEAD", "/livez", 200),
        ("GET", "/readyz", 200),
        ("GET", "/_stcore/health", 200),
        ("GET", "/metrics", 500),
        ("GET", "/", 404),
        ("GET", "/livez/", 404),
        ("GET", "/secrets?key=1", 404),
        ("POST", "/livez", 405),
        ("DELETE", "/metrics", 405),
        ("OPTIONS", "/readyz", 405),
    ],
)
async def test_every_answer_carries_the_security_headers_and_no_server(method: str, path: str, status: int) -> None:
    metrics, broken = Metrics(), BrokenCollector()
    metrics.registry.register(broken)
    broken.works = False
    async with serving(metrics) as client, client.request(method, path) as response:
        assert response.status == status
        check_headers(dict(response.headers))
        if status >= 400:
            assert (await response.json()).keys() == {"error"}


@pytest.mark.parametrize(
    "request_bytes",
    [b"NOT HTTP\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n", b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\n\r\n"],
)
async def test_malformed_requests_are_answered_alike(request_bytes: bytes) -> None:
    sidecar = Sidecar("127.0.0.1", 0, metrics=None, ready=healthy)
    reader, writer = await asyncio.open_connection("127.0.0.1", await sidecar.start())
    writer.write(request_bytes)
    head, body = (await reader.read()).decode().split("\r\n\r\n")
    writer.close()
    await sidecar.stop()
    status_line, *lines = head.split("\r\n")
    assert " 400 " in status_line
    check_headers(dict(line.split(": ", 1) for line in lines))
    assert json.loads(body) == {"error": "bad_request"}


async def test_errors_reveal_nothing_internal(caplog: pytest.LogCaptureFixture) -> None:
    metrics, broken = Metrics(), BrokenCollector()
    metrics.registry.register(broken)
    async with serving(metrics) as client:
        assert (await read(client, "/metrics"))[0] == 200
        broken.works = False
        assert await read(client, "/metrics") == (500, '{"error": "internal"}')
        assert await read(client, "/nothing") == (404, '{"error": "not_found"}')
        assert await read(client, "/metrics", "PUT") == (405, '{"error": "method_not_allowed"}')
        broken.works = True
        assert (await read(client, "/metrics"))[0] == 200
    assert "a secret of the inside" in caplog.text  # the operator's log has it


async def test_health_and_liveness_answer_exactly() -> None:
    async with serving() as client:
        assert await read(client, "/_stcore/health") == (200, '{"ok": true}')
        assert await read(client, "/livez") == (200, "ok")


async def test_readiness_follows_the_checks_and_liveness_does_not() -> None:
    checks = {"postgres": True, "serving": True}

    async def ready() -> dict[str, bool]:
        return checks

    async with serving(ready=ready) as client:
        for postgres, status in ((True, 200), (False, 503), (True, 200)):
            checks["postgres"] = postgres
            answered, body = await read(client, "/readyz")
            assert answered == status
            assert json.loads(body) == {"ready": postgres, "checks": {"postgres": postgres, "serving": True}}
            assert await read(client, "/livez") == (200, "ok")
        checks.clear()
        assert await read(client, "/readyz") == (503, '{"ready": false, "checks": {}}')


async def test_checks_that_raise_are_not_ready_and_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def ready() -> dict[str, bool]:
        raise ConnectionError("postgres refused")

    async with serving(ready=ready) as client:
        assert await read(client, "/readyz") == (503, '{"ready": false, "checks": {}}')
    assert "postgres refused" in caplog.text


async def test_a_hanging_check_is_not_ready_and_probes_share_it(caplog: pytest.LogCaptureFixture) -> None:
    hanging, runs = asyncio.Event(), 0

    async def ready() -> dict[str, bool]:
        nonlocal runs
        runs += 1
        while not hanging.is_set():
            try:
                await hanging.wait()
            except asyncio.CancelledError:
                continue  # as a driver does that waits for its own cancellation
        return {"postgres": True}

    async with serving(ready=ready) as client, asyncio.timeout(20):
        try:
            probes = [asyncio.create_task(read(client, "/readyz")) for _ in range(20)]
            await asyncio.sleep(0)
            assert await read(client, "/livez") == (200, "ok")
            assert set(await asyncio.gather(*probes)) == {(503, '{"ready": false, "checks": {}}')}
            assert runs == len(caplog.records) == 1
        finally:
            hanging.set()
        assert (await read(client, "/readyz"))[0] == 200


async def test_a_check_that_took_too_long_is_cancelled_and_run_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar_module, "READY_SECONDS", 0.2)
    hangs = True

    async def ready() -> dict[str, bool]:
        if hangs:
            await asyncio.Future()
        return {"postgres": True}

    async with serving(ready=ready) as client:
        assert (await read(client, "/readyz"))[0] == 503
        hangs = False
        assert (await read(client, "/readyz"))[0] == 200


async def test_a_scrape_does_not_block_the_loop() -> None:
    release = threading.Event()

    class SlowCollector(Collector):
        def describe(self) -> list[GaugeMetricFamily]:
            return []

        def collect(self) -> Iterator[GaugeMetricFamily]:
            assert release.wait(10)
            yield GaugeMetricFamily("relay_test", "A gauge.", 1)

    metrics = Metrics()
    metrics.registry.register(SlowCollector())
    async with serving(metrics) as client:
        scrape = asyncio.create_task(read(client, "/metrics"))
        await asyncio.sleep(0.05)
        assert await read(client, "/livez") == (200, "ok")
        assert not scrape.done()
        release.set()
        assert (await scrape)[0] == 200


async def test_metrics_answer_404_when_telemetry_is_off() -> None:
    async with serving(metrics=None) as client:
        assert await read(client, "/metrics") == (404, '{"error": "not_found"}')


def use_everything(metrics: Metrics) -> None:
    """Every method with every status, every action with every state: what a thousand workspaces do is among it."""
    files = (actions_pb2, audit_pb2, auth_pb2, connections_pb2)
    for service in (service for file in files for service in file.DESCRIPTOR.services_by_name.values()):
        for method in service.methods:
            rpc = metrics.rpc(service.name, method.name)
            for code in grpc.StatusCode:
                rpc.observe(code.name, 0.003)
    for provider in ("webhook", "slack", "google", "microsoft", "independent"):
        for action in ("send", "schedule"):
            metrics.action_duration.labels(provider, action).observe(1.1)
            for state in State:
                metrics.executions.labels(provider, action, state).inc()
        for outcome in Outcome:
            metrics.attempts.labels(provider, outcome).inc()
    for budget in ("calls", "executions"):
        for holder in ("workspace", "caller"):
            metrics.rate_limited.labels(budget, holder).inc()
            metrics.rate_limit_shadowed.labels(budget, holder).inc()
    for reason in ("invalid", "malformed", "throttled", *Defect):
        metrics.auth_failures.labels(reason).inc()
    for to in ("open", "closed"):
        metrics.breaker_transitions.labels(to).inc()
    for reason in ("GONE", "FAILING"):
        metrics.connections_disabled.labels(reason).inc()
    for outcome in ("ok", "failed"):
        metrics.oidc_readings.labels(outcome).inc()
    for outcome in ("written", "aggregated", "failed"):
        metrics.audit_events.labels(outcome).inc()
    for queue in ("execute", "attempt", "audit"):
        metrics.group_commit_size.labels(queue).observe(17)
    metrics.executions_in_flight.set(3)
    metrics.key_hashes.inc()


async def test_metrics_have_every_family_and_a_bounded_number_of_series() -> None:
    metrics = Metrics()
    use_everything(metrics)
    async with serving(metrics) as client, client.get("/metrics") as response:
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        families = {family.name: family for family in text_string_to_metric_families(await response.text())}
    own = {name: family for name, family in families.items() if name.startswith("relay_")}
    assert {
        name: {label for sample in family.samples for label in sample.labels} for name, family in own.items()
    } == FAMILIES
    assert sum(len(family.samples) for family in families.values()) <= 2000
    assert {"process_resident_memory_bytes", "python_gc_collections", "python_info"} <= families.keys()
    totals = {s.labels["code"]: s.value for s in own["relay_rpc"].samples if s.labels["method"] == "Execute"}
    assert totals == {code.name: 1 for code in grpc.StatusCode}


async def test_the_objectives_are_edges_of_the_histograms() -> None:
    metrics = Metrics()
    use_everything(metrics)
    async with serving(metrics) as client:
        _, text = await read(client, "/metrics")
    for family in text_string_to_metric_families(text):
        counts = {s.labels["le"]: s.value for s in family.samples if s.name.endswith("_bucket")}
        if family.name == "relay_rpc_duration_seconds":
            assert counts.keys() >= {"0.05", "1.2"}
        if family.name == "relay_action_duration_seconds":
            assert (counts["1.0"], counts["1.2"], counts["30.0"]) == (0, 1, 1)


async def test_a_taken_port_is_the_callers_error() -> None:
    first = Sidecar("127.0.0.1", 0, metrics=None, ready=healthy)
    port = await first.start()
    second = Sidecar("127.0.0.1", port, metrics=None, ready=healthy)
    with pytest.raises(OSError, match="address already in use"):
        await second.start()
    await second.stop()
    await first.stop()
    assert await second.start() == port
    await second.stop()


async def test_stopping_answers_a_hanging_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar_module, "READY_SECONDS", 60)
    started = asyncio.Event()

    async def ready() -> dict[str, bool]:
        started.set()
        return await asyncio.Future()

    sidecar = Sidecar("127.0.0.1", 0, metrics=None, ready=ready)
    port = await sidecar.start()
    async with asyncio.timeout(10), aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
        probe = asyncio.create_task(read(client, "/readyz"))
        await started.wait()
        await sidecar.stop()
        assert (await probe)[0] == 503


async def test_stopping_before_starting_is_harmless() -> None:
    await Sidecar("127.0.0.1", 0, metrics=None, ready=healthy).stop()
