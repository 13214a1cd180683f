"""From the contract's sampling parameters to the engine's."""

from typing import Any

from rudder.server.engine.adapter import SamplingParams
from rudder.v1 import inference_pb2

# Fields that mean the same and are named the same in vLLM; unset, they take vLLM's defaults.
SAME = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logprobs",
)  # fmt: skip


def sampling_of(sampling: inference_pb2.Sampling, choice: int, stream_interval: int) -> SamplingParams:
    """The parameters of one choice of a request that `limits.check` has passed. Choice i has seed + i."""
    given: dict[str, Any] = {name: getattr(sampling, name) for name in SAME if sampling.HasField(name)}
    if sampling.HasField("seed"):
        given["seed"] = sampling.seed + choice
    if stream_interval > 1:
        given["stream_interval"] = stream_interval
    return SamplingParams(
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        include_stop_str_in_output=sampling.include_stop,
        logit_bias=dict(sampling.logit_bias) or None,
        **given,
    )
