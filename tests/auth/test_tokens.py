"""Tokens that must be refused, most of them really signed by their issuer, and those that must not."""

import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from joserfc.jwk import generate_key

from relay_grpc import errors
from relay_grpc.actions.destinations import EgressPolicy
from relay_grpc.actions.egress import Egress
from relay_grpc.auth.oidc import TokenVerifier
from relay_grpc.auth.tokens import MAX_TOKEN, Defect
from relay_grpc.setting_types import OidcIssuer
from relay_grpc.telemetry import Metrics
from tests.auth.issuer import AUDIENCE, Issuer, encoded, issuing, segment, signed

# joserfc warns of what must be refused, and of the name EdDSA.
pytestmark = pytest.mark.filterwarnings("ignore::joserfc.errors.SecurityWarning")

Make = Callable[[Issuer], str]

DAY = 86_400
DEEP = "[" * 1500
NOW = 1_800_000_000.0  # what the verifier's clock says
ATTACKER = generate_key("RSA", 2048, {"kid": "rsa"})


@pytest.fixture(scope="module")
async def issuer() -> AsyncIterator[Issuer]:
    async with issuing() as one:
        one.add_key("RSA", 2048, "pss", alg="PS256")
        one.add_key("RSA", 2048, "encrypts", use="enc")
        one.add_key("RSA", 2048, "signs", key_ops=["sign"])
        one.add_key("RSA", 2048, "wraps", alg="RSA-OAEP")
        one.add_key("RSA", 1024, "weak")
        leaked = one.add_key("RSA", 2048, "leaked")
        one.published[-1] = leaked.as_dict(private=True)
        one.add_key("RSA", 2048, "twice")
        one.published.append(generate_key("RSA", 2048, {"kid": "twice"}).as_dict(private=False))
        one.add_key("EC", "P-256", "p256")
        one.add_key("EC", "P-384", "p384")
        one.add_key("EC", "P-521", "p521")
        one.add_key("EC", "secp256k1", "k1")
        one.add_key("OKP", "Ed25519", "ed25519")
        one.add_key("OKP", "Ed448", "ed448")
        secret = generate_key("oct", 256, {"kid": "secret"})
        one.keys["secret"] = secret
        one.published.append(secret.as_dict(private=True))
        yield one


@pytest.fixture(scope="module")
async def other() -> AsyncIterator[Issuer]:
    """Another issuer that the server trusts."""
    async with issuing() as one:
        yield one


@pytest.fixture(scope="module")
async def verifier(issuer: Issuer, other: Issuer) -> AsyncIterator[TokenVerifier]:
    egress = Egress(EgressPolicy(allow_loopback=True, https_only=False))
    trusted = [OidcIssuer(url=one.url, audience=AUDIENCE) for one in (issuer, other)]
    one = TokenVerifier(trusted, egress, Metrics())
    yield one
    one.close()
    await egress.close()


def says(**changes: Any) -> Make:
    """A token that is right in everything else."""
    return lambda issuer: issuer.token(issuer.claims(**changes))


def headed(**header: Any) -> Make:
    return lambda issuer: issuer.token(**header)


def literal(name: str, value: str) -> Make:
    """A token whose claim has a value that json.dumps would not write."""
    return lambda issuer: issuer.token(json.dumps(issuer.claims(**{name: "?"})).replace('"?"', value))


def unsigned(**header: Any) -> Make:
    return lambda issuer: f"{segment(header)}.{segment(issuer.claims())}."


def mac(secret: Callable[[Issuer], bytes], **header: Any) -> Make:
    """Signed with a secret that is none, by who has read the issuer's public keys."""

    def make(issuer: Issuer) -> str:
        content = f"{segment({'alg': 'HS256', 'typ': 'JWT', 'kid': 'rsa'} | header)}.{segment(issuer.claims())}"
        return f"{content}.{encoded(hmac.digest(secret(issuer), content.encode(), hashlib.sha256))}"

    return make


def pem(issuer: Issuer) -> bytes:
    key: Any = issuer.keys["rsa"].public_key
    return bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def altered(change: Callable[[list[str]], list[str]]) -> Make:
    """The three parts of a good token, put together otherwise."""
    return lambda issuer: ".".join(change(issuer.token().split(".")))


def zeros(kid: str, alg: str, length: int) -> Make:
    return lambda issuer: issuer.token(kid=kid, alg=alg).rpartition(".")[0] + "." + encoded(bytes(length))


def in_ms() -> int:
    return int(time.time() * 1000) + 600_000


