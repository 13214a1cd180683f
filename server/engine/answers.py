"""Write a chat corpus: prompts in the model's chat template, with the model's own answers.

    rudder answer --model MODEL --topics CORPUS --out CHATS.jsonl

Served traffic is chat, which textbooks are not: SAEs of a chat model are trained on both.
"""

import asyncio
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from rudder.sae_models.activations.corpus import JSON_LINES
from rudder.sae_models.activations.prompts import Prompt
from rudder.sae_models.errors import UserError
from rudder.sae_models.tokens import text_encoder
from rudder.server import config as configuration
from rudder.server.engine.adapter import SamplingParams
from rudder.server.engine.call import Call
from rudder.server.engine.engine import Engine
from rudder.server.engine.start import start_engine

# A CPU needs this many rows for products near its peak.
ANSWERS_AT_ONCE = 384
KV_CACHE_BYTES = 4 << 30


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled. `seed`: of the engine; one of each request would be slower."""

    temperature: float = 0.7
    max_tokens: int = 256
    max_prompt_tokens: int = 256
    seed: int = 0


async def write_answers(model: str, prompts: Iterable[Prompt], out: Path, sampling: Sampling) -> int:
    """Answer the prompts, a line each; return the number of tokens of the new answers.

    Prompts whose answers `out` holds already are skipped, so a run that was stopped goes on. UserError: `out` is not
    JSON lines of an earlier run.
    """
    done = numbers_in(out)
    waiting = [(number, prompt) for number, prompt in enumerate(prompts) if number not in done]
    if not waiting:
        return 0
    engine = await start_engine(configuration.load(None, engine_fields(model, sampling)))
    try:
        with out.open("a", encoding="utf-8") as file, tqdm(unit="tok", desc="answer") as progress:
            running = asyncio.Semaphore(min(ANSWERS_AT_ONCE, int(engine.admission.running)))

            async def write_one(number: int, prompt: Prompt) -> int:
                async with running:
                    text, tokens = await answer(engine, prompt.text, sampling)
                write_line(file, number, prompt, text)
                progress.update(tokens)
                return tokens

            return sum(await asyncio.gather(*itertools.starmap(write_one, waiting)))
    finally:
        await engine.stop()


def engine_fields(model: str, sampling: Sampling) -> dict[str, str]:
    """Return the configuration of the engine: no bundles, and eager, because a batch of many answers is bound by
    products and not by the calls of them.
    """
    return {
        "engine.model": model,
        "engine.bundles": "[]",
        # An engine has a site, though nothing is edited here.
        "engine.sites": '["layers.0.resid_post"]',
        "engine.seed": str(sampling.seed),
        "engine.dtype": "float32",
        "engine.enforce_eager": "true",
        "engine.max_num_seqs": str(ANSWERS_AT_ONCE),
        "engine.slots": str(ANSWERS_AT_ONCE),
        "engine.max_model_len": str(sampling.max_prompt_tokens + sampling.max_tokens),
        "engine.kv_cache_memory_bytes": str(KV_CACHE_BYTES),
        "programs.folder": "null",
        "policies.folder": "null",
    }


async def answer(engine: Engine, prompt: str, sampling: Sampling) -> tuple[str, int]:
    """Return the model's answer to a prompt, and its number of tokens."""
    messages = [{"role": "user", "content": prompt}]
    ids = tuple(text_encoder(engine.tokenizer).encode_chat(messages, add_generation_prompt=True))
    if len(ids) > sampling.max_prompt_tokens:
        raise UserError(
            f"prompt: {prompt[:40]!r} has {len(ids)} tokens, at most {sampling.max_prompt_tokens} are possible"
        )
    params = SamplingParams(temperature=sampling.temperature, max_tokens=sampling.max_tokens)
    text, tokens = "", 0
    async for output in engine.stream(Call(ids, params)):
        text += output.text
        tokens += len(output.token_ids)
    return text, tokens


def write_line(file: IO[str], number: int, prompt: Prompt, text: str) -> None:
    """Append a chat to a corpus."""
    messages = [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": text}]
    record = {"book": prompt.book, "module": f"chat-{number}", "messages": messages}
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


def numbers_in(out: Path) -> set[int]:
    """Return the numbers of the prompts that are answered in a file. UserError: it holds something else."""
    if not out.name.endswith(JSON_LINES[0]):
        raise UserError(f"out: {out}: the name does not end in {JSON_LINES[0]}")
    return set(_numbers(out)) if out.exists() else set()


def _numbers(out: Path) -> Iterator[int]:
    for line, text in enumerate(out.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record: Any = json.loads(text)
            yield int(record["module"].removeprefix("chat-"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"out: {out}: line {line} is not a chat of an earlier run") from error
