"""Generates the Python stubs of clients/python from proto/ (run by `make generate` and compared by `make lint`).

usage: python tools/generate.py [TARGET]

TARGET defaults to clients/python/src. buf compiles, protoc's Python plugins write; the one vendored dependency
without a package of its own, buf/validate, goes under relay/_vendor so that the distribution owns one top level name.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENDORED = re.compile(r"^from buf\.validate import", re.MULTILINE)


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True)


def generate(target: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        image, output = Path(scratch, "image.binpb"), Path(scratch, "out")
        output.mkdir()
        run("buf", "build", "-o", image)
        sources = sorted(path.relative_to(ROOT / "proto") for path in (ROOT / "proto").rglob("*.proto"))
        protoc = (sys.executable, "-m", "grpc_tools.protoc", f"--descriptor_set_in={image}")
        plugins = (f"--python_out={output}", f"--pyi_out={output}")
        run(*protoc, *plugins, "buf/validate/validate.proto")
        run(*protoc, *plugins, f"--grpc_python_out={output}", *sources)
        for grpc_stub in output.rglob("*_pb2_grpc.py"):
            if b"ServiceStub" not in grpc_stub.read_bytes():
                grpc_stub.unlink()  # policy and errors declare no service
        for path in output.rglob("*_pb2*.py*"):
            path.write_text(VENDORED.sub("from relay._vendor.buf.validate import", path.read_text()))
        for source, package in (("relay/v1", "relay/v1"), ("buf", "relay/_vendor/buf")):
            destination = target / package
            for stale in destination.rglob("*_pb2*.py*"):
                stale.unlink()
            shutil.copytree(output / source, destination, dirs_exist_ok=True)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "clients/python/src")
