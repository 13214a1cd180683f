"""The artifact from trainer to server."""