FORGED: dict[str, tuple[Make, Defect]] = {
    # No token at all.
    "nothing": (lambda _: "", Defect.MALFORMED),
    "a word": (lambda _: "password", Defect.MALFORMED),
    "dots": (lambda _: "..", Defect.MALFORMED),
    "three words": (lambda _: "a.b.c", Defect.MALFORMED),
    "an opaque access token": (lambda _: "ya29.a0AfH6SMBx", Defect.MALFORMED),
    "not ASCII": (altered(lambda parts: [*parts[:2], "\u00e9"]), Defect.MALFORMED),
    "white space inside": (altered(lambda parts: [parts[0], " " + parts[1], parts[2]]), Defect.MALFORMED),
    "too few parts": (altered(lambda parts: parts[:2]), Defect.MALFORMED),
    "too many parts": (altered(lambda parts: [*parts, parts[2]]), Defect.MALFORMED),
    "encrypted": (altered(lambda parts: [*parts, "", ""]), Defect.MALFORMED),
    "in JSON": (
        lambda issuer: json.dumps(
            dict(zip(("protected", "payload", "signature"), issuer.token().split("."), strict=True))
        ),
        Defect.MALFORMED,
    ),
    "too large": (says(padding="x" * MAX_TOKEN), Defect.MALFORMED),
    "a header too large": (headed(x="x" * 3000), Defect.MALFORMED),
    "a header that is no JSON": (lambda issuer: signed("{", issuer.claims(), ATTACKER, "RS256"), Defect.MALFORMED),
    "a header that is a list": (lambda issuer: signed('["alg"]', issuer.claims(), ATTACKER, "RS256"), Defect.MALFORMED),
    "a header that is a number": (lambda issuer: signed("5", issuer.claims(), ATTACKER, "RS256"), Defect.MALFORMED),
    "a header that never ends": (lambda issuer: signed(DEEP, issuer.claims(), ATTACKER, "RS256"), Defect.MALFORMED),
    "claims that are no JSON": (lambda issuer: issuer.token("{"), Defect.MALFORMED),
    "claims that are a list": (lambda issuer: issuer.token("[]"), Defect.MALFORMED),
    "claims that are null": (lambda issuer: issuer.token("null"), Defect.MALFORMED),
    "claims that never end": (lambda issuer: issuer.token('{"iss":' + DEEP), Defect.MALFORMED),
    "claims with a number of 5,000 digits": (literal("exp", "9" * 5000), Defect.MALFORMED),
    # The algorithm.
    "no algorithm": (headed(alg=None, signed_as="RS256"), Defect.MALFORMED),
    "an algorithm that is a number": (headed(alg=256, signed_as="RS256"), Defect.MALFORMED),
    "none": (unsigned(alg="none"), Defect.ALGORITHM),
    "None": (unsigned(alg="None", kid="rsa"), Defect.ALGORITHM),
    "NONE": (unsigned(alg="NONE"), Defect.ALGORITHM),
    "a lower-case algorithm": (headed(alg="rs256", signed_as="RS256"), Defect.ALGORITHM),
    "none, with a signature": (headed(alg="none", signed_as="RS256"), Defect.ALGORITHM),
    "the public key as a secret": (mac(pem), Defect.ALGORITHM),
    "the modulus as a secret": (mac(lambda issuer: str(issuer.published[0]["n"]).encode()), Defect.ALGORITHM),
    "an empty secret": (mac(lambda _: b"", kid="../../../dev/null"), Defect.ALGORITHM),
    "a secret that the issuer publishes": (headed(alg="HS256", kid="secret"), Defect.ALGORITHM),
    "a secret that the issuer publishes, as a public key": (
        lambda issuer: issuer.token(kid="secret", key=ATTACKER),
        Defect.KEY,
    ),
    "ES256K": (headed(alg="ES256K", kid="k1"), Defect.ALGORITHM),
    "ES256 with a key of another curve": (headed(alg="ES256", kid="k1", signed_as="ES256K"), Defect.KEY),
    "EdDSA with Ed448": (headed(alg="EdDSA", kid="ed448"), Defect.KEY),
    "RS256 with a key for PS256": (headed(alg="RS256", kid="pss"), Defect.KEY),
    "RS256 with an elliptic key": (headed(alg="RS256", kid="p256", signed_as="ES256"), Defect.KEY),
    "RS256 told, RS512 done": (headed(alg="RS256", signed_as="RS512"), Defect.SIGNATURE),
    "RS256 told, PS256 done": (headed(alg="RS256", signed_as="PS256"), Defect.SIGNATURE),
    # The key.
    "a key that encrypts": (headed(kid="encrypts"), Defect.KEY),
    "a key that wraps keys": (headed(kid="wraps"), Defect.KEY),
    "a key that does not verify": (headed(kid="signs"), Defect.KEY),
    "a key of 1024 bits": (headed(kid="weak"), Defect.KEY),
    "a key whose private part is public": (headed(kid="leaked"), Defect.KEY),
    "a key id that two keys have": (headed(kid="twice"), Defect.KEY),
    "a key id that no key has": (lambda issuer: issuer.token(kid="newer", key=ATTACKER), Defect.KEY),
    "a key id that is a number": (lambda issuer: issuer.token(kid=5, key=ATTACKER), Defect.MALFORMED),
    "no key id, with several keys": (lambda issuer: issuer.token(kid=None, key=issuer.keys["rsa"]), Defect.KEY),
    "an attacker's key": (lambda issuer: issuer.token(key=ATTACKER), Defect.SIGNATURE),
    "an attacker's key that comes along": (
        lambda issuer: issuer.token(key=ATTACKER, jwk=ATTACKER.as_dict(private=False)),
        Defect.SIGNATURE,
    ),
    "an attacker's key that comes along, and no id": (
        lambda issuer: issuer.token(key=ATTACKER, jwk=ATTACKER.as_dict(private=False), kid=None),
        Defect.KEY,
    ),
    "an attacker's certificate that comes along": (
        lambda issuer: issuer.token(key=ATTACKER, x5c=["MIIB"]),
        Defect.SIGNATURE,
    ),
    # The signature.
    "no signature": (altered(lambda parts: [*parts[:2], ""]), Defect.SIGNATURE),
    "half a signature": (altered(lambda parts: [*parts[:2], parts[2][:172]]), Defect.SIGNATURE),
    "a signature of zeros": (zeros("rsa", "RS256", 256), Defect.SIGNATURE),
    "an elliptic signature of zeros": (zeros("p256", "ES256", 64), Defect.SIGNATURE),
    "an Ed25519 signature of zeros": (zeros("ed25519", "EdDSA", 64), Defect.SIGNATURE),
    "a signature with padding": (altered(lambda parts: [*parts[:2], parts[2] + "=="]), Defect.SIGNATURE),
    "another user's claims": (
        lambda issuer: ".".join(
            [issuer.token().split(".")[0], segment(issuer.claims(sub="bob")), issuer.token().split(".")[2]]
        ),
        Defect.SIGNATURE,
    ),
    "another header": (
        lambda issuer: ".".join([segment({"alg": "RS256", "kid": "rsa"}), *issuer.token().split(".")[1:]]),
        Defect.SIGNATURE,
    ),
    # Extensions.
    "a critical extension": (headed(crit=["x"], x=1), Defect.MALFORMED),
    "a critical extension that is not there": (headed(crit=["x"]), Defect.MALFORMED),
    "a critical parameter that is understood": (headed(crit=["kid"]), Defect.MALFORMED),
    "an empty list of critical extensions": (headed(crit=[]), Defect.MALFORMED),
    "an unencoded payload": (headed(crit=["b64"], b64=False), Defect.MALFORMED),
    "an unencoded payload, told by the way": (headed(b64=False), Defect.MALFORMED),
    "an encoded payload, told": (headed(b64=True), Defect.MALFORMED),
    # What an issuer signs that is no credential.
    "a notice of a logout": (headed(typ="logout+jwt"), Defect.CLAIMS),
    "a security event": (headed(typ="secevent+jwt"), Defect.CLAIMS),
    "a proof of possession": (headed(typ="dpop+jwt"), Defect.CLAIMS),
    "a notice of a logout without its type": (
        says(events={"http://schemas.openid.net/event/backchannel-logout": {}}),
        Defect.CLAIMS,
    ),
    "a token that is bound to its bearer's key": (says(cnf={"jkt": "x"}), Defect.CLAIMS),
    # iss
    "no issuer": (says(iss=None), Defect.MALFORMED),
    "an issuer that is a list": (lambda issuer: issuer.token(issuer.claims(iss=[issuer.url])), Defect.MALFORMED),
    "an unknown issuer": (says(iss="https://evil.example"), Defect.ISSUER),
    "an issuer with a slash more": (lambda issuer: issuer.token(issuer.claims(iss=issuer.url + "/")), Defect.ISSUER),
    "an issuer in capitals": (lambda issuer: issuer.token(issuer.claims(iss=issuer.url.upper())), Defect.ISSUER),
    # aud
    "no audience": (says(aud=None), Defect.CLAIMS),
    "another audience": (says(aud="other"), Defect.CLAIMS),
    "a longer audience": (says(aud=AUDIENCE + "2"), Defect.CLAIMS),
    "other audiences": (says(aud=["other", "another"]), Defect.CLAIMS),
    "no audience in the list": (says(aud=[]), Defect.CLAIMS),
    "an empty audience": (says(aud=""), Defect.CLAIMS),
    "an audience and a number": (says(aud=[AUDIENCE, 5]), Defect.CLAIMS),
    "audiences in a list of lists": (says(aud=[[AUDIENCE]]), Defect.CLAIMS),
    "an audience that is an object": (says(aud={AUDIENCE: 1}), Defect.CLAIMS),
    # exp
    "no end": (says(exp=None), Defect.CLAIMS),
    "an end that is null": (literal("exp", "null"), Defect.CLAIMS),
    "an end that is past": (says(exp=int(time.time()) - 60), Defect.EXPIRED),
    "an end that was never to come": (says(exp=-1), Defect.EXPIRED),
    "an end that is text": (says(exp=str(int(time.time()) + DAY)), Defect.CLAIMS),
    "an end that is true": (says(exp=True), Defect.CLAIMS),
    "an end that is not a number": (literal("exp", "NaN"), Defect.CLAIMS),
    "an end that is infinite": (literal("exp", "Infinity"), Defect.CLAIMS),
    "an end beyond all floats": (literal("exp", "1e400"), Defect.CLAIMS),
    "an end in milliseconds": (lambda issuer: issuer.token(issuer.claims(exp=in_ms())), Defect.CLAIMS),
    "an end beyond all times": (says(exp=10**30), Defect.CLAIMS),
    "an end that is a list": (says(exp=[int(time.time()) + DAY]), Defect.CLAIMS),
    # nbf, iat
    "a beginning that is to come": (says(nbf=int(time.time()) + DAY), Defect.CLAIMS),
    "a beginning that is text": (says(nbf="0"), Defect.CLAIMS),
    "a beginning that is false": (says(nbf=False), Defect.CLAIMS),
    "a beginning that is not a number": (literal("nbf", "NaN"), Defect.CLAIMS),
    "made in the future": (says(iat=int(time.time()) + DAY), Defect.CLAIMS),
    "made in the future, in milliseconds": (lambda issuer: issuer.token(issuer.claims(iat=in_ms())), Defect.CLAIMS),
    "made at a text": (says(iat="now"), Defect.CLAIMS),
    # sub
    "nobody": (says(sub=None), Defect.CLAIMS),
    "nobody in particular": (says(sub=""), Defect.CLAIMS),
    "somebody who is a number": (says(sub=5), Defect.CLAIMS),
    "somebody who is a list": (says(sub=["alice"]), Defect.CLAIMS),
    "somebody with a long name": (says(sub="x" * 256), Defect.CLAIMS),
    "somebody with a NUL": (says(sub="alice\0"), Defect.CLAIMS),
    "somebody who is half a character": (says(sub="\ud800"), Defect.CLAIMS),
}


