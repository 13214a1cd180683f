"""The error of a program that cannot be compiled."""

from typing import Literal

from rudder.sae_models.errors import UserError

Reason = Literal["FIELD_INVALID", "FEATURE_UNKNOWN", "SITE_UNKNOWN", "ROW_LOCKED", "POLICY_FORBIDS"]
# So far below the largest fp32 that no sum over a residual overflows: the tokens of a batch share matrix products.
MAX_MAGNITUDE = 1e30


class ProgramError(UserError):
    """A program is invalid. `field` is the path of the field at fault, such as `program.sites[0].edits[2].row`."""

    def __init__(self, field: str, message: str, reason: Reason = "FIELD_INVALID") -> None:
        super().__init__(f"{field}: {message}")
        self.field, self.message, self.reason = field, message, reason


def require(condition: object, field: str, message: str, reason: Reason = "FIELD_INVALID") -> None:
    """Raise ProgramError unless `condition` holds."""
    if not condition:
        raise ProgramError(field, message, reason)


def number(value: float, field: str) -> float:
    """Return `value`. Raises ProgramError if it is not finite or too large for fp32 sums."""
    require(abs(value) <= MAX_MAGNITUDE, field, f"{value:g} is not a finite number of at most {MAX_MAGNITUDE:g}")
    return value
