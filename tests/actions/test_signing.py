import base64
import json
import random
import time
from collections.abc import Iterator

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from standardwebhooks import Webhook, WebhookVerificationError

from relay_grpc.actions import signing
from relay_grpc.actions.signing import Key, Scheme


def hmac_key(secret: str) -> Key:
    return Key(Scheme.HMAC, signing.decode_secret(secret))


def headers(message_id: str, timestamp: str, signature: str) -> dict[str, str]:
    return {"webhook-id": message_id, "webhook-timestamp": timestamp, "webhook-signature": signature}


def flipped(text: str) -> Iterator[str]:
    """Every text that differs from this ASCII one in a single bit."""
    for index in range(len(text)):
        for bit in range(7):
            yield text[:index] + chr(ord(text[index]) ^ 1 << bit) + text[index + 1 :]


def test_new_secrets_are_32_random_bytes_that_the_published_library_takes() -> None:
    secrets = {signing.new_secret() for _ in range(100)}
    assert len(secrets) == 100
    for secret in secrets:
        assert secret.startswith("whsec_")
        assert len(signing.decode_secret(secret)) == 32
        signature = signing.sign(hmac_key(secret), "id", int(time.time()), b"{}")
        Webhook(secret).verify(b"{}", headers("id", str(int(time.time())), signature))


@pytest.mark.parametrize("size", [24, 32, 64])
def test_secrets_of_24_to_64_bytes_are_decoded(size: int) -> None:
    raw = random.randbytes(size)
    assert signing.decode_secret("whsec_" + base64.b64encode(raw).decode()) == raw


@pytest.mark.parametrize(
    ("secret", "problem"),
    [
        ("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "begins with whsec_"),
        ("whsk_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "begins with whsec_"),
        ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaS", "not padded base64"),
        ("whsec_MfKQ9r8GKYqrTwjU PD8ILPZIo2LaLaSw", "not padded base64"),
        ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLé==", "not padded base64"),
        ("whsec_" + base64.b64encode(b"x" * 23).decode(), "24 to 64 bytes"),
        ("whsec_" + base64.b64encode(b"x" * 65).decode(), "24 to 64 bytes"),
        ("whsec_", "24 to 64 bytes"),
    ],
)
def test_other_secrets_are_refused_without_being_quoted(secret: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as refusal:
        signing.decode_secret(secret)
    assert "MfKQ" not in str(refusal.value)


def test_the_signature_is_the_one_of_the_published_example() -> None:
    key = hmac_key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signature = signing.sign(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_the_published_library_verifies_300_random_bodies() -> None:
    draw = random.Random(5)
    secret = signing.new_secret()
    verifier, key, now = Webhook(secret), hmac_key(secret), int(time.time())
    for index in range(300):
        text = "".join(chr(draw.choice([draw.randrange(0x80), draw.randrange(0xA0, 0xD800)])) for _ in range(index))
        body = text.encode()
        signature = signing.sign(key, f"id-{index}", now, body)
        verifier.verify(body, headers(f"id-{index}", str(now), signature), json_parse=False)


def test_every_secret_of_a_rotation_verifies_the_same_header() -> None:
    old, new = signing.new_secret(), signing.new_secret()
    now = int(time.time())
    header = signing.signature_header([hmac_key(new), hmac_key(old)], "id", now, b"{}")
    for secret in (old, new):
        Webhook(secret).verify(b"{}", headers("id", str(now), header))
    with pytest.raises(WebhookVerificationError):
        Webhook(signing.new_secret()).verify(b"{}", headers("id", str(now), header))


def test_no_single_flipped_bit_verifies() -> None:
    secret, message_id, timestamp = signing.new_secret(), "0192f3a1-7c1e", str(int(time.time()))
    body = json.dumps({"order": "or_1829", "amount": 1299})
    signature = signing.sign(hmac_key(secret), message_id, int(timestamp), body.encode())
    mac = base64.b64decode(signature.removeprefix("v1,"))
    verifier = Webhook(secret)
    verifier.verify(body, headers(message_id, timestamp, signature))

    mutants = [(body, headers(other, timestamp, signature)) for other in flipped(message_id)]
    mutants += [(body, headers(message_id, other, signature)) for other in flipped(timestamp)]
    mutants += [(other, headers(message_id, timestamp, signature)) for other in flipped(body)]
    for bit in range(len(mac) * 8):
        other = (int.from_bytes(mac) ^ 1 << bit).to_bytes(len(mac))
        mutants.append((body, headers(message_id, timestamp, "v1," + base64.b64encode(other).decode())))
    assert len(mutants) > 600
    for mutant_body, mutant_headers in mutants:
        with pytest.raises(WebhookVerificationError):
            verifier.verify(mutant_body, mutant_headers, json_parse=False)


def test_the_ed25519_signature_is_the_one_of_the_rfc() -> None:
    """RFC 8032, 7.1, test 3 gives the keys; what is signed is id, timestamp and body, so the signature is verified."""
    raw = bytes.fromhex("c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7")
    public = bytes.fromhex("fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025")
    assert signing.public_key(raw) == "whpk_" + base64.b64encode(public).decode()
    version, _, signature = signing.sign(Key(Scheme.ED25519, raw), "id", 7, b"body").partition(",")
    assert version == "v1a"
    verifier = Ed25519PublicKey.from_public_bytes(public)
    verifier.verify(base64.b64decode(signature), b"id.7.body")
    with pytest.raises(InvalidSignature):
        verifier.verify(base64.b64decode(signature), b"id.8.body")


def test_new_private_keys_are_32_bytes_that_only_their_public_key_tells_of() -> None:
    made = {signing.new_ed25519() for _ in range(100)}
    assert {len(raw) for raw in made} == {32}
    assert len({signing.public_key(raw) for raw in made}) == len(made) == 100
    raw = made.pop()
    assert repr(raw) not in repr(Key(Scheme.ED25519, raw))


def test_both_schemes_sign_beside_each_other() -> None:
    secret, raw, now = signing.new_secret(), signing.new_ed25519(), int(time.time())
    header = signing.signature_header([Key(Scheme.ED25519, raw), hmac_key(secret)], "id", now, b"{}")
    assert [entry.partition(",")[0] for entry in header.split(" ")] == ["v1a", "v1"]
    Webhook(secret).verify(b"{}", headers("id", str(now), header))


def test_secrets_are_told_as_they_are_taken() -> None:
    secret = signing.new_secret()
    assert signing.encode_secret(signing.decode_secret(secret)) == secret


def test_the_body_signature_is_hmac_sha256() -> None:
    expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"  # RFC 4231, test case 2
    assert signing.body_signature(b"Jefe", b"what do ya want for nothing?") == f"sha256={expected}"
