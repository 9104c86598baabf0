"""The environment: what is documented, what is refused and how that is said, and what is never shown."""

import base64
from pathlib import Path
from typing import Any

import pytest

from relay_grpc.datafolder import new_key_material
from relay_grpc.settings import Settings, SettingsError

DATABASE = "postgresql://relay:planted-secret@db/relay"
KEY, OTHER_KEY = (new_key_material()["RELAY_ENCRYPTION_KEYS"].split(":")[1] for _ in range(2))
PRODUCTION = {"DATABASE_URL": DATABASE, **new_key_material()}
# requirements: "exactly the documented environment variables", with what they default to.
DOCUMENTED: dict[str, Any] = {
    "DATABASE_URL": None,
    "DATABASE_PUBLIC_URL": None,
    "RATE_LIMIT_ENABLED": True,
    "RATE_LIMIT_EXEC_PER_MIN": 60,
    "REDIS_URL": None,
    "ACTIONS_ENABLED": None,
    "WEBHOOK_URL": None,
    "ACTIONS_SIGNING_SECRET": None,
    "TELEMETRY_ENABLED": True,
    "OTEL_ENABLED": False,
    "OTEL_ENDPOINT": None,
}


def problems(environ: dict[str, str]) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        Settings.load(environ)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def test_every_documented_variable_is_read_and_has_its_default() -> None:
    aliases = {str(field.alias): field for field in Settings.model_fields.values()}
    assert {name: aliases[name].default for name in DOCUMENTED} == DOCUMENTED
    assert all(name.startswith("RELAY_") for name in set(aliases) - set(DOCUMENTED))
    assert all(field.description for field in aliases.values())


def test_the_defaults_are_those_of_a_safe_development_start() -> None:
    settings = Settings.load({})
    assert settings.is_development
    assert settings.actions_are_enabled
    assert settings.reflection_is_on
    assert settings.listen.is_loopback
    assert settings.http_listen.is_loopback


def test_a_database_url_means_production_and_production_is_closed() -> None:
    settings = Settings.load(PRODUCTION)
    assert not settings.is_development
    assert not settings.actions_are_enabled
    assert not settings.reflection_is_on
    assert Settings.load({"DATABASE_URL": DATABASE, "RELAY_ENV": "development"}).is_development


def test_empty_variables_count_as_unset() -> None:
    assert Settings.load(
        dict.fromkeys([str(one.alias) for one in Settings.model_fields.values()], "")
    ) == Settings.load({})


def test_variables_of_others_are_left_alone() -> None:
    assert Settings.load({"PATH": "/bin", "RELAY_KEY": "a client's"}) == Settings.load({})


