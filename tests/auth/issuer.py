"""Issuers of users' tokens: a real OpenID Connect provider, and one whose every word a test can choose."""

import asyncio
import base64
import hashlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
from aiohttp import web
from joserfc import jws
from joserfc.jwk import Key, generate_key

AUDIENCE = "relay"
CALLBACK = "http://127.0.0.1/callback"


class Provider:
    """Canaille, an OpenID Connect provider, on loopback. Users sign in there as from any browser."""

    def __init__(self, server: Any, port: int) -> None:
        self._server = server
        self.url = f"http://127.0.0.1:{port}"
        with server.app.app_context():
            client = server.models.Client(
                client_id=AUDIENCE,
                client_id_issued_at=datetime.now(UTC),
                client_name="Relay",
                client_uri="http://127.0.0.1/",
                redirect_uris=[CALLBACK],
                grant_types=["authorization_code"],
                response_types=["code"],
                scope=["openid", "profile", "email"],
                token_endpoint_auth_method="none",
                application_type="native",
                id_token_signed_response_alg="RS256",
            )
            server.backend.save(client)
            client.audience = [client]
            server.backend.save(client)
            self._client = client

    def add_user(self, name: str) -> None:
        with self._server.app.app_context():
            user = self._server.models.User(
                user_name=name, formatted_name=name.title(), family_name=name, emails=[f"{name}@example.com"]
            )
            self._server.backend.save(user)

    def sign_with(self, algorithm: str) -> None:
        with self._server.app.app_context():
            self._client.id_token_signed_response_alg = algorithm
            self._server.backend.save(self._client)

    def rotate(self) -> None:
        """Signs with other keys from now on, and publishes those alone."""
        self._server.app.config["CANAILLE_OIDC"]["ACTIVE_JWKS"] = _provider_keys()

    async def sign_in(self, name: str) -> dict[str, str]:
        """What the token endpoint answers at the end of the authorization code flow with PKCE."""
        with self._server.app.app_context():
            self._server.login(self._server.backend.get(self._server.models.User, user_name=name))
        verifier = secrets.token_urlsafe(48)
        challenge = encoded(hashlib.sha256(verifier.encode()).digest())
        asked = {
            "response_type": "code",
            "client_id": AUDIENCE,
            "redirect_uri": CALLBACK,
            "scope": "openid profile email",
            "state": secrets.token_urlsafe(),
            "nonce": secrets.token_urlsafe(),
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        async with aiohttp.ClientSession(raise_for_status=True) as browser:
            async with browser.get(f"{self.url}/.well-known/openid-configuration") as answer:
                endpoints = await answer.json()
            authorize = endpoints["authorization_endpoint"]
            async with browser.get(authorize, params=asked, allow_redirects=False) as answer:
                told = parse_qs(urlsplit(answer.headers["location"]).query)
            assert told["state"] == [asked["state"]]
            exchange = {
                "grant_type": "authorization_code",
                "code": told["code"][0],
                "redirect_uri": CALLBACK,
                "client_id": AUDIENCE,
                "code_verifier": verifier,
            }
            async with browser.post(endpoints["token_endpoint"], data=exchange) as answer:
                tokens: dict[str, str] = await answer.json()
                return tokens

    async def token(self, name: str) -> str:
        """The user's ID token."""
        return (await self.sign_in(name))["id_token"]


def _provider_keys() -> list[dict[str, Any]]:
    kinds = (("RSA", 2048), ("EC", "P-256"), ("OKP", "Ed25519"))
    return [dict(generate_key(*kind, {"kid": secrets.token_hex(4)}).as_dict(private=True)) for kind in kinds]


@contextmanager
def providing() -> Iterator[Provider]:
    """Runs a provider with the users alice and bob."""
    os.environ["AUTHLIB_INSECURE_TRANSPORT"] = "1"
    from canaille import create_app
    from canaille.backends import Backend
    from pytest_iam import Server

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    quiet = {"version": 1, "disable_existing_loggers": False}
    app = create_app(
        config={
            "TESTING": True,
            "ENV_FILE": None,
            "SECRET_KEY": secrets.token_hex(),
            "PREFERRED_URL_SCHEME": "http",
            "SERVER_NAME": f"127.0.0.1:{port}",
            "CANAILLE": {
                "DATABASE": "memory",
                "JAVASCRIPT": False,
                "LOGGING": quiet,
                "ACL": {"DEFAULT": {"PERMISSIONS": ["use_oidc"]}},
            },
            "CANAILLE_OIDC": {"ACTIVE_JWKS": _provider_keys()},
        },
        env_file=".no-such-file",
    )
    server = Server(app, port, Backend.instance)
    thread = threading.Thread(target=server.httpd.serve_forever)
    thread.start()
    try:
        provider = Provider(server, port)
        for name in ("alice", "bob"):
            provider.add_user(name)
        yield provider
    finally:
        server.httpd.shutdown()
        server.httpd.server_close()
        thread.join()


def signed(header: Any, payload: Any, key: Key, algorithm: str = "") -> str:
    """A JWS of whatever header and payload, those that are text as they are, really signed with the key."""
    content = f"{segment(header)}.{segment(payload)}"
    return f"{content}.{encoded(jws.JWSRegistry.algorithms[algorithm or header['alg']].sign(content.encode(), key))}"


def segment(part: Any) -> str:
    return encoded((part if isinstance(part, str) else json.dumps(part)).encode())


def encoded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


_SPARE_KEYS: list[Key] = []  # of issuers that are gone: an RSA key takes long to make
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Issuer:
    """An issuer that publishes and signs whatever it is told.

    published: its JWK set's keys. answers: by path, what answers in place of the usual document. asked: the paths of
    the requests that came.
    """

    url: str
    keys: dict[str, Key] = field(default_factory=dict)
    published: list[Any] = field(default_factory=list)
    answers: dict[str, Answer] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def add_key(self, kind: str, size: Any, key_id: str, **published_as: Any) -> Key:
        """A new key that is published, with these members of its JWK besides the usual ones."""
        return self.publish(generate_key(kind, size, {"kid": key_id}), **published_as)  # type: ignore[call-overload]

    def publish(self, key: Key, **published_as: Any) -> Key:
        self.keys[str(key.kid)] = key
        self.published.append(key.as_dict(private=False) | published_as)
        return key

    def claims(self, **changes: Any) -> dict[str, Any]:
        """What a good token says. A claim that is changed to None is left out."""
        now = int(time.time())
        good = {"iss": self.url, "aud": AUDIENCE, "sub": "alice", "iat": now, "nbf": now, "exp": now + 600}
        return {name: value for name, value in (good | changes).items() if value is not None}

    def token(self, claims: Any = None, key: Key | None = None, signed_as: str = "", **header: Any) -> str:
        """A signed token, good but for what is told here.

        claims: text is signed as it is. key: by default the one that the header names. signed_as: the algorithm that
        really signs. header: members; one that is None is left out.
        """
        header = {"alg": "RS256", "typ": "JWT", "kid": "rsa"} | header
        header = {name: value for name, value in header.items() if value is not None}
        return signed(header, self.claims() if claims is None else claims, key or self.keys[header["kid"]], signed_as)

    def readings(self) -> int:
        """How often its keys were read."""
        return self.asked.count("/keys")


@asynccontextmanager
async def issuing(url_path: str = "", ssl: Any = None) -> AsyncIterator[Issuer]:
    """Runs an issuer with an RSA key "rsa"."""
    issuer = Issuer("")

    async def answer(request: web.Request) -> web.StreamResponse:
        path = request.path.removeprefix(url_path)
        issuer.asked.append(path)
        if path in issuer.answers:
            return await issuer.answers[path](request)
        if path == "/.well-known/openid-configuration":
            base = f"{request.scheme}://{request.host}{url_path}"
            return web.json_response({"issuer": issuer.url, "jwks_uri": f"{base}/keys"})
        if path == "/keys":
            return web.json_response({"keys": issuer.published})
        raise web.HTTPNotFound

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=ssl).start()
    scheme = "https" if ssl else "http"
    host = "localhost" if ssl else "127.0.0.1"
    issuer.url = f"{scheme}://{host}:{runner.addresses[0][1]}{url_path}"
    key = issuer.publish(_SPARE_KEYS.pop() if _SPARE_KEYS else generate_key("RSA", 2048, {"kid": "rsa"}))
    try:
        yield issuer
    finally:
        _SPARE_KEYS.append(key)
        await runner.cleanup()


async def never(request: web.Request) -> web.StreamResponse:
    """An answer that does not come."""
    await asyncio.sleep(60)
    return web.Response()
