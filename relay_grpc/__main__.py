"""`python -m relay_grpc` is the command `relay`."""

from relay_grpc.cli import main

main()
