"""Why credentials were not accepted."""


class CredentialError(Exception):
    """Credentials were not accepted. The text never quotes them; `reason` is a key of `service.errors.REASONS`."""

    def __init__(self, message: str, reason: str = "UNAUTHENTICATED") -> None:
        super().__init__(message)
        self.reason = reason