def test_all_problems_are_told_together_each_with_its_variable() -> None:
    told = problems(
        {
            "DATABASE_URL": "mysql://x",
            "REDIS_URL": "x",
            "RATE_LIMIT_EXEC_PER_MIN": "0",
            "RATE_LIMIT_ENABLED": "perhaps",
            "RELAY_ENV": "staging",
            "RELAY_LISTEN": "50051",
            "RELAY_EGRESS_ALLOW": "10.0.0.0/8,not-a-network",
            "RELAY_ENCRYPTION_KEYS": "k1:c2hvcnQ=",
            "RELAY_KEY_PEPPERS": "k1:c2hvcnQ=",
            "RELAY_TRUSTED_PROXIES": "proxy.example",
            "RELAY_OIDC_ISSUERS": "https://login.example",
            "RELAY_HASH_KEY": "short",
            "RELAY_AUDIT_KEYS": "k1:c2hvcnQ=",
            "RELAY_AUDIT_CHECKPOINTS": "s3://checkpoints",
            "RELAY_LOG_LEVEL": "LOUD",
            "WEBHOOK_URL": "ftp://receiver.example",
            "ACTIONS_SIGNING_SECRET": "x" * 24,
            "RELAY_LEASE": "1",
            "OTEL_ENABLED": "true",
            "RELAY_TLS_CERTIFICATE": "/no/such/file.pem",
        }
    )
    assert {one.split(":")[0] for one in told} == {
        "DATABASE_URL",
        "REDIS_URL",
        "RATE_LIMIT_EXEC_PER_MIN",
        "RATE_LIMIT_ENABLED",
        "RELAY_ENV",
        "RELAY_LISTEN",
        "RELAY_EGRESS_ALLOW",
        "RELAY_ENCRYPTION_KEYS",
        "RELAY_KEY_PEPPERS",
        "RELAY_TRUSTED_PROXIES",
        "RELAY_OIDC_ISSUERS",
        "RELAY_HASH_KEY",
        "RELAY_AUDIT_KEYS",
        "RELAY_AUDIT_CHECKPOINTS",
        "RELAY_LOG_LEVEL",
        "WEBHOOK_URL",
        "WEBHOOK_URL and ACTIONS_SIGNING_SECRET",
        "RELAY_LEASE",
        "OTEL_ENDPOINT",
        "RELAY_TLS_CERTIFICATE and RELAY_TLS_KEY",
        "RELAY_TLS_CERTIFICATE",
    }


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"DATABASE_URL": "", "RELAY_ENV": "production"},
            "DATABASE_URL: RELAY_ENV=production does not run on the embedded database",
        ),
        ({"RELAY_ENCRYPTION_KEYS": ""}, "RELAY_ENCRYPTION_KEYS: production needs one; `relay keygen` makes it"),
        ({"RELAY_KEY_PEPPERS": ""}, "RELAY_KEY_PEPPERS: production needs one; `relay keygen` makes it"),
        ({"RELAY_OIDC_ISSUERS": "http://login.example a"}, "RELAY_OIDC_ISSUERS: production trusts https:// alone"),
        (
            {"RELAY_TRUSTED_PROXIES": "10.0.0.0/8, ::/0"},
            "RELAY_TRUSTED_PROXIES: who trusts all addresses believes every caller; name the proxies",
        ),
        ({"RELAY_HASH_KEY": ""}, "RELAY_HASH_KEY: production needs one; `relay keygen` makes it"),
        ({"RELAY_AUDIT_KEYS": ""}, "RELAY_AUDIT_KEYS: production needs one; `relay keygen` makes it"),
        (
            {"RELAY_AUDIT_CHECKPOINTS": "http://witness.example/relay"},
            "RELAY_AUDIT_CHECKPOINTS: production pushes to https:// alone",
        ),
        (
            {"RELAY_LISTEN": "0.0.0.0:50051"},
            "RELAY_LISTEN: 0.0.0.0:50051 would serve plaintext to the network; set RELAY_TLS_CERTIFICATE and "
            "RELAY_TLS_KEY, or listen on 127.0.0.1 behind a proxy",
        ),
        (
            {"RELAY_LISTEN": "[::]:50051"},
            "RELAY_LISTEN: [::]:50051 would serve plaintext to the network; set RELAY_TLS_CERTIFICATE and "
            "RELAY_TLS_KEY, or listen on 127.0.0.1 behind a proxy",
        ),
    ],
)
def test_each_unsafe_combination_in_production_is_refused_with_its_sentence(
    change: dict[str, str], sentence: str
) -> None:
    Settings.load(PRODUCTION)
    assert problems(PRODUCTION | change) == [sentence]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"WEBHOOK_URL": "https://a.example"}, "WEBHOOK_URL and ACTIONS_SIGNING_SECRET: set both or neither"),
        ({"ACTIONS_SIGNING_SECRET": "x" * 24}, "WEBHOOK_URL and ACTIONS_SIGNING_SECRET: set both or neither"),
        ({"RELAY_LEASE": "44.9"}, "RELAY_LEASE: must be at least 3 times RELAY_ATTEMPT_TIMEOUT"),
        (
            {"RELAY_ENCRYPTION_KEYS": f"k1:{KEY},k1:{OTHER_KEY}"},
            "RELAY_ENCRYPTION_KEYS: two keys have the same id",
        ),
        ({"RELAY_AUDIT_KEYS": f"k1:{KEY},k1:{OTHER_KEY}"}, "RELAY_AUDIT_KEYS: two keys have the same id"),
        (
            {"RELAY_OIDC_ISSUERS": "https://login.example a, https://login.example b"},
            "RELAY_OIDC_ISSUERS: an issuer is there twice",
        ),
        ({"OTEL_ENABLED": "1"}, "OTEL_ENDPOINT: OTEL_ENABLED needs one, such as http://127.0.0.1:4318"),
        ({"RELAY_TLS_CLIENT_CA": __file__}, "RELAY_TLS_CLIENT_CA: needs RELAY_TLS_CERTIFICATE"),
        ({"RELAY_TLS_KEY": __file__}, "RELAY_TLS_CERTIFICATE and RELAY_TLS_KEY: set both or neither"),
    ],
)
def test_values_that_contradict_each_other_are_refused_everywhere(change: dict[str, str], sentence: str) -> None:
    assert problems(change) == problems(PRODUCTION | change) == [sentence]


