import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from ipaddress import ip_address, ip_network
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer

from relay_grpc.actions import egress as egress_module
from relay_grpc.actions.destinations import EgressPolicy, EgressRefused, InvalidUrlError, check_url, denied
from relay_grpc.actions.egress import Egress
from tests.actions.spellings import ADDRESSES, spellings

PRODUCTION = EgressPolicy(allow_loopback=False, https_only=True)
ANY_PORT = EgressPolicy(allow_loopback=False, https_only=False)
DEVELOPMENT = EgressPolicy(allow_loopback=True, https_only=False)

# fmt: off
DENIED = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.127.255.255", "127.0.0.1",
    "127.255.255.254", "168.63.129.16", "169.254.169.254", "169.254.0.1", "172.16.0.1", "172.31.255.255", "192.0.0.8",
    "192.0.0.192", "192.0.2.1", "192.88.99.3", "192.168.1.1", "198.18.0.1", "198.19.255.255", "198.51.100.1",
    "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "::", "::1", "::127.0.0.1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "64:ff9b::808:808",
    "64:ff9b:1::1", "100::1", "2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:2::1", "2001:10::1",
    "2001:db8::1", "2002:a9fe:a9fe::", "2002:808:808::", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1",
    "fe80::1%1", "febf::1", "fec0::1", "ff02::1", "ff0e::1",
]
ALLOWED = [
    "1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255",
    "128.0.0.0", "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0", "192.0.1.0", "192.167.255.255",
    "192.169.0.0", "198.17.255.255", "198.20.0.0", "223.255.255.255", "::ffff:8.8.8.8", "2001:200::1",
    "2001:4860:4860::8888", "2003::1", "2606:4700:4700::1111", "3ffe:ffff::1",
]
# What getaddrinfo, a browser or a careless parser reads as an address of this machine or its networks.
SPELLINGS = [
    "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1", "0x7f.0.0.1", "0X7F.0X0.0X0.0X1", "0177.0.0.1",
    "017700000001", "00000177.0.0.1", "127.0.0.01", "127.000.000.001", "0", "0x0", "00", "0x", "127.0.0.1.",
    "127.0.0.0x1", "127.0.0.256", "256.256.256.256", "1.2.3.4.5", "0xa9fea9fe", "2852039166", "0251.0376.0251.0376",
    "169.254.43518", "localhost%00", "127\u30020\u30020\u30021", "\u2460\u2461\u2466.\u24ea.\u24ea.\u2460",
    "\uff11\uff12\uff17.0.0.1", "\u2469.0.0.1", "%31%32%37.0.0.1", "127.0.0.1%20", "[::1%25lo]", "[127.0.0.1]",
    "[::ffff:7f.0.0.1]", "[::1", "::1", "[0x0::1]", "[v1.127.0.0.1]", "[::12345]", "[:::1]", "127.0.0.1:80:80",
]
# fmt: on


