"""The .proto says which methods are not built yet, and the server says the same."""

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet, ServiceDescriptorProto

from relay_grpc.call import Method
from tests.contract.requests import fitting
from tests.rpc.wire import METHODS, Wire

ROOT = Path(__file__).parents[2]
SERVICE = FileDescriptorProto.SERVICE_FIELD_NUMBER
METHOD = ServiceDescriptorProto.METHOD_FIELD_NUMBER


@pytest.fixture(scope="module")
def comments() -> dict[str, str]:
    """What stands above each method, by its name, in one line."""
    buf = Path(sys.executable).with_name("buf")
    built = subprocess.run(
        [buf, "build", "--as-file-descriptor-set", "-o", "-"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    found = {}
    for file in FileDescriptorSet.FromString(built.stdout).file:
        texts = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
        for i, service in enumerate(file.service):
            for j, method in enumerate(service.method):
                found[f"{service.name}.{method.name}"] = " ".join(texts[SERVICE, i, METHOD, j].split())
    return found


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
async def test_a_method_that_is_not_built_says_so_in_its_comment_and_in_its_answer(
    wire: Wire, comments: dict[str, str], method: Method
) -> None:
    answer = await wire.call(method, fitting(method.input_type.DESCRIPTOR))
    assert ("Not built yet: UNIMPLEMENTED." in comments[method.name]) == (answer.code == "UNIMPLEMENTED")
    if answer.code == "UNIMPLEMENTED":
        assert answer.reason == "METHOD_UNIMPLEMENTED"
        assert method.name in answer.text