@pytest.mark.parametrize(
    "secret", ["x" * 23, "x" * 65, "whsec_", "whsec_" + "QUJD" * 7, "whsec_" + "QUJD" * 22, "whsec_" + "?" * 32]
)
def test_a_signing_secret_that_signs_badly_is_refused(secret: str) -> None:
    environ = {"WEBHOOK_URL": "https://receiver.example", "ACTIONS_SIGNING_SECRET": secret}
    assert any(one.startswith("ACTIONS_SIGNING_SECRET: should be whsec_") for one in problems(environ))


@pytest.mark.parametrize("secret", ["x" * 24, "x" * 64, "whsec_" + "QUJD" * 8, "whsec_" + "QUJD" * 21])
def test_a_signing_secret_has_24_to_64_bytes(secret: str) -> None:
    environ = {"WEBHOOK_URL": "https://receiver.example", "ACTIONS_SIGNING_SECRET": secret}
    assert Settings.load(environ).actions_signing_secret is not None


@pytest.mark.parametrize(
    "issuers",
    [
        "https://login.example",
        "relay",
        "login.example relay",
        "ftp://login.example relay",
        "HTTPS://login.example relay",
        "https:// relay",
        "https://user@login.example relay",
        "https://user:password@login.example relay",
        "https://login.example?tenant=1 relay",
        "https://login.example/#one relay",
        "https://login.example/a\\b relay",
        "https://login.example:port relay",
        "https://l\u00f6gin.example relay",
        "https://login.example relay other",
        "https://login.example r\u00e9lay",
        f"https://{'x' * 250} relay",
        "https://login.example relay, https://other.example",
    ],
)
def test_an_issuer_that_no_token_could_name_exactly_is_refused(issuers: str) -> None:
    (told,) = problems({"RELAY_OIDC_ISSUERS": issuers})
    assert told.startswith("RELAY_OIDC_ISSUERS: each issuer should be URL AUDIENCE, such as ")


@pytest.mark.parametrize(
    ("issuers", "read"),
    [
        ("https://login.example relay", [("https://login.example", "relay")]),
        (" https://login.example/   api://relay ,", [("https://login.example/", "api://relay")]),
        (
            "http://[::1]:8080/realms/a@b x,https://b.example:1/c y",
            [("http://[::1]:8080/realms/a@b", "x"), ("https://b.example:1/c", "y")],
        ),
    ],
)
def test_issuers_are_read_as_they_are_written(issuers: str, read: list[tuple[str, str]]) -> None:
    settings = Settings.load({"RELAY_OIDC_ISSUERS": issuers})
    assert [(one.url, one.audience) for one in settings.oidc_issuers] == read


@pytest.mark.parametrize("id_", ["a b", "a\tb", "a\u00a0b", "a\u2028b", "a+b"])
def test_an_id_that_no_checkpoint_could_be_signed_with_is_refused(id_: str) -> None:
    assert problems({"RELAY_AUDIT_KEYS": f"{id_}:{KEY}"}) == [
        'RELAY_AUDIT_KEYS: an id names its key in checkpoints, so it has no spaces and no "+" (C2SP signed-note)'
    ]
    assert Settings.load({"RELAY_ENCRYPTION_KEYS": f"{id_}:{KEY}"}).encryption_keys[0].id == id_


