"""Parts that the answers of chats and completions share: usage, the reason of the end, log-probabilities."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rudder.sae_models.token_text import decoder_of
from rudder.server.service.record import CallRecord
from rudder.server.service.serving import Serving
from rudder.v1 import inference_pb2

Choice = inference_pb2.ChoiceDelta | inference_pb2.Choice
REASONS: Mapping[int, str] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    # OpenAI has no name for it: what was generated is whole.
    inference_pb2.FINISH_REASON_REPETITION: "stop",
    inference_pb2.FINISH_REASON_REFUSED: "content_filter",
}


def finish_reason(choice: Choice) -> str | None:
    """Return OpenAI's reason why a choice ended; None while it has not, `error` if the engine failed on it."""
    return REASONS.get(choice.finish_reason, "error") if choice.finish_reason else None


def stop_reason(choice: Choice) -> str | int | None:
    """Return the stop string or stop token id that ended a choice."""
    match choice.WhichOneof("stop"):
        case "stop_string":
            return choice.stop_string
        case "stop_token_id":
            return choice.stop_token_id
    return None


def usage_of(record: CallRecord) -> dict[str, Any]:
    """Return what a call used so far: its prompt once, and the tokens of all choices."""
    generated = sum(choice.generated_tokens for choice in record.choices)
    cached = max((choice.cached_tokens for choice in record.choices), default=0)
    return {
        "prompt_tokens": record.prompt_tokens,
        "total_tokens": record.prompt_tokens + generated,
        "completion_tokens": generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def choice_usage(record: CallRecord, index: int, begun: bool = True) -> dict[str, Any]:
    """Return what a choice used so far, as vLLM says it with every chunk; nothing generated before it has `begun`."""
    generated = record.choices[index].generated_tokens if begun else 0
    total = record.prompt_tokens + generated
    return {"prompt_tokens": record.prompt_tokens, "total_tokens": total, "completion_tokens": generated}


class TokenTexts:
    """Texts of tokens by themselves, each decoded once: at most one for each token id of the model."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}

    async def know(self, serving: Serving, record: CallRecord, ids: Iterable[int]) -> None:
        """Decode those of these tokens that are not known yet."""
        missing = sorted({*ids} - self.texts.keys())
        if missing:

            def work(tokenizer: Any) -> list[str]:
                decode = decoder_of(tokenizer)
                return [decode([token]) for token in missing]

            texts = await serving.in_tokenizer_thread(record.caller, len(missing), work)
            self.texts.update(zip(missing, texts, strict=True))

    def entry(self, token: int, value: float) -> dict[str, Any]:
        """Return a token with its log-probability, as chats have it."""
        text = self.texts[token]
        return {"token": text, "logprob": bounded(value), "bytes": list(text.encode())}


def bounded(value: float) -> float:
    """Return a log-probability that JSON can hold, as vLLM bounds it."""
    return max(value, -9999.0)


def rows(choice: Choice) -> list[tuple[int, float, Sequence[tuple[int, float]]]]:
    """Return for each token its id, its log-probability and the alternatives."""
    columns = choice.logprobs
    width = columns.width
    pairs = list(zip(columns.alternative_ids, columns.alternatives, strict=True))
    alternatives = [pairs[i * width : (i + 1) * width] for i in range(len(columns.chosen))]
    return list(zip(choice.token_ids, columns.chosen, alternatives, strict=False))


def tokens_of(choice: Choice) -> Iterable[int]:
    """Return the ids of all tokens whose log-probabilities a choice has."""
    return (*choice.token_ids, *choice.logprobs.alternative_ids)


def chat_logprobs(choice: Choice, texts: TokenTexts) -> dict[str, Any]:
    """Return log-probabilities as chats have them."""
    content = [
        texts.entry(token, value) | {"top_logprobs": [texts.entry(*alternative) for alternative in alternatives]}
        for token, value, alternatives in rows(choice)
    ]
    return {"content": content}


def completion_logprobs(choice: Choice, texts: TokenTexts, offset: int) -> dict[str, Any]:
    """Return log-probabilities as completions have them; `offset`: characters of the choice's tokens before these."""
    result: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for token, value, alternatives in rows(choice):
        text = texts.texts[token]
        result["text_offset"].append(offset)
        result["token_logprobs"].append(bounded(value))
        result["tokens"].append(text)
        named = [*alternatives] if any(token == other for other, _ in alternatives) else [(token, value), *alternatives]
        result["top_logprobs"].append({texts.texts[other]: bounded(chance) for other, chance in named})
        offset += len(text)
    return result
