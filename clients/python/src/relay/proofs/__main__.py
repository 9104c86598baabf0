"""`python -m relay.proofs`: verifies an export without asking anybody."""

import argparse
import sys
from pathlib import Path

from relay.proofs.files import verify_file
from relay.proofs.tree import ProofError


def main() -> int:
    """Exit codes: 0 proven, 1 not proven, 2 wrong arguments or a file that can't be read."""
    parser = argparse.ArgumentParser(prog="python -m relay.proofs", description="Verify an export, offline.")
    parser.add_argument("export", help="the JSONL export; - for standard input")
    for option, metavar, of, text in (
        ("--key", "VKEY", str, "a public key of the log's operator"),
        ("--checkpoint", "FILE", Path, "a checkpoint that was kept from earlier"),
        ("--consistency", "FILE", Path, "the answer of GetConsistencyProof, as JSON"),
    ):
        needed = option == "--key"
        parser.add_argument(
            option,
            action="append",
            default=None if needed else [],
            required=needed,
            type=of,
            metavar=metavar,
            help=text,
        )
    asked = parser.parse_args()
    try:
        report = verify_file(asked.export, asked.key, asked.checkpoint, asked.consistency)
    except ProofError as error:
        print(f"NOT PROVEN: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except OSError as error:
        print(f"can't read {error.filename or asked.export}: {error.strerror}", file=sys.stderr)  # noqa: T201
        return 2
    print("\n".join(report.lines()))  # noqa: T201
    return 1 if report.unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
