"""The two distributions as a user installs them: wheels, together, in a clean environment."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parent.parent.parent


def run(*words: str | Path, cwd: Path) -> str:
    return subprocess.run([str(word) for word in words], cwd=cwd, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds what the wheels need, hash-checked, and the two wheels."""
    folder = tmp_path_factory.mktemp("wheels")
    for project in (ROOT / "clients/python", ROOT):
        run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "dist", cwd=project)
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    inside = folder / "venv/bin/python"
    run(inside, "-m", "pip", "install", "-q", "--require-hashes", "-r", ROOT / "requirements/run.lock", cwd=folder)
    # No --no-deps: pip must find that the wheels fit each other and the locked dependencies.
    run(inside, "-m", "pip", "install", "-q", "--no-index", *(folder / "dist").glob("*.whl"), cwd=folder)
    return inside


def test_the_wheels_do_the_main_job(python: Path, tmp_path: Path) -> None:
    said = run(
        python.with_name("relay"),
        "demo",
        "--once",
        "--data-dir",
        tmp_path / "data",
        "--listen",
        "127.0.0.1:0",
        "--http-listen",
        "127.0.0.1:0",
        cwd=tmp_path,
    )
    assert "First action delivered and verified" in said


def test_the_client_needs_nothing_of_the_server(python: Path, tmp_path: Path) -> None:
    code = "import sys, relay.client, relay.aio; print(any(name.startswith('relay_grpc') for name in sys.modules))"
    assert run(python, "-c", code, cwd=tmp_path).strip() == "False"


def test_both_are_typed(python: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.resources import files; "
        "print(files('relay').joinpath('py.typed').is_file(), files('relay_grpc').joinpath('py.typed').is_file())"
    )
    assert run(python, "-c", code, cwd=tmp_path).strip() == "True True"
