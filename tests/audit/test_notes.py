"""Checkpoints are opened as C2SP signed-note and tlog-checkpoint say, and nothing that is almost one."""

import base64

import pytest
from relay.proofs import ProofError, VerifierKey, open_checkpoint

from relay_grpc.audit.checkpoint import Signer
from tests.audit.exports import KEYS, SIGNER


def signed(text: str) -> str:
    """A note with any text, by the key of the tests."""
    theirs = SIGNER._keys[0]
    return f"{text}\n{theirs.signature(text)}\n"


ROOT = base64.b64encode(bytes(range(32))).decode()
TEXT = f"origin of a log\n5\n{ROOT}\n"


def test_a_checkpoint_may_have_what_the_format_allows() -> None:
    unknown = f"\N{EM DASH} other.example {base64.b64encode(b'who?' + bytes(5000)).decode()}\n"
    for note in (
        signed(TEXT),
        signed(TEXT) + unknown,
        signed(TEXT) + unknown * 15,
        signed(TEXT) + signed(TEXT).split("\n\n")[1],
        signed(TEXT + "an extension\nand another\n"),
        signed(f"origin\n0\n{ROOT}\n"),
        signed(TEXT).encode(),
    ):
        assert open_checkpoint(note, KEYS).signers == ("test-key",)
    assert open_checkpoint(signed(f"a\u2028b \x7f\n5\n{ROOT}\n"), KEYS).origin == "a\u2028b \x7f"


@pytest.mark.parametrize(
    "text",
    [
        f"origin\n05\n{ROOT}\n",
        f"origin\n+5\n{ROOT}\n",
        f"origin\n5 \n{ROOT}\n",
        f"origin\n\N{ARABIC-INDIC DIGIT FIVE}\n{ROOT}\n",
        f"origin\n{10**18}\n{ROOT}\n",
        f"origin\n-1\n{ROOT}\n",
        f"\n5\n{ROOT}\n",
        f"origin\n5\n{ROOT.rstrip('=')}\n",
        f"origin\n5\n{ROOT[:-2]}9=\n",  # other last bits, which decoders ignore
        f"origin\n5\n{ROOT} \n",
        f"origin\n5\n{base64.b64encode(bytes(31)).decode()}\n",
        "origin\n5\n",
        TEXT + "\nafter an empty line\n",
        TEXT.replace("o", "\x01", 1),
        TEXT.replace("\n", "\r\n"),
    ],
)
def test_a_signed_text_that_is_no_checkpoint_is_refused(text: str) -> None:
    with pytest.raises(ProofError):
        open_checkpoint(signed(text), KEYS)


def malformed() -> list[str | bytes]:
    good = signed(TEXT)
    text, line = good.split("\n\n")
    return [
        "",
        text,
        f"{text}\n",
        f"{text}\n\n",
        good[:-1],
        f"{good}\n",
        good.replace("\N{EM DASH}", "-"),
        good.replace("test-key", "test key"),
        good.replace("test-key", "test+key"),
        good.replace("test-key", "test\N{NO-BREAK SPACE}key"),
        good.replace("\N{EM DASH} test-key ", "\N{EM DASH} test-key  "),
        f"{good}and more\n",
        f"{good}\N{EM DASH} other AAAA\n",
        f"{good}\N{EM DASH} other =\n",
        good.encode() + b"\xff\n",
        b"\xff" + good.encode(),
        good.replace("\n\n", "\n"),
        good + f"\N{EM DASH} other {'A' * (1 << 20)}\n",
        f"{text}\n\n\N{EM DASH} other.example {line.split(' ')[2]}",
    ]


@pytest.mark.parametrize("note", malformed(), ids=range(len(malformed())))
def test_a_malformed_note_is_refused(note: str | bytes) -> None:
    with pytest.raises(ProofError):
        open_checkpoint(note, KEYS)


def test_a_wrong_signature_that_claims_a_known_key_makes_the_note_worthless() -> None:
    other = Signer({"other": bytes(32)})
    both = [*KEYS, VerifierKey.parse(other.verifier_keys[0])]
    right, wrong = other._keys[0].signature(TEXT), SIGNER._keys[0].signature("something else\n")
    assert open_checkpoint(f"{TEXT}\n{right}\n{wrong}\n", both[1:]).signers == ("other",)
    with pytest.raises(ProofError, match=r"signature by test-key\+[0-9a-f]{8} is wrong"):
        open_checkpoint(f"{TEXT}\n{right}\n{wrong}\n", both)
    with pytest.raises(ProofError, match=r"wrong"):
        open_checkpoint(f"{signed(TEXT)}{wrong}\n", KEYS)
    with pytest.raises(ProofError, match=r"there is no verifier key"):
        open_checkpoint(signed(TEXT), [])
