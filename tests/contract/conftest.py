from tests.rpc.conftest import wire as wire
