"""Run the texts of a policy's evaluation through an engine, and say what the policy does on each."""

import asyncio
from collections.abc import Sequence
from itertools import chain

from rudder.sae_models.errors import UserError
from rudder.sae_models.tokens import text_encoder
from rudder.server.engine.adapter import SamplingParams
from rudder.server.engine.call import Call, Outcome
from rudder.server.engine.engine import Engine
from rudder.server.program.compile import Compiled
from rudder.server.safety.certificate import Acts, Text
from rudder.server.safety.judge import Judge
from rudder.server.safety.policy import Policy


async def evaluate(engine: Engine, policy: Policy, texts: Sequence[Text]) -> list[Acts]:
    """Return what a policy does on each text. Texts run as prompts: nothing depends on what the model would answer.

    An answer is no part of the prompt, so edits and guards of generated tokens act on it. UserError: a text is empty or
    longer than the engine takes.
    """
    # As many as run at once: no call has to wait for a slot, and so none is refused one.
    running = asyncio.Semaphore(min(int(engine.admission.running), engine.registry.layout.slots))

    async def evaluate_one(number: int, text: Text) -> Acts:
        prompt, answer = token_ids(engine, text)
        longest = engine.model.max_model_len - 1
        if not prompt or len(prompt) + len(answer) > longest:
            raise UserError(
                f"texts: text {number + 1} has {len(prompt) + len(answer)} tokens: 1 to {longest} are possible"
            )
        async with running:
            return await acts_of(engine, policy, prompt, answer)

    return list(await asyncio.gather(*(evaluate_one(number, text) for number, text in enumerate(texts))))


def token_ids(engine: Engine, text: Text) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids of prompt and answer, as a server encodes them."""
    encoder = text_encoder(engine.tokenizer)
    if text.messages:
        prompt = encoder.encode_chat(list(text.messages), add_generation_prompt=True)
    else:
        prompt = encoder.encode_prompt(text.text)
    return tuple(prompt), tuple(encoder.encode(text.answer))


async def acts_of(engine: Engine, policy: Policy, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Acts:
    """Run one text, and judge it."""
    program = policy.program or policy.forced
    call = Call(
        prompt_ids=(*prompt, *answer),
        sampling=SamplingParams(temperature=0.0, max_tokens=1, detokenize=False),
        policies=(program,) if program else (),
        guard=tuple(chain.from_iterable(guard.rows for guard in policy.guards)),
        # So that every token runs, whatever the prefix cache holds.
        top_k_prompt=True,
        answer=len(answer),
    )
    judge = Judge(policy.guards, len(prompt), engine.uncounted(call))
    judge.take_tokens(call.prompt_ids)
    outcome: Outcome | None = None
    async for output in engine.stream(call):
        judge.take(output.guard_features)
        outcome = output.outcome or outcome
    assert outcome
    held = {track.guard.name: track.held.position if track.held else None for track in judge.tracks}
    edits, gates = counts_of(program, outcome) if program else ({}, {})
    return Acts(guards=held, edits=edits, gates=gates)


def counts_of(program: Compiled, outcome: Outcome) -> tuple[dict[str, int], dict[str, int]]:
    """Return the tokens that each edit of a policy's program touched, and those at which its gate was open."""
    names = [f"{number}: {name.site} {name.row} {name.operation}" for number, name in enumerate(program.edits)]
    gates = zip([program.gate_site], outcome.gates, strict=False)
    return dict(zip(names, outcome.policy_moved[0], strict=True)), {site: gate.open_tokens for site, gate in gates}
