"""Webhooks to any receiver: one signed HTTP request per attempt (Standard Webhooks 1.0)."""

import asyncio
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import rfc8785
from yarl import URL

from relay_grpc import errors, failpoints
from relay_grpc.actions import signing
from relay_grpc.actions.destinations import EgressRefused, InvalidUrlError
from relay_grpc.actions.egress import Body, Egress
from relay_grpc.actions.execution import AttemptResult, Job, Outcome, Plan, timeout
from relay_grpc.actions.signing import Scheme

ANSWER_BYTES_MAX = 16 * 1024
EXCERPT_BYTES_MAX = 4 * 1024
SECRET_LENGTH_MIN = 8  # of a word in a header of the connection: shorter ones are not hidden where they come back
RETRY_AFTER_MAX = 30 * 86400.0  # seconds; longer than any wait of a schedule

# The parameters as canonical JSON. The canonical JSON of a member is a part of that of its object (RFC 8785), so the
# body is cut out: building it again takes half as long as the whole POST, and reading numbers back could change them.
_PARAMETERS = re.compile(r'\{(?:"method":"([A-Z]+)",)?"payload":(\{.*\})\}', re.DOTALL)

_DELTA_SECONDS = re.compile(r"[0-9]+", re.ASCII)

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
    """Delivers to connections of the provider "independent", whose configuration connections.configuration describes.

    timeout: the total seconds of one attempt, from resolving the name to the last byte read, where a connection does
    not say less.
    clock: Unix seconds, for webhook-timestamp and for a Retry-After that is a date.
    """

    name = "independent"

    def __init__(self, egress: Egress, timeout: float = 15.0, clock: Callable[[], float] = time.time) -> None:
        self.timeout = timeout
        self._egress = egress
        self._clock = clock

    async def check(self, configuration: Mapping[str, Any]) -> None:
        """Raises errors.InvalidRequest for a malformed URL, or a destination that is refused (EGRESS_REFUSED)."""
        await self._addresses(configuration)

    async def plan(
        self, action: str, parameters: Mapping[str, Any], configuration: Mapping[str, Any], schemes: Collection[Scheme]
    ) -> Plan:
        """Plans the request, resolving the host now. Raises what check raises; an unknown name is only a warning."""
        addresses = await self._addresses(configuration)
        method, body = _request(rfc8785.dumps(dict(parameters)).decode())
        url = configuration["url"].partition("?")[0]
        versions = [signing.VERSIONS[scheme] for scheme in dict.fromkeys(schemes)]
        older = configuration["body_signature"] and Scheme.HMAC in schemes
        names = configuration.get("headers", ())
        return Plan(
            method=method,
            url=url,
            host=URL(url, encoded=True).raw_host or "",
            addresses=addresses,
            body_bytes=len(body),
            signatures=(*versions, "body") if older else (*versions,),
            summary=f"{method} {len(body)} bytes of JSON to {url}"
            + (f" with the headers {', '.join(names)}" if names else "")
            + f", signed (Standard Webhooks {' and '.join(versions)}"
            + (", and X-Signature over the body)" if older else ")"),
            warnings=tuple(_warnings(url, addresses)),
        )

    async def execute(self, job: Job) -> AttemptResult:
        """Sends one request and reads the answer: all of it, or its first 16 KiB. 2xx is success, 3xx is not."""
        method, content = _request(job.parameters)
        body, seconds = Body(content), timeout(job.configuration, self.timeout)
        status, answer, retry_after = 0, bytearray(), None

        def ended(outcome: Outcome, error: str = "") -> AttemptResult:
            return AttemptResult(
                outcome,
                status,
                _excerpt(answer, job.headers.values()),
                error,
                sent=body.sent or status != 0,  # whoever answers has seen something
                retry_after=retry_after,
            )

        try:
            async with (
                asyncio.timeout(seconds),
                self._egress.request(
                    method, job.configuration["url"], body=body, headers=self._headers(job, content)
                ) as response,
            ):
                failpoints.reach("attempt.answering")
                status = response.status
                retry_after = _retry_after(response.headers.get("retry-after", ""), self._clock)
                while chunk := await response.content.read(ANSWER_BYTES_MAX - len(answer)):
                    answer += chunk
                if not response.content.at_eof():
                    response.close()  # the rest of it is not waited for
        except (EgressRefused, InvalidUrlError) as refusal:
            return ended(Outcome.EGRESS_REFUSED, str(refusal))
        except aiohttp.ClientError as failure:
            return ended(Outcome.UNREACHABLE, next(text for kind, text in _FAILURES if isinstance(failure, kind)))
        except TimeoutError:
            return ended(Outcome.TIMEOUT, f"no complete answer within {seconds:g} s")
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
        """Those of the connection, and over them ours."""
        message_id, timestamp = str(job.execution_id), int(self._clock())
        headers = {name.lower(): value for name, value in job.headers.items()}
        headers |= {
            "content-type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signing.signature_header(job.keys, message_id, timestamp, body),
        }
        newest = next((key for key in job.keys if key.scheme is Scheme.HMAC), None)
        if job.configuration["body_signature"] and newest:
            headers["x-signature"] = signing.body_signature(newest.raw, body)
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


def _retry_after(value: str, clock: Callable[[], float]) -> float | None:
    """The seconds that a Retry-After asks for (RFC 9110, 10.2.3). None: it asks for nothing, or for the past."""
    if _DELTA_SECONDS.fullmatch(value):
        return min(float(value), RETRY_AFTER_MAX)
    try:
        date = parsedate_to_datetime(value)
        wait = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - clock()
    except (ValueError, OverflowError):
        return None
    return min(wait, RETRY_AFTER_MAX) if wait >= 0 else None


def _excerpt(answer: bytes | bytearray, secrets: Iterable[str]) -> str:
    """At most 4 KiB of UTF-8 that Postgres can hold (it has no NUL), without the secrets that a receiver sends back."""
    text = answer.decode("utf-8", "replace").replace("\0", "")
    for word in (word for secret in secrets for word in secret.split() if len(word) >= SECRET_LENGTH_MIN):
        text = text.replace(word, "[hidden]")
    return text.encode()[:EXCERPT_BYTES_MAX].decode("utf-8", "ignore")


def _warnings(url: str, addresses: tuple[str, ...]) -> list[str]:
    warnings = []
    if not addresses:
        warnings.append("the host name does not resolve now")
    if url.lower().startswith("http:"):
        warnings.append("http:// sends the payload unencrypted")
    return warnings
