"""Proofs about Relay's audit log, checked offline: no server is asked, and nothing else of Relay's is imported.

A log is a Merkle tree (RFC 6962, section 2.1) over events; its size and root are signed as a C2SP tlog-checkpoint. Each
leaf is the canonical JSON (RFC 8785) of what is proven of an event. Values that can be erased are in it as commitments,
SHA-256 over a salt of 16 bytes and the value, so that a log without them still verifies.
"""

from relay.proofs.exports import Report, verify_export
from relay.proofs.files import verify_file
from relay.proofs.leaves import canonical, commitment, verify_event
from relay.proofs.notes import Checkpoint, VerifierKey, open_checkpoint
from relay.proofs.tree import (
    EMPTY_ROOT,
    ProofError,
    RootOf,
    leaf_hash,
    node_hash,
    subtrees,
    verify_consistency,
    verify_inclusion,
)

__all__ = [
    "EMPTY_ROOT",
    "Checkpoint",
    "ProofError",
    "Report",
    "RootOf",
    "VerifierKey",
    "canonical",
    "commitment",
    "leaf_hash",
    "node_hash",
    "open_checkpoint",
    "subtrees",
    "verify_consistency",
    "verify_event",
    "verify_export",
    "verify_file",
    "verify_inclusion",
]
