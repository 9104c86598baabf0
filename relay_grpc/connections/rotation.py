"""The RPC of ConnectionsService about secrets."""

import json
from datetime import timedelta
from typing import Any
from uuid import UUID

from relay.v1 import connections_pb2

from relay_grpc import errors, failpoints
from relay_grpc.audit.recorder import Recorder
from relay_grpc.call import Call
from relay_grpc.connections import changes, messages, secret_store, store
from relay_grpc.connections.new_keys import new_key
from relay_grpc.connections.secrets import Vault

DEFAULT_OVERLAP = timedelta(hours=24)
MOST_KEYS = 10  # that sign at one time: a delivery carries a signature of each


class Rotation:
    """At every moment of a rotation each delivery is signed by a secret that its receiver knows or is about to."""

    def __init__(self, recorder: Recorder, vault: Vault) -> None:
        self._recorder = recorder
        self._vault = vault

    async def RotateSecret(self, request: Any, call: Call) -> connections_pb2.Connection:
        id_ = UUID(request.id)
        call.target = f"connections/{id_}"
        overlap = request.overlap.ToTimedelta() if request.HasField("overlap") else DEFAULT_OVERLAP
        async with self._recorder.change(call) as (connection, event):
            row = await store.lock(connection, call.workspace_id, id_)
            event.provider = row["provider"]
            key = new_key(request.signature_scheme, request.signing_secret, otherwise=changes.newest_scheme(row))
            changes.check_body_signature(json.loads(row["configuration"]), key.scheme, "signature_scheme")
            if overlap and len(json.loads(row["signing_keys"])) >= MOST_KEYS:
                raise errors.FailedPrecondition(
                    f"{MOST_KEYS} secrets of this connection sign already: rotate with an overlap of 0, or wait",
                    reason="TOO_MANY_SIGNING_KEYS",
                )
            newest = await secret_store.insert(
                connection,
                self._vault,
                workspace_id=call.workspace_id,
                connection_id=id_,
                kind=key.scheme,
                secret=key.raw,
            )
            failpoints.reach("secret.rotating")
            await secret_store.end_others(connection, call.workspace_id, id_, newest, overlap)
            await store.touch(connection, call.workspace_id, id_)
            row = await store.get(connection, call.workspace_id, id_)
        return messages.connection(row, signing_secret=key.told)
