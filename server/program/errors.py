"""What is wrong with a program, by field."""

from typing import Literal

from rudder.sae_models.errors import UserError

Reason = Literal["FIELD_INVALID", "FEATURE_UNKNOWN", "SITE_UNKNOWN", "ROW_LOCKED"]
# Far enough from the end of fp32 that no sum over a residual overflows: a batch's tokens share their matrix products.
LARGEST = 1e30


class ProgramError(UserError):
    """`field` is the path of the offending field, such as `program.sites[0].edits[2].row.feature.index`."""

    def __init__(self, field: str, message: str, reason: Reason = "FIELD_INVALID") -> None:
        super().__init__(f"{field}: {message}")
        self.field, self.message, self.reason = field, message, reason


def require(condition: object, field: str, message: str, reason: Reason = "FIELD_INVALID") -> None:
    """Raise ProgramError unless `condition` holds."""
    if not condition:
        raise ProgramError(field, message, reason)


def number(value: float, field: str) -> float:
    """`value`, if it is finite and small enough for fp32 sums; ProgramError otherwise."""
    require(abs(value) <= LARGEST, field, f"{value:g} is not a finite number of at most {LARGEST:g}")
    return value
