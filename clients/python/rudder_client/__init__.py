"""Client of the Rudder server: steered generation, and the SAE features of a model.

from rudder_client import Client, Program

with Client("localhost:50051") as client:
    calm = Program().at("layers.2.resid_post").clamp(feature=12, to=-2, unit="residual")
    for chunk in client.generate("The virus", steer=calm, max_tokens=50):
        print(chunk.text, end="", flush=True)
"""

from rudder_client.aio import AsyncClient, AsyncStream
from rudder_client.channel import REPLICAS
from rudder_client.client import Client, Stream
from rudder_client.errors import FieldViolation, RudderError
from rudder_client.program import Feature, Probe, Program, Vector
from rudder_client.requests import Chat, Message, Report, Sampling, Structured, Topic
from rudder_client.results import (
    Activation,
    AppliedPolicy,
    Attestation,
    Chunk,
    Completion,
    EditCount,
    FeatureName,
    GateCount,
    Inspection,
    Logprobs,
    PooledActivation,
    Refusal,
    ResolvedTopic,
    Token,
    TopicCandidate,
    TopicRow,
    Usage,
    Verdict,
)

__all__ = [
    "REPLICAS",
    "Activation",
    "AppliedPolicy",
    "AsyncClient",
    "AsyncStream",
    "Attestation",
    "Chat",
    "Chunk",
    "Client",
    "Completion",
    "EditCount",
    "Feature",
    "FeatureName",
    "FieldViolation",
    "GateCount",
    "Inspection",
    "Logprobs",
    "Message",
    "PooledActivation",
    "Probe",
    "Program",
    "Refusal",
    "Report",
    "ResolvedTopic",
    "RudderError",
    "Sampling",
    "Stream",
    "Structured",
    "Token",
    "Topic",
    "TopicCandidate",
    "TopicRow",
    "Usage",
    "Vector",
    "Verdict",
]
