"""The tokenizer's threads are shared fairly, and a text that must be too long is refused before it is tokenised."""

import asyncio
import threading
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rudder.sae_models import PRETRAINED
from rudder.server.service.tokenizing import LONG_TEXT_CHARS, Lane, Tokenizers, max_chars_per_token

SHIPPED = AutoTokenizer.from_pretrained(PRETRAINED / "textbook-lm")


async def test_callers_take_turns_whatever_each_has_submitted() -> None:
    lane, order, gate = Lane(lambda: None, 1, "test"), [], threading.Event()
    first = asyncio.create_task(lane.run("a", lambda _: gate.wait()))
    await asyncio.sleep(0)

    def submit(caller: str, number: int) -> "asyncio.Task[None]":
        return asyncio.create_task(lane.run(caller, lambda _: order.append((caller, number))))

    tasks = [submit("a", i) for i in range(50)] + [submit("b", i) for i in range(3)] + [submit("c", 0)]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.wait_for(asyncio.gather(first, *tasks), 10)
    assert len(order) == 54
    assert order.index(("b", 0)) <= 2
    assert order.index(("c", 0)) <= 3
    assert order.index(("b", 2)) <= 7
    assert lane.free == 1


@pytest.mark.parametrize("cancelled", range(4))
async def test_cancelled_callers_leave_the_lane_usable(cancelled: int) -> None:
    lane, gate = Lane(lambda: None, 1, "test"), threading.Event()
    tasks = [asyncio.create_task(lane.run(str(i), lambda _: gate.wait(5))) for i in range(4)]
    await asyncio.sleep(0.01)
    tasks[cancelled].cancel()
    gate.set()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
    assert [isinstance(result, asyncio.CancelledError) for result in results] == [i == cancelled for i in range(4)]
    assert await asyncio.wait_for(lane.run("x", lambda _: 7), 5) == 7
    await asyncio.sleep(0)
    assert (lane.free, dict(lane.waiting)) == (1, {})


async def test_error_of_the_work_is_raised_and_frees_the_thread() -> None:
    lane = Lane(lambda: None, 1, "test")
    with pytest.raises(ZeroDivisionError):
        await lane.run("a", lambda _: 1 / 0)
    assert await asyncio.wait_for(lane.run("a", lambda _: 7), 5) == 7


async def test_short_text_does_not_wait_for_long_ones() -> None:
    tokenizers, gate = Tokenizers(lambda: None), threading.Event()
    long = [asyncio.create_task(tokenizers.run("a", LONG_TEXT_CHARS + 1, lambda _: gate.wait(10))) for _ in range(8)]
    await asyncio.sleep(0.01)
    assert await asyncio.wait_for(tokenizers.run("b", 20, lambda _: 7), 5) == 7
    assert not any(task.done() for task in long)
    gate.set()
    await asyncio.gather(*long)


async def test_threads_never_share_a_tokenizer() -> None:
    lane, seen, busy = Lane(lambda: SHIPPED, 3, "test"), [], set()

    def work(tokenizer: Any) -> list[int]:
        assert id(tokenizer) not in busy
        busy.add(id(tokenizer))
        seen.append(id(tokenizer))
        ids: list[int] = tokenizer.encode("The cells of the body " * 40)
        busy.remove(id(tokenizer))
        return ids

    results = await asyncio.gather(*(lane.run(str(i % 5), work) for i in range(60)))
    assert all(result == SHIPPED.encode("The cells of the body " * 40) for result in results)
    assert id(SHIPPED) not in seen


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=200) | st.sampled_from(["<|bos|>", " ", "\n", "é", "🌶"]).map(lambda part: part * 100))
def test_no_text_has_fewer_tokens_than_the_bound_says(text: str) -> None:
    bound = max_chars_per_token(SHIPPED)
    assert bound < inf
    assert len(text) <= bound * len(SHIPPED.encode(text, add_special_tokens=False))


def tokenizer_of(model: Any, normalizer: Any = None, pre_tokenizer: Any = None, **added: Any) -> Any:
    backend = Tokenizer(model)
    if normalizer:
        backend.normalizer = normalizer
    if pre_tokenizer:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    result = PreTrainedTokenizerFast(tokenizer_object=backend)
    if added:
        from tokenizers import AddedToken

        result.add_tokens([AddedToken("<x>", **added)])
    return result


BYTES = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


def byte_level() -> models.BPE:
    return models.BPE(vocab=BYTES, merges=[])


def test_bound_of_known_kinds_of_tokenizers() -> None:
    assert max_chars_per_token(SHIPPED) == 18
    assert max_chars_per_token(tokenizer_of(byte_level(), pre_tokenizer=BYTE_LEVEL)) == 1
    assert max_chars_per_token(tokenizer_of(byte_level(), normalizers.NFC(), BYTE_LEVEL)) == 4
    sequence = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
    fallback = {f"<0x{i:02X}>": i for i in range(256)} | {"<unk>": 256}
    model = models.BPE(vocab=fallback, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    assert max_chars_per_token(tokenizer_of(model, sequence)) == 6


@pytest.mark.parametrize(
    "tokenizer",
    [
        tokenizer_of(byte_level(), normalizers.Strip(), BYTE_LEVEL),
        tokenizer_of(byte_level(), normalizers.NFKC(), BYTE_LEVEL),
        tokenizer_of(byte_level(), normalizers.Replace("  ", " "), BYTE_LEVEL),
        tokenizer_of(byte_level(), None, pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), BYTE_LEVEL])),
        tokenizer_of(byte_level(), None, BYTE_LEVEL, lstrip=True),
        tokenizer_of(models.WordPiece(vocab={"[UNK]": 0}, unk_token="[UNK]")),
        tokenizer_of(models.BPE(vocab={"a": 0, "<unk>": 1}, merges=[], unk_token="<unk>", fuse_unk=True)),
        tokenizer_of(models.WordLevel(vocab={"a": 0, "<unk>": 1}, unk_token="<unk>")),
        None,
    ],
    ids=range(9),
)
def test_tokenizer_that_can_drop_or_fold_text_has_no_bound(tokenizer: Any) -> None:
    assert max_chars_per_token(tokenizer) == inf
