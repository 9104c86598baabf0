"""Relay's client for Python: `relay.client` blocks, `relay.aio` awaits, `relay.v1` holds the generated stubs."""