async def refusal(verifier: TokenVerifier, token: str) -> errors.Unauthenticated:
    with pytest.raises(errors.Unauthenticated) as caught:
        await verifier.verify(token)
    return caught.value


@pytest.mark.parametrize("name", FORGED)
async def test_a_forged_token_is_refused_for_its_one_defect_and_tells_nothing_of_it(
    verifier: TokenVerifier, issuer: Issuer, name: str
) -> None:
    make, defect = FORGED[name]
    assert (await verifier.verify(issuer.token())).subject == "alice"  # so it is the defect that makes the difference
    kept = dict(verifier._proofs)
    before = refused_for(verifier, defect)
    token = make(issuer)
    for _ in range(2):
        error = await refusal(verifier, token)
        assert (error.message, error.__cause__) == (errors.Unauthenticated().message, None)
    assert refused_for(verifier, defect) == before + 2
    assert verifier._proofs == kept


def refused_for(verifier: TokenVerifier, defect: Defect) -> float:
    labels = {"reason": defect.value}
    return verifier._metrics.registry.get_sample_value("relay_auth_failures_total", labels) or 0.0


@pytest.mark.parametrize("header", ["jku", "x5u"])
async def test_no_address_in_a_token_is_asked_for_keys(verifier: TokenVerifier, issuer: Issuer, header: str) -> None:
    async with issuing() as evil:
        evil.published = [ATTACKER.as_dict(private=False)]
        token = issuer.token(key=ATTACKER, **{header: f"{evil.url}/keys"})
        await refusal(verifier, token)
        assert evil.asked == []