def test_every_audit_key_is_read_in_its_order() -> None:
    settings = Settings.load({"RELAY_AUDIT_KEYS": f"relay.example/2026:{KEY}, \u00e9t\u00e9:{OTHER_KEY}"})
    assert [(key.id, len(key.key)) for key in settings.audit_keys] == [
        ("relay.example/2026", 32),
        ("\u00e9t\u00e9", 32),
    ]


@pytest.mark.parametrize(
    "place",
    [
        "s3://bucket",
        "HTTPS://witness.example",
        "https://",
        "https:///checkpoints",
        "https://user@witness.example",
        "https://user:password@witness.example/checkpoints",
        "https://witness.example/#checkpoints",
        "https://witness.example/a b",
    ],
)
def test_a_place_that_takes_no_checkpoints_is_refused(place: str) -> None:
    assert problems({"RELAY_AUDIT_CHECKPOINTS": place}) == [
        "RELAY_AUDIT_CHECKPOINTS: should be a folder, or an https:// URL without user and fragment"
    ]


@pytest.mark.parametrize(
    "place", ["checkpoints", "/var/lib/relay check", "https://witness.example", "https://[::1]:8443/a@b?token=x"]
)
def test_checkpoints_go_to_a_folder_or_a_url(place: str) -> None:
    for environ in ({}, PRODUCTION):
        kept = Settings.load(environ | {"RELAY_AUDIT_CHECKPOINTS": place}).audit_checkpoints
        assert kept is not None
        assert kept.get_secret_value() == place


def test_with_tls_production_may_listen_on_the_network(tmp_path: Path) -> None:
    (tmp_path / "a.pem").touch()
    tls = dict.fromkeys(("RELAY_TLS_CERTIFICATE", "RELAY_TLS_KEY"), str(tmp_path / "a.pem"))
    assert not Settings.load(PRODUCTION | tls | {"RELAY_LISTEN": "0.0.0.0:443"}).listen.is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.8.8.8"])
def test_plaintext_is_for_loopback(host: str) -> None:
    assert Settings.load(PRODUCTION | {"RELAY_LISTEN": f"{host}:1"}).listen.is_loopback


def test_nothing_secret_is_shown() -> None:
    canary = "planted-secret"
    key = base64.b64encode((canary * 3).encode()[:32])
    settings = Settings.load(
        {
            "DATABASE_URL": DATABASE,
            "DATABASE_PUBLIC_URL": DATABASE,
            "REDIS_URL": f"redis://:{canary}@redis",
            "WEBHOOK_URL": "https://receiver.example",
            "ACTIONS_SIGNING_SECRET": canary * 2,
            "RELAY_ENCRYPTION_KEYS": f"k1:{key.decode()}",
            "RELAY_KEY_PEPPERS": f"p1:{key.decode()}",
            "RELAY_HASH_KEY": canary * 3,
            "RELAY_AUDIT_KEYS": f"a1:{key.decode()}",
            "RELAY_AUDIT_CHECKPOINTS": f"https://witness.example/?token={canary}",
        }
    )
    keys = {"encryption_keys", "key_peppers", "audit_keys"}
    shown = f"{settings!r} {settings} {settings.encryption_keys} {settings.model_dump_json(exclude=keys)}"
    assert canary not in shown
    assert key.decode() not in shown
    assert "k1" in shown


def test_nothing_secret_is_shown_when_it_is_refused() -> None:
    canary = "planted-secret"
    told = problems(
        {
            "DATABASE_URL": f"mysql://{canary}",
            "REDIS_URL": canary,
            "RELAY_ENCRYPTION_KEYS": f"k1:{canary}",
            "RELAY_KEY_PEPPERS": f"p1:{canary}",
            "RELAY_HASH_KEY": canary,
            "RELAY_AUDIT_KEYS": f"a1:{canary}",
            "RELAY_AUDIT_CHECKPOINTS": f"https://{canary}@witness.example",
            "ACTIONS_SIGNING_SECRET": canary,
        }
    )
    assert len(told) == 8
    assert canary not in "\n".join(told)


def test_overrides_win_over_the_environment() -> None:
    settings = Settings.load({"RELAY_LISTEN": "127.0.0.1:1"}, listen="127.0.0.1:2", http_listen=None)
    assert settings.listen.port == 2
    assert settings.http_listen.port == 8080
