"""The text of a key: its format, and a checksum that refuses what was mistyped without a look at the database."""

import math
import random
import re
import string
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from relay_grpc.auth import keys
from tests.auth.forgery import DIGITS, forged, mistyped

DOCUMENT = (Path(__file__).parents[2] / "docs" / "keys.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("live", "env"), [(True, "live"), (False, "dev")])
def test_a_new_key_says_where_it_belongs_and_carries_its_public_id(live: bool, env: str) -> None:
    key = keys.generate(live=live)
    assert key.text.startswith(f"rk_{env}_{key.public_id}_")
    assert keys.public_id_of(key.text) == key.public_id
    assert len(key.text) == len(f"rk_{env}_") + 12 + 1 + 32 + 6


def test_the_checksum_is_as_documented() -> None:
    key = keys.generate(live=False)
    secret = key.text.rpartition("_")[2][:32]
    assert forged(key.public_id, secret) == key.text
    assert keys.public_id_of(forged(key.public_id)) == key.public_id
    assert {keys.public_id_of(forged(env=env)) is not None for env in ("live", "dev")} == {True}


def test_every_change_of_one_character_is_refused_offline() -> None:
    key = keys.generate(live=True).text
    changed = {key[:i] + other + key[i + 1 :] for i in range(len(key)) for other in DIGITS + "_-" if other != key[i]}
    assert len(changed) == len(key) * 63
    assert [text for text in changed if keys.public_id_of(text)] == []


def test_neighbours_that_changed_places_and_cut_keys_are_refused_offline() -> None:
    key = keys.generate(live=False).text
    swapped = {key[:i] + key[i + 1] + key[i] + key[i + 2 :] for i in range(len(key) - 1)} - {key}
    cut = {key[:i] for i in range(len(key))} | {key[i:] for i in range(1, len(key))}
    padded = {f"{key} ", f" {key}", f"{key}\n", f"{key}\0", key * 2}
    assert [text for text in swapped | cut | padded if keys.public_id_of(text)] == []


@pytest.mark.parametrize(
    "text", ["", "rk", "rk_test_" + "0" * 51, "é" * 60, "\0", "rk_dev_" + "\uff10" * 12 + "_" + "0" * 38]
)
def test_anything_else_is_no_key(text: str) -> None:
    assert keys.public_id_of(text) is None


def test_a_secret_has_190_bits_and_no_key_is_like_another() -> None:
    assert string.digits + string.ascii_uppercase + string.ascii_lowercase == keys.ALPHABET == DIGITS
    assert 32 * math.log2(len(keys.ALPHABET)) > 190
    made = [keys.generate(live=True) for _ in range(500)]
    secrets = [key.text.rpartition("_")[2][:32] for key in made]
    assert len(set(secrets)) == len({key.public_id for key in made}) == 500
    assert set("".join(secrets)) == set(DIGITS)
    for place in range(32):  # 500 draws of 62: a place that is not random would hold far fewer
        assert len({secret[place] for secret in secrets}) > 40


@pytest.fixture
def scanner() -> re.Pattern[str]:
    """The pattern for secret scanners, as documented."""
    (pattern,) = (block.strip() for _, block in BLOCKS if "{38}" in block)
    assert pattern in (keys.__doc__ or "")
    return re.compile(pattern)


def test_a_secret_scanner_finds_1000_of_1000_keys_in_random_text(scanner: re.Pattern[str]) -> None:
    made = [keys.generate(live=bool(i % 2)).text for i in range(1000)]
    noise = random.Random(4711)
    text = "".join("".join(noise.choices(string.printable, k=noise.randrange(200))) + key for key in made)
    found = [match[0] for match in scanner.finditer(text)]
    assert found == made
    assert all(keys.public_id_of(key) for key in found)


def test_a_secret_scanner_finds_nothing_in_10_megabytes_of_source_text(scanner: re.Pattern[str]) -> None:
    size = 0
    for folder in ("stdlib", "purelib"):
        for file in sorted(Path(sysconfig.get_path(folder)).rglob("*.py")):
            source = file.read_text(errors="replace")
            assert scanner.search(source) is None, file
            size += len(source)
            if size > 10_000_000:
                return
    pytest.fail(f"only {size} characters of source text are here")


def test_the_documented_check_tells_keys_from_what_looks_like_them() -> None:
    (program,) = (block for language, block in BLOCKS if language == "python")
    names: dict[str, Any] = {}
    exec(program, names)
    made = [keys.generate(live=True).text for _ in range(100)]
    assert all(names["is_key"](key) for key in made)
    assert not any(names["is_key"](mistyped(key, position)) for key in made for position in (-1, -20, 10))


def test_a_key_does_not_show_its_secret_by_accident() -> None:
    key = keys.generate(live=True)
    assert key.text not in f"{key!r} {key}"
    assert key.public_id in repr(key)


def test_a_forged_key_differs_from_a_mistyped_one() -> None:
    assert keys.public_id_of(forged()) is not None
    assert keys.public_id_of(mistyped(forged())) is None
