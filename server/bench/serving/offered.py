"""The load that servers are offered, and what a client records of it."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from rudder.server.bench.load import Load

Protocol = Literal["openai", "smg", "rudder"]
Programs = Literal["none", "one", "many"]
# Systems by name: the server that runs each, its protocol, and the programs of its requests.
SYSTEMS: dict[str, tuple[str, Protocol, Programs]] = {
    "vllm_openai": ("vllm_openai", "openai", "none"),
    "vllm_grpc": ("vllm_grpc", "smg", "none"),
    "rudder_idle": ("rudder", "rudder", "none"),
    "rudder_one_program": ("rudder", "rudder", "one"),
    "rudder_64_programs": ("rudder", "rudder", "many"),
    "rudder_policy_with_guards": ("rudder_policy", "rudder", "none"),
}
PROGRAMS = 64


class Objective(msgspec.Struct, frozen=True):
    """What a good request keeps: time to the first token, and mean time between tokens, in ms."""

    ttft_ms: float
    itl_ms: float


# A reader who waits, and one who reads along; on a CPU as on a GPU.
OBJECTIVES = {"relaxed": Objective(5000.0, 200.0), "strict": Objective(1000.0, 100.0)}


class Offered(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The load that each server is offered."""

    shape: Annotated[Literal["llama-100m", "llama-8b", "tiny"], Meta(description="shape of the random model")] = (
        "llama-100m"
    )
    streams: Annotated[tuple[int, ...], Meta(description="concurrent streams of each measurement: [64, 256]")] = (
        64,
        256,
    )
    requests: Annotated[int, Meta(ge=1, description="requests of a stream, one after the other")] = 1
    rounds: Annotated[int, Meta(ge=1, description="measurements of each system, by turns")] = 3
    prompt_tokens: Annotated[int, Meta(ge=1, description="tokens of a prompt")] = 32
    new_tokens: Annotated[int, Meta(ge=2, description="tokens to generate per request")] = 64
    open_loop: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="Poisson arrivals at this share of the requests a second that stock vLLM's server completes in"
            " a closed loop; 0: no open loop",
        ),
    ] = 0.7
    eager: Annotated[bool, Meta(description="do not compile the model")] = False
    systems: Annotated[tuple[str, ...], Meta(description="systems to measure, separated by commas; empty: all")] = ()

    def engine_load(self) -> Load:
        """Return the load by which the engines of all systems are sized."""
        return Load(
            shape=self.shape, requests=max(self.streams), prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens, programs=PROGRAMS, eager=self.eager, latents=4096,
        )  # fmt: skip


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a client process does. `rate`: requests a second of an open loop; 0: a closed loop of `streams`."""

    protocol: Protocol
    address: str
    model: str
    streams: int
    requests: int
    prompt_tokens: int
    new_tokens: int
    seed: int
    rate: float = 0.0
    programs: Programs = "none"
    site: str = ""


class Request(msgspec.Struct, frozen=True):
    """Times of a request's messages in seconds from the moment at which it was meant to be sent; `at`: that moment."""

    at: float
    messages: list[float]


class Recorded(msgspec.Struct, frozen=True):
    """What a client process measured: its requests, seconds from the first to the last, and what it took itself."""

    requests: list[Request]
    seconds: float
    cpu_seconds: float
    peak_mib: float
