"""The house rules that no other tool checks (run by `make lint`). Exits 1 after printing what is wrong, else 0."""

import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from filecmp import dircmp
from pathlib import Path

from document import REFERENCE, reference
from generate import ROOT, generate

STUBS = ROOT / "clients/python/src"
ABORTS_IN = "relay_grpc/interceptors/status.py"
ENVIRONMENT_IN = "relay_grpc/settings.py"
# Lock files name packages and hashes; where to get them is up to whoever installs.
ADDRESS = re.compile(r"https?://|--(extra-)?index-url|--find-links")


def problems() -> Iterator[str]:
    yield from stale_stubs()
    yield from breaking_changes()
    if (ROOT / REFERENCE).read_text() != reference():
        yield f"{REFERENCE} is not what the sources say: run `make generate`"
    for path in sorted((ROOT / "relay_grpc").rglob("*.py")):
        yield from misplaced(path)
    for path in sorted((ROOT / "requirements").glob("*.lock")):
        if ADDRESS.search(path.read_text()):
            yield f"{path.relative_to(ROOT)} holds the address of a package index: run `make lock`"


def stale_stubs() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        for package in ("relay/v1", "relay/_vendor/buf/validate"):
            compared = dircmp(STUBS / package, Path(scratch, package), ignore=["__init__.py", "__pycache__"])
            for name in (*compared.left_only, *compared.right_only, *compared.diff_files):
                yield f"{package}/{name} is not what proto/ generates: run `make generate`"


def breaking_changes() -> Iterator[str]:
    """Against the last release, once there is one."""
    tag = subprocess.run(
        ["git", "describe", "--tags", "--abbrev=0", "--match=v*"], cwd=ROOT, capture_output=True, text=True
    )
    if tag.returncode == 0:
        against = f".git#tag={tag.stdout.strip()},subdir=proto"
        done = subprocess.run(
            ["buf", "breaking", "proto", "--against", against], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            yield f"the API breaks that of {tag.stdout.strip()}:\n{done.stdout}{done.stderr}"


def misplaced(path: Path) -> Iterator[str]:
    """One place ends calls, and one reads the environment."""
    name = path.relative_to(ROOT).as_posix()
    tree = ast.parse(path.read_text())
    # That of a transport takes nothing, and is another thing.
    plain = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call) and not (node.args or node.keywords)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        if node.attr in ("abort", "abort_with_status") and node not in plain and name != ABORTS_IN:
            yield f"{name}:{node.lineno}: only {ABORTS_IN} ends a call; raise an error of relay_grpc.errors"
        if node.attr in ("environ", "getenv") and name != ENVIRONMENT_IN:
            yield f"{name}:{node.lineno}: only {ENVIRONMENT_IN} reads the environment"


if __name__ == "__main__":
    found = list(problems())
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(bool(found))
