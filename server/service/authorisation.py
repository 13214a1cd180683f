"""What a request's fields need besides the role of its method."""

from rudder.server.caller import Caller
from rudder.server.identity.roles import require_role
from rudder.v1 import inference_pb2, program_pb2

Request = inference_pb2.GenerateRequest | inference_pb2.CompleteRequest | inference_pb2.InspectRequest
RAW_ROWS = ("vector", "probe")


def authorise_fields(caller: Caller, request: Request) -> None:
    """Raise CredentialError ROLE_MISSING, which names the field.

    A program of the caller's own needs `steer`, and vectors and probes in it `raw`; a report needs `observe`, and
    probes in it `raw`. Named programs are the operator's: they need no role but the method's.
    """
    if request.steering.WhichOneof("steering") == "program":
        require_role(caller, "steer", "steering.program")
        if is_raw(request.steering.program):
            require_role(caller, "raw", "steering.program")
    if request.report.features or request.report.top_k:
        require_role(caller, "observe", "report")
    if any(feature.row.WhichOneof("row") in RAW_ROWS for feature in request.report.features):
        require_role(caller, "raw", "report.features")


def is_raw(program: program_pb2.Program) -> bool:
    """Return whether a program has a vector or a probe, in an edit, a blend or its gate."""
    edits = [edit.row for site in program.sites for edit in site.edits]
    gates = [trigger.row for trigger in program.gate.any_of] + [program.gate.sequence.score]
    blends = [site.blend.WhichOneof("target") for site in program.sites]
    return "vector" in blends or any(row.WhichOneof("row") in RAW_ROWS for row in (*edits, *gates))