class Accepts:
    """A listener on loopback that counts who comes."""

    def __init__(self) -> None:
        self.count = 0

    async def __aenter__(self) -> "Accepts":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0.02)  # an accept that was on its way still counts
        self._server.close()

    async def _accept(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.count += 1
        writer.close()


class Names:
    """A getaddrinfo whose answers are given: one list of addresses per question, the last one for ever."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)

    def __call__(self, host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in addresses
        ]


@pytest.fixture(scope="module")
async def production() -> AsyncIterator[Egress]:
    egress = Egress(PRODUCTION)
    yield egress
    await egress.close()


async def get(egress: Egress, url: str) -> int:
    async with egress.request("GET", url, body=b"", headers={}) as response:
        return response.status


@pytest.mark.parametrize("address", [address for address in DENIED if "%" not in address])  # no URL names a zone
async def test_denied_addresses_are_refused_as_literals(address: str, production: Egress) -> None:
    with pytest.raises(EgressRefused):
        await production.resolve(f"https://[{address}]/" if ":" in address else f"https://{address}/")


async def test_denied_addresses_are_refused_as_answers() -> None:
    egress = Egress(PRODUCTION, Names(*([address] for address in DENIED)))
    for address in DENIED:
        assert denied(ip_address(address))
        assert not ANY_PORT.permits(address, 443)
        with pytest.raises(EgressRefused):
            await egress.resolve("https://receiver.example/")
    await egress.close()


@pytest.mark.parametrize("address", ALLOWED)
async def test_public_addresses_are_allowed(address: str, production: Egress) -> None:
    assert not denied(ip_address(address))
    assert await production.resolve(f"https://[{address}]/" if ":" in address else f"https://{address}/")


async def test_one_denied_answer_refuses_them_all() -> None:
    answers = [["8.8.8.8", "10.0.0.1"], ["::1", "8.8.8.8"], ["8.8.8.8", "1.1.1.1", "not an address"]]
    egress = Egress(PRODUCTION, Names(*answers, ["8.8.8.8", "1.1.1.1"]))
    for _ in answers:
        with pytest.raises(EgressRefused):
            await egress.resolve("https://receiver.example/")
    assert await egress.resolve("https://receiver.example/") == ("8.8.8.8", "1.1.1.1")
    await egress.close()


@pytest.mark.parametrize("host", SPELLINGS)
@pytest.mark.parametrize("policy", [PRODUCTION, DEVELOPMENT])
def test_other_spellings_of_addresses_are_refused(host: str, policy: EgressPolicy) -> None:
    with pytest.raises(InvalidUrlError):
        check_url(f"https://{host}/", policy)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "receiver.example",
        "//receiver.example/",
        "ftp://receiver.example/",
        "file:///etc/passwd",
        "https:receiver.example",
        "https:///path",
        "https://",
        "https://:443/",
        "https://user@receiver.example/",
        "https://user:password@receiver.example/",
        "https://@receiver.example/",
        "https://receiver.example@10.0.0.1/",
        "https://receiver.example/#fragment",
        "https://receiver.example#@10.0.0.1/",
        "https://receiver.example\\@10.0.0.1/",
        "https://receiver.example/\\10.0.0.1",
        "https:\\\\receiver.example/",
        "https://receiver.example/ HTTP/1.1\r\nx-injected: 1",
        "https://receiver.example/\r\n",
        "https://receiver.example\r\n.example/",
        "https://receiver.example/a b",
        "https://receiver.example/\t",
        "https://receiver.example/\x00",
        " https://receiver.example/",
        "https://receiver.example /",
        "https://receiver..example/",
        "https://.example/",
        "https://receiver.example./",
        "https://" + "a" * 64 + ".example/",
        "https://receiver.example:0/",
        "https://receiver.example:65536/",
        "https://receiver.example:+443/",
        "https://receiver.example:4_43/",
        "https://receiver.example:/",
        "https://rec%65iver.example/",
        "https://empfänger.example/",
        "https://receiver.example/ä",
        "https://receiver。example/",
        "https://receiver.example\uff0f.evil.example/",
    ],
)
def test_what_is_no_destination_is_refused_in_words(url: str) -> None:
    for policy in (PRODUCTION, DEVELOPMENT):
        with pytest.raises(InvalidUrlError, match=r"^(write it as|the port is)"):
            check_url(url, policy)


@pytest.mark.parametrize(
    ("url", "host", "port", "target"),
    [
        ("https://receiver.example", "receiver.example", 443, "/"),
        ("https://receiver.example?a=b", "receiver.example", 443, "/?a=b"),
        ("https://receiver.example/a%2Fb/../c?d=%7E+e&f", "receiver.example", 443, "/a%2Fb/../c?d=%7E+e&f"),
        ("https://xn--empfnger-3za.example:8443/@user", "xn--empfnger-3za.example", 8443, "/@user"),
        ("HTTPS://Under_score.Example/", "Under_score.Example", 443, "/"),
        ("https://1.1.1.1/", "1.1.1.1", 443, "/"),
        ("https://1.1.1.1.example/", "1.1.1.1.example", 443, "/"),
        ("https://[2606:4700:4700::1111]:443/", "2606:4700:4700::1111", 443, "/"),
    ],
)
def test_destinations_are_sent_to_as_they_are_written(url: str, host: str, port: int, target: str) -> None:
    parsed = check_url(url, PRODUCTION)
    assert (parsed.raw_host, parsed.port, parsed.raw_path_qs) == (host, port, target)


def test_production_takes_https_on_its_two_ports_alone() -> None:
    with pytest.raises(InvalidUrlError, match="only https"):
        check_url("http://receiver.example/", PRODUCTION)
    assert check_url("http://receiver.example/", DEVELOPMENT).port == 80
    assert [port for port in (22, 80, 443, 5432, 8080, 8443) if PRODUCTION.permits("8.8.8.8", port)] == [443, 8443]
    assert all(DEVELOPMENT.permits("8.8.8.8", port) for port in (22, 80, 443, 8080))


def test_development_opens_loopback_and_nothing_else() -> None:
    for address in DENIED:
        loopback = ip_address(address).is_loopback or address == "::ffff:127.0.0.1"
        assert DEVELOPMENT.permits(address, 8080) is loopback


def test_the_allow_list_opens_its_networks_on_any_port() -> None:
    policy = EgressPolicy(False, True, (ip_network("10.1.0.0/16"), ip_network("fd00::/8")))
    for address in ("10.1.2.3", "::ffff:10.1.2.3", "fd00:ec2::254"):
        assert policy.permits(address, 8080)
    for address in ("10.2.0.1", "fc00::1", "127.0.0.1", "64:ff9b::a01:203"):
        assert not policy.permits(address, 443)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::ffff:127.0.0.1]", "0.0.0.0", "localhost"])
async def test_the_guard_at_the_socket_refuses_what_nothing_else_looked_at(host: str) -> None:
    egress = Egress(ANY_PORT)
    async with Accepts() as sentinel:
        for _ in range(5):
            with pytest.raises(EgressRefused):  # past check_url, and past the resolver where the host is a literal
                await egress.session.get(f"http://{host}:{sentinel.port}/")
    assert sentinel.count == 0
    await egress.close()


async def test_the_guard_at_the_socket_refuses_an_answer_that_changes_after_it_was_judged() -> None:
    class Fickle(str):
        """An address that reads as a public one the first time, and as loopback from then on."""

        reads = 0

        def __str__(self) -> str:
            self.reads += 1
            return "8.8.8.8" if self.reads == 1 else "127.0.0.1"

    address = Fickle("127.0.0.1")
    egress = Egress(ANY_PORT, Names([address]))
    async with Accepts() as sentinel:
        with pytest.raises(EgressRefused):
            await get(egress, f"http://receiver.example:{sentinel.port}/")
    assert (address.reads, sentinel.count) == (2, 0)
    await egress.close()


async def test_a_name_that_is_bound_to_loopback_after_it_was_shown_is_not_dialled() -> None:
    egress = Egress(ANY_PORT, Names(["8.8.8.8"], ["127.0.0.1"]))
    async with Accepts() as sentinel:
        url = f"http://receiver.example:{sentinel.port}/"
        assert await egress.resolve(url) == ("8.8.8.8",)
        for _ in range(20):
            with pytest.raises(EgressRefused):
                await get(egress, url)
    assert sentinel.count == 0
    await egress.close()


async def test_the_sentinel_is_reached_once_per_request_where_loopback_is_allowed() -> None:
    egress = Egress(DEVELOPMENT, Names(["127.0.0.1"]))
    async with Accepts() as sentinel:
        for method in ("POST", "PUT"):  # aiohttp by itself sends PUT again when the connection breaks
            with pytest.raises(aiohttp.ClientConnectionError):
                async with egress.request(method, f"http://receiver.example:{sentinel.port}/", body=b"", headers={}):
                    pass
    assert sentinel.count == 2
    await egress.close()


async def test_the_next_address_is_tried_and_the_name_is_kept_for_the_host_header() -> None:
    seen: list[web.BaseRequest] = []

    async def receive(request: web.BaseRequest) -> web.Response:
        seen.append(request)
        return web.Response(headers={"set-cookie": "a=b"})

    async with RawTestServer(receive, host="127.0.0.1") as server:
        egress = Egress(DEVELOPMENT, Names(["127.0.0.99", "127.0.0.1"]))
        host = f"receiver.example:{server.port}"
        for _ in range(2):
            assert await get(egress, f"http://{host}/path") == 200
        await egress.close()
    assert [request.headers["host"] for request in seen] == [host, host]
    assert seen[0].headers["user-agent"].startswith("Relay/")
    assert seen[0].headers["accept-encoding"] == "identity"
    assert "cookie" not in seen[1].headers
    assert seen[0].protocol is seen[1].protocol  # one kept connection


async def test_proxies_of_the_environment_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    async def receive(_: web.BaseRequest) -> web.Response:
        return web.Response()

    async with RawTestServer(receive, host="127.0.0.1") as server, Accepts() as sentinel:
        for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(variable, f"http://127.0.0.1:{sentinel.port}")
        egress = Egress(DEVELOPMENT)
        assert await get(egress, f"http://127.0.0.1:{server.port}/") == 200
        await egress.close()
    assert sentinel.count == 0


async def test_name_servers_that_hang_are_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress_module, "RESOLVE_SECONDS", 0.1)
    thaw = threading.Event()

    def hang(*_: Any, **__: Any) -> list[Any]:
        thaw.wait(10)
        return []

    egress = Egress(PRODUCTION, hang)
    lookups = [egress.resolve(f"https://receiver-{n}.example/") for n in range(40)]
    assert all(isinstance(end, OSError) for end in await asyncio.gather(*lookups, return_exceptions=True))
    # The threads that asyncio shares with the rest of the process are free.
    assert await asyncio.wait_for(asyncio.to_thread(lambda: 1), 2) == 1
    thaw.set()
    await egress.close()


async def test_name_servers_that_hang_hold_up_no_other_name() -> None:
    thaw = threading.Event()

    def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        if host.startswith("hanging"):
            thaw.wait(10)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    async with Accepts() as sentinel:
        egress = Egress(DEVELOPMENT, getaddrinfo)
        hanging = [asyncio.create_task(get(egress, f"http://hanging-{n}.example:{sentinel.port}/")) for n in range(128)]
        hanging += [asyncio.create_task(egress.resolve(f"http://hanging-{n}.example/")) for n in range(40)]
        await asyncio.sleep(0.1)
        with pytest.raises(aiohttp.ClientConnectionError):  # it was dialled: the sentinel closes at once
            await asyncio.wait_for(get(egress, f"http://receiver.example:{sentinel.port}/"), 2)
        assert (sentinel.count, any(one.done() for one in hanging)) == (1, False)
        for one in hanging:
            one.cancel()
        await asyncio.wait(hanging)
        thaw.set()
        await egress.close()


async def test_no_spelling_of_a_denied_address_can_be_a_destination(production: Egress) -> None:
    tried = [host for address in ADDRESSES for host in spellings(address)]
    assert len(tried) >= 40 * 30
    for host in tried:
        for url in (f"https://{host}/", f"https://{host}:8443/", f"https://{host}?a=b"):
            with pytest.raises((EgressRefused, InvalidUrlError)):
                await production.resolve(url)


async def test_an_answer_without_addresses_is_none() -> None:
    egress = Egress(PRODUCTION, Names([]))
    with pytest.raises(OSError, match="no address"):
        await egress.resolve("https://receiver.example/")
    await egress.close()


async def test_names_that_do_not_exist_are_no_refusal(production: Egress) -> None:
    with pytest.raises(OSError, match=r".+"):
        await production.resolve("https://receiver.invalid/")