async def test_an_issuer_signs_for_itself_alone(verifier: TokenVerifier, issuer: Issuer, other: Issuer) -> None:
    assert (await verifier.verify(other.token())).issuer == other.url
    await refusal(verifier, issuer.token(issuer.claims(iss=other.url)))
    await refusal(verifier, other.token(other.claims(iss=issuer.url)))


ALGORITHMS = [
    *(("rsa", algorithm) for algorithm in ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")),
    ("pss", "PS256"),
    ("p256", "ES256"),
    ("p384", "ES384"),
    ("p521", "ES512"),
    ("ed25519", "EdDSA"),
    ("ed25519", "Ed25519"),
]


@pytest.mark.parametrize(("kid", "algorithm"), ALGORITHMS)
async def test_every_algorithm_works_with_its_own_keys(
    verifier: TokenVerifier, issuer: Issuer, kid: str, algorithm: str
) -> None:
    identity = await verifier.verify(issuer.token(kid=kid, alg=algorithm))
    assert (identity.issuer, identity.subject, identity.name) == (issuer.url, "alice", "alice")
    assert identity.expires_at.timestamp() - time.time() == pytest.approx(600, abs=10)


@pytest.mark.parametrize(
    "make",
    [
        says(aud=[AUDIENCE]),
        says(aud=["other", AUDIENCE]),
        says(nbf=None, iat=None),
        says(exp=time.time() + DAY + 0.5),
        says(sub="x" * 255),
        says(sub="\u00e9\u4e2d\U0001f600", roles=["admin"], azp="client"),
        headed(typ=None),
        headed(typ="at+jwt"),
        headed(typ="application/AT+JWT"),
        headed(jwk=ATTACKER.as_dict(private=False), jku="https://evil.example", x5c=["MIIB"]),  # not looked at
        headed(**{"pi.atm": "5", "x5t": "x"}),
        lambda issuer: issuer.token(kid=None, alg="ES256", key=issuer.keys["p256"]),  # the only one for this algorithm
    ],
)
async def test_what_the_rules_allow_is_taken(verifier: TokenVerifier, issuer: Issuer, make: Make) -> None:
    assert (await verifier.verify(make(issuer))).issuer == issuer.url


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"email": "a@example.com", "preferred_username": "ally", "name": "Alice"}, "a@example.com"),
        ({"email": "a@example.com", "email_verified": False, "preferred_username": "ally"}, "ally"),
        ({"email": "a@example.com", "email_verified": True}, "a@example.com"),
        ({"preferred_username": "ally", "name": "Alice"}, "ally"),
        ({"name": "Alice \u00c4"}, "Alice \u00c4"),
        ({"email": 5, "preferred_username": "", "name": ["Alice"]}, "alice"),
        ({"email": "x" * 256, "preferred_username": "a\nb", "name": "\x1b[31mroot"}, "alice"),
        ({"email": "\ud800", "name": "a\0"}, "alice"),
        ({}, "alice"),
    ],
)
async def test_a_user_is_called_by_the_first_claim_that_can_be_shown(
    verifier: TokenVerifier, issuer: Issuer, changes: dict[str, Any], name: str
) -> None:
    assert (await verifier.verify(issuer.token(issuer.claims(**changes)))).name == name


@pytest.mark.parametrize(
    ("claim", "offset", "accepted"),
    [
        ("exp", -29, True),
        ("exp", -30, False),
        ("exp", -31, False),
        ("exp", 0, True),
        ("nbf", 29, True),
        ("nbf", 30, True),
        ("nbf", 31, False),
        ("iat", 30, True),
        ("iat", 31, False),
    ],
)
async def test_clocks_may_differ_by_thirty_seconds_and_no_more(
    issuer: Issuer, claim: str, offset: int, accepted: bool
) -> None:
    egress = Egress(EgressPolicy(allow_loopback=True, https_only=False))
    verifier = TokenVerifier([OidcIssuer(url=issuer.url, audience=AUDIENCE)], egress, Metrics(), clock=lambda: NOW)
    good = {"iat": NOW, "nbf": NOW, "exp": NOW + 600}
    token = issuer.token(issuer.claims(**good | {claim: NOW + offset}))
    try:
        if accepted:
            for _ in range(2):  # checked, and remembered
                assert (await verifier.verify(token)).subject == "alice"
        else:
            await refusal(verifier, token)
    finally:
        await egress.close()
