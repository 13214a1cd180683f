"""The attestation of a choice: what ran, as the worker counted it, never echoed from the request."""

from rudder.server.service.record import CallRecord, ChoiceRecord
from rudder.v1 import inference_pb2


def attestation_of(call: CallRecord, choice: ChoiceRecord, engine_epoch: str) -> inference_pb2.Attestation:
    """Convert the record of a finished choice to an Attestation."""
    return inference_pb2.Attestation(
        program_digest=call.program_digest,
        policy_digest=call.policy_digest,
        edits=[inference_pb2.EditCount(**edit._asdict()) for edit in choice.edits],
        tokens_seen=choice.tokens_seen,
        engine_epoch=engine_epoch,
        gates=[inference_pb2.GateCount(**gate._asdict()) for gate in choice.gates],
        request_id=call.request_id,
        topic=call.topic,
    )
