"""What a development start keeps beside its database, readable by its owner alone: key material and the first API keys.

In production both come from outside: key material from the environment, API keys from `relay bootstrap`.
"""

import base64
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from pydantic import SecretStr

from relay_grpc.setting_types import NamedKey
from relay_grpc.settings import Settings

KEY_MATERIAL = "key-material.env"
CREDENTIALS = "credentials.env"
CHECKPOINTS = "checkpoints"  # the audit log's, outside the database
POSTGRES = "postgres"  # the folder of the embedded server


def new_key_material() -> dict[str, str]:
    """Fresh values for the settings that hold keys."""
    return {
        "RELAY_ENCRYPTION_KEYS": _named_key(),
        "RELAY_KEY_PEPPERS": _named_key(),
        "RELAY_HASH_KEY": secrets.token_urlsafe(32),
        "RELAY_AUDIT_KEYS": _named_key(),
    }


def _named_key() -> str:
    return f"k{secrets.token_hex(3)}:{base64.b64encode(secrets.token_bytes(32)).decode()}"


class DataFolderError(Exception):
    """The data folder can't be used; the text tells the operator why."""


def with_key_material(settings: Settings) -> Settings:
    """The settings with the key material they lack taken from the data folder, made there on the first start.

    Raises DataFolderError.
    """
    path = settings.data_dir / KEY_MATERIAL
    try:
        kept = read(path)
        if kept is None:
            kept = new_key_material()
            write(path, kept)
        elif missing := {"RELAY_KEY_PEPPERS", "RELAY_AUDIT_KEYS"} - kept.keys():  # the folder is older than these
            kept |= {name: value for name, value in new_key_material().items() if name in missing}
            write(path, kept)
        encryption_key, hash_key = NamedKey.parse(kept["RELAY_ENCRYPTION_KEYS"]), kept["RELAY_HASH_KEY"]
        pepper, audit_key = NamedKey.parse(kept["RELAY_KEY_PEPPERS"]), NamedKey.parse(kept["RELAY_AUDIT_KEYS"])
    except OSError as error:
        raise DataFolderError(f"can't use {error.filename or path}: {error.strerror}") from error
    except (KeyError, ValueError) as error:
        raise DataFolderError(f"{path} is damaged, and secrets can't be read without it: restore it") from error
    return settings.model_copy(
        update={
            "encryption_keys": settings.encryption_keys or (encryption_key,),
            "key_peppers": settings.key_peppers or (pepper,),
            "hash_key": settings.hash_key or SecretStr(hash_key),
            "audit_keys": settings.audit_keys or (audit_key,),
            "audit_checkpoints": settings.audit_checkpoints or SecretStr(str(settings.data_dir / CHECKPOINTS)),
        }
    )


def read(path: Path) -> dict[str, str] | None:
    """The NAME=VALUE lines of a file; None: there is no such file."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return None
    return dict(line.split("=", 1) for line in lines if "=" in line)


def write(path: Path, values: Mapping[str, str]) -> None:
    """Writes NAME=VALUE lines, all or nothing, readable by the owner alone from the first byte on."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = path.with_suffix(".new")
    scratch.unlink(missing_ok=True)
    with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.writelines(f"{name}={value}\n" for name, value in values.items())
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
