"""Threads for the tokenizer, shared fairly among callers, and what can be told of a text's length before tokenising."""

import asyncio
import copy
import json
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf
from typing import Any, TypeVar

T = TypeVar("T")

# Texts beyond this have a thread of their own, so that no short text waits for one.
LONG_TEXT_CHARS = 16_384
MAX_SHORT_THREADS = 4
# A composed character is at most four code points before normalisation to NFC.
NFC_SHRINKS_BY = 4


class Lane:
    """Threads that callers use in turn: each gets the next free one, however much the others have submitted.

    A Hugging Face tokenizer must not be used by two threads at once, so each makes a copy of the one that `source`
    returns.
    """

    def __init__(self, source: Callable[[], Any], threads: int, name: str) -> None:
        self.executor = ThreadPoolExecutor(threads, name)
        self.free = threads
        self.source, self.copying, self.local = source, threading.Lock(), threading.local()
        self.waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def run(self, caller: str, work: Callable[[Any], T]) -> T:
        """Return the result of `work` on a copy of the tokenizer."""
        await self.turn(caller)
        running = asyncio.get_running_loop().run_in_executor(self.executor, self.with_copy, work)
        running.add_done_callback(lambda _: self.next())
        # A cancelled caller leaves a thread that is still busy: its turn ends when the thread's work does.
        return await asyncio.shield(running)

    def with_copy(self, work: Callable[[Any], T]) -> T:
        """Do the work in a thread of the pool."""
        if not hasattr(self.local, "tokenizer"):
            with self.copying:
                self.local.tokenizer = copy.deepcopy(self.source())
        return work(self.local.tokenizer)

    async def turn(self, caller: str) -> None:
        """Wait for a free thread."""
        if self.free:
            self.free -= 1
            return
        future = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(caller, deque()).append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.next()
            raise

    def next(self) -> None:
        """Give a free thread to the next caller in turn."""
        while self.waiting:
            caller, futures = self.waiting.popitem(last=False)
            future = futures.popleft()
            if futures:
                self.waiting[caller] = futures
            if not future.done():
                future.set_result(None)
                return
        self.free += 1


class Tokenizers:
    """The lanes of short and of long texts. `chars_per_token`: see `max_chars_per_token`; None until needed."""

    def __init__(self, source: Callable[[], Any]) -> None:
        self.chars_per_token: float | None = None
        self.short = Lane(source, max(1, min(MAX_SHORT_THREADS, (os.cpu_count() or 1) - 1)), "tokenizer")
        self.long = Lane(source, 1, "tokenizer-long")

    async def max_chars(self, tokens: int) -> float:
        """Return how many characters so many tokens can stand for at most."""
        if self.chars_per_token is None:
            self.chars_per_token = await self.short.run("", max_chars_per_token)
        return tokens * self.chars_per_token

    def shutdown(self) -> None:
        """Let the threads end; what waits for one is cancelled."""
        for lane in (self.short, self.long):
            lane.executor.shutdown(wait=False, cancel_futures=True)

    async def run(self, caller: str, chars: int, work: Callable[[Any], T]) -> T:
        """Return the result of `work`, which is on a text of so many characters."""
        return await (self.long if chars > LONG_TEXT_CHARS else self.short).run(caller, work)


def max_chars_per_token(tokenizer: Any) -> float:
    """Return how many characters of text one token can stand for at most; inf if that has no bound.

    A tokenizer that drops text, or folds any length of it into one token, has none: one that strips whitespace, has no
    bytes to fall back to, or whose normalisation is none of those known here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return inf
    rules = json.loads(backend.to_str())
    model = rules["model"]
    byte_level = any(part["type"] == "ByteLevel" for part in parts(rules["pre_tokenizer"], "pretokenizers"))
    complete = model.get("type") in ("BPE", "Unigram") and (byte_level or model.get("byte_fallback"))
    shrinks = [shrinks_by(part) for part in parts(rules["normalizer"], "normalizers")]
    keeps_text = all(keeps(part) for part in parts(rules["pre_tokenizer"], "pretokenizers"))
    strips = any(token["lstrip"] or token["rstrip"] for token in rules["added_tokens"])
    if not complete or None in shrinks or not keeps_text or strips:
        return inf
    longest = max(map(len, (*vocabulary(model), *(token["content"] for token in rules["added_tokens"]))), default=1)
    return longest * max((shrink or 1 for shrink in shrinks), default=1)


def parts(rule: dict[str, Any] | None, name: str) -> Sequence[dict[str, Any]]:
    """Return the parts of a normaliser or pre-tokenizer, nested sequences of them flattened."""
    if rule is None:
        return ()
    if rule["type"] != "Sequence":
        return (rule,)
    return [part for entry in rule[name] for part in parts(entry, name)]


def shrinks_by(normalizer: dict[str, Any]) -> int | None:
    """Return by what factor a normaliser can shorten a text, in characters; None if any or unknown."""
    match normalizer["type"]:
        case "Prepend" | "ByteLevel":
            return 1
        case "NFC":
            return NFC_SHRINKS_BY
        case "Replace":
            pattern = normalizer["pattern"].get("String")
            return 1 if pattern is not None and len(pattern) <= len(normalizer["content"]) else None
    return None


def keeps(pre_tokenizer: dict[str, Any]) -> bool:
    """Return whether a pre-tokenizer keeps every character."""
    keeping = pre_tokenizer["type"] in ("ByteLevel", "Metaspace", "Digits", "Split", "Punctuation")
    return keeping and pre_tokenizer.get("behavior") != "Removed"


def vocabulary(model: dict[str, Any]) -> Sequence[str]:
    """Return the tokens of a model."""
    vocab = model["vocab"]
    return list(vocab) if isinstance(vocab, dict) else [token for token, _ in vocab]
