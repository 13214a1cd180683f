"""The text of an output begins where the text of its prompt ends, wherever the prompt is cut."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import detokenizer

from rudder.sae_models import PRETRAINED
from rudder.server.config import Config, Engine
from rudder.server.engine.adapter import (
    Detokenizer,
    StructuredOutputsParams,
    add_request,
    answer_text,
    engine_args,
)
from rudder.server.program.layout import Layout

SHIPPED: Any = AutoTokenizer.from_pretrained(str(PRETRAINED / "textbook-lm"))


def byte_fallback() -> Any:
    """A tokenizer with a token per byte, and a leading space that decoding strips, as of Llama 2."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(97, 123))]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


TOKENIZERS = {"shipped": SHIPPED, "byte fallback": byte_fallback()}
MULTIBYTE = st.lists(
    st.one_of(st.text(max_size=3), st.sampled_from(["\U0001f336", "\u20ac", "\u00e9", "\u4e2d\u6587", " ", "word "])),
    min_size=1,
    max_size=8,
).map("".join)


def stream(tokenizer: Any, prompt: list[int], output: list[int], **options: Any) -> list[str]:
    """Return the text of each token of an output, as a client receives it."""
    request: Any = SimpleNamespace(
        request_id="r", prompt_token_ids=prompt, sampling_params=SamplingParams(**options), prompt_embeds=None
    )
    detokenizer = Detokenizer(tokenizer, request)
    texts = []
    for token in output:
        detokenizer.update([token], False)
        texts.append(detokenizer.get_next_output_text(False, True))
    return texts


def test_prompt_that_ends_inside_a_character_stays_out_of_the_output() -> None:
    prompt = [1, 41, 447, 80, 977, 222, 5643, 236]
    assert SHIPPED.decode(prompt, skip_special_tokens=True) == "Hello world \ufffd"
    assert stream(SHIPPED, prompt, [116]) == ["\U0001f336"]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=MULTIBYTE, length=st.sampled_from([1, 2, 100]), data=st.data())
def test_output_is_what_the_whole_text_has_beyond_the_prompt(
    name: str, text: str, length: int, data: st.DataObject
) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("www " * length + text.replace("\ufffd", "") + "end", add_special_tokens=False)
    cut = len(ids) - data.draw(st.integers(1, min(len(ids) - 1, 40)))
    prompt, output = ids[:cut], ids[cut:]
    # The character that the prompt began belongs to the output, which completes it.
    before = next(text for k in range(4) if not (text := tokenizer.decode(ids[: cut - k])).endswith("\ufffd"))
    assert "".join(stream(tokenizer, prompt, output)) == tokenizer.decode(ids)[len(before) :]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=st.lists(st.integers(2, 280), min_size=1, max_size=30), output=st.lists(st.integers(2, 280), max_size=8))
def test_no_text_of_the_prompt_is_in_the_output_whatever_the_tokens(
    name: str, prompt: list[int], output: list[int]
) -> None:
    tokenizer = TOKENIZERS[name]
    marked = tokenizer.encode("wqzqw", add_special_tokens=False)
    if not set(marked) <= {*output}:
        assert "wqzqw" not in "".join(stream(tokenizer, marked + prompt, output))


def test_bytes_that_never_make_a_character_are_not_repeated() -> None:
    byte = SHIPPED.convert_tokens_to_ids("\u0122")  # the byte 0x80 alone
    letter = SHIPPED.encode("A", add_special_tokens=False)
    assert stream(SHIPPED, [*SHIPPED.encode("Hello"), byte, byte], letter) == ["A"]


def test_special_tokens_between_prompt_and_output() -> None:
    prompt = [*SHIPPED.encode("Hello \U0001f336")[:-1], 0]
    for skip in (True, False):
        assert "Hello" not in "".join(stream(SHIPPED, prompt, [116, 41], skip_special_tokens=skip))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=MULTIBYTE, data=st.data())
def test_text_of_an_answer_is_what_was_streamed_with_what_waited_for_a_stop_string(
    name: str, text: str, data: st.DataObject
) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("www " + text.replace("\ufffd", "") + "end", add_special_tokens=False)
    cut = data.draw(st.integers(1, len(ids) - 1))
    prompt, output = ids[:cut], ids[cut : data.draw(st.integers(cut, len(ids)))]
    with pytest.MonkeyPatch.context() as patch:
        # As `start_llm` does.
        patch.setattr(detokenizer, "FastIncrementalDetokenizer", Detokenizer)
        whole = answer_text(tokenizer, prompt, SamplingParams(stop=["never in it"]), output)
    assert whole == "".join(stream(tokenizer, prompt, output))
    assert whole.startswith("".join(stream(tokenizer, prompt, output, stop=["never in it"])))


def arguments(**engine: Any) -> Any:
    return engine_args(Config(engine=Engine(**engine)), Layout(("layers.0.resid_post",)))


def test_engine_settings_reach_vllm() -> None:
    settings = {"gpu_memory_utilization": 0.5, "quantization": "fp8", "revision": "abc", "seed": 7}
    result = arguments(**settings)
    assert {name: getattr(result, name) for name in settings} == settings
    assert result.tokenizer_revision == "abc"


def test_unset_engine_settings_are_those_of_vllm() -> None:
    result = arguments()
    for name in ("gpu_memory_utilization", "quantization", "revision", "tokenizer_revision", "seed"):
        assert getattr(result, name) == getattr(AsyncEngineArgs, name), name


class RefusingEngine:
    """Raises the same error for every request."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def add_request(self, *_: object) -> None:
        raise self.error


@pytest.mark.parametrize("error", [ValueError("bad grammar"), VLLMValidationError("bad grammar")])
async def test_grammar_that_does_not_compile_is_the_clients_fault(error: Exception) -> None:
    llm: Any = RefusingEngine(error)
    sampling = SamplingParams(structured_outputs=StructuredOutputsParams(regex="("))
    with pytest.raises(VLLMValidationError) as caught:
        await add_request(llm, "r", (1,), "", sampling)
    assert caught.value.parameter == "structured_outputs"
    # Without a grammar, a ValueError is a bug of the server.
    with pytest.raises(type(error)) as other:
        await add_request(llm, "r", (1,), "", SamplingParams())
    assert other.value is error
