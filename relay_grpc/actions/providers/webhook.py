"""Webhooks to any receiver: one signed HTTP request per attempt (Standard Webhooks 1.0)."""

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
import rfc8785

from relay_grpc import errors
from relay_grpc.actions import signing
from relay_grpc.actions.egress import Egress, EgressRefused, InvalidUrlError
from relay_grpc.actions.execution import AttemptResult, Job, Outcome, Plan

ANSWER_BYTES_MAX = 16 * 1024
EXCERPT_BYTES_MAX = 4 * 1024

# The parameters as canonical JSON. The canonical JSON of a member is a part of that of its object (RFC 8785), so the
# body is cut out: building it again takes half as long as the whole POST, and reading numbers back could change them.
_PARAMETERS = re.compile(r'\{(?:"method":"([A-Z]+)",)?"payload":(\{.*\})\}', re.DOTALL)

# What aiohttp raises, most specific first, in words that tell nothing about this server's network.
_FAILURES: tuple[tuple[type[aiohttp.ClientError], str], ...] = (
    (aiohttp.ClientConnectorDNSError, "the host name does not resolve"),
    (aiohttp.ClientConnectorCertificateError, "the receiver's TLS certificate is not trusted"),
    (aiohttp.ClientSSLError, "the TLS handshake failed"),
    (aiohttp.ClientConnectorError, "the receiver can't be reached: connection refused or no route"),
    (aiohttp.ConnectionTimeoutError, "no connection to the receiver in time"),
    (aiohttp.ClientResponseError, "what came back is not HTTP, or has too many headers"),
    (aiohttp.ClientError, "the receiver broke the connection"),
)


class WebhookProvider:
    """Delivers to connections of the provider "independent": {"url": str, "body_signature": bool}.

    timeout: the total seconds of one attempt, from resolving the name to the last byte read.
    clock: Unix seconds, for webhook-timestamp.
    """

    name = "independent"

    def __init__(self, egress: Egress, timeout: float = 15.0, clock: Callable[[], float] = time.time) -> None:
        self.timeout = timeout
        self._egress = egress
        self._clock = clock

    async def check(self, configuration: Mapping[str, Any]) -> None:
        """Raises errors.InvalidRequest for a malformed URL, or a destination that is refused (EGRESS_REFUSED)."""
        await self._addresses(configuration)

    async def plan(self, action: str, parameters: Mapping[str, Any], configuration: Mapping[str, Any]) -> Plan:
        """Plans the request, resolving the host now. Raises what check raises; an unknown name is only a warning."""
        addresses = await self._addresses(configuration)
        method, body = _request(rfc8785.dumps(dict(parameters)).decode())
        url = configuration["url"].partition("?")[0]
        older = configuration["body_signature"]
        return Plan(
            method=method,
            url=url,
            addresses=addresses,
            body_bytes=len(body),
            signatures=("v1", "body") if older else ("v1",),
            summary=f"{method} {len(body)} bytes of JSON to {url}, signed (Standard Webhooks v1"
            + (", and X-Signature over the body)" if older else ")"),
            warnings=tuple(_warnings(url, addresses)),
        )

    async def execute(self, job: Job) -> AttemptResult:
        """Sends one request and reads the answer: all of it, or its first 16 KiB. 2xx is success, 3xx is not."""
        method, body = _request(job.parameters)
        status, answer = 0, bytearray()

        def ended(outcome: Outcome, error: str = "") -> AttemptResult:
            return AttemptResult(outcome, status, _excerpt(answer), error)

        try:
            async with (
                asyncio.timeout(self.timeout),
                self._egress.request(
                    method, job.configuration["url"], body=body, headers=self._headers(job, body)
                ) as response,
            ):
                status = response.status
                while chunk := await response.content.read(ANSWER_BYTES_MAX - len(answer)):
                    answer += chunk
        except (EgressRefused, InvalidUrlError) as refusal:
            return ended(Outcome.EGRESS_REFUSED, str(refusal))
        except aiohttp.ClientError as failure:
            return ended(Outcome.UNREACHABLE, next(text for kind, text in _FAILURES if isinstance(failure, kind)))
        except TimeoutError:
            return ended(Outcome.TIMEOUT, f"no complete answer within {self.timeout:g} s")
        if 200 <= status < 300:
            return ended(Outcome.SUCCESS)
        hint = ": redirects are not followed" if 300 <= status < 400 else ""
        return ended(Outcome.REFUSED, f"the receiver answered {status}{hint}")

    async def _addresses(self, configuration: Mapping[str, Any]) -> tuple[str, ...]:
        try:
            return await self._egress.resolve(configuration["url"])
        except EgressRefused as refusal:
            raise errors.InvalidRequest([("webhook.url", str(refusal))], reason="EGRESS_REFUSED") from refusal
        except InvalidUrlError as problem:
            raise errors.InvalidRequest([("webhook.url", str(problem))]) from problem
        except OSError:
            return ()

    def _headers(self, job: Job, body: bytes) -> dict[str, str]:
        message_id, timestamp = str(job.execution_id), int(self._clock())
        headers = {
            "content-type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signing.signature_header(job.secrets, message_id, timestamp, body),
        }
        if job.configuration["body_signature"]:
            headers["x-signature"] = signing.body_signature(job.secrets[0], body)
        if job.traceparent:
            headers["traceparent"] = job.traceparent
        return headers


def _request(parameters: str) -> tuple[str, bytes]:
    """The method and the body that these parameters, as canonical JSON, stand for: as previewed, as sent."""
    match = _PARAMETERS.fullmatch(parameters)
    if match is None:
        raise ValueError("the parameters are not those of a webhook, or not canonical JSON")
    method, payload = match.groups()
    return method or "POST", payload.encode()


def _excerpt(answer: bytes | bytearray) -> str:
    """At most 4 KiB of UTF-8 that Postgres can hold (it has no NUL)."""
    text = answer.decode("utf-8", "replace").replace("\0", "")
    return text.encode()[:EXCERPT_BYTES_MAX].decode("utf-8", "ignore")


def _warnings(url: str, addresses: tuple[str, ...]) -> list[str]:
    warnings = []
    if not addresses:
        warnings.append("the host name does not resolve now")
    if url.lower().startswith("http:"):
        warnings.append("http:// sends the payload unencrypted")
    return warnings
