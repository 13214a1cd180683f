"""Convert the contract's sampling parameters to vLLM's."""

from typing import Any

from rudder.server.engine.adapter import SamplingParams, StructuredOutputsParams
from rudder.v1 import inference_pb2

# Fields with the same name and meaning in vLLM; unset ones take vLLM's defaults.
SHARED_FIELDS = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logprobs", "skip_special_tokens", "prompt_logprobs",
)  # fmt: skip


def sampling_of(sampling: inference_pb2.Sampling, choice: int, stream_interval: int) -> SamplingParams:
    """Return the parameters of one choice of a request that passed `limits.check`. Choice i has seed + i.

    Choice 0 alone has the log-probabilities of the prompt, which all share: computing them once for each would hold up
    every other stream.
    """
    values: dict[str, Any] = {name: getattr(sampling, name) for name in SHARED_FIELDS if sampling.HasField(name)}
    if choice:
        values.pop("prompt_logprobs", None)
    if sampling.HasField("seed"):
        values["seed"] = sampling.seed + choice
    if sampling.HasField("structured"):
        values["structured_outputs"] = structured_outputs(sampling.structured)
    if stream_interval > 1:
        values["stream_interval"] = stream_interval
    return SamplingParams(
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        include_stop_str_in_output=sampling.include_stop,
        logit_bias=dict(sampling.logit_bias) or None,
        bad_words=list(sampling.bad_words),
        allowed_token_ids=list(dict.fromkeys(sampling.allowed_token_ids)) or None,
        **values,
    )


def structured_outputs(structured: inference_pb2.StructuredOutput) -> StructuredOutputsParams:
    """Return vLLM's form of a structured output."""
    match structured.WhichOneof("structured"):
        case "json_schema":
            return StructuredOutputsParams(json=structured.json_schema)
        case "regex":
            return StructuredOutputsParams(regex=structured.regex)
        case "grammar":
            return StructuredOutputsParams(grammar=structured.grammar)
        case "choice":
            return StructuredOutputsParams(choice=list(structured.choice.texts))
    return StructuredOutputsParams(json_object=True)
