"""The command `relay`."""


def main() -> None:
    raise SystemExit("not yet")
