"""Relay: the door a backend goes through before it does something it can't take back."""
