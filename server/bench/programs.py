"""Choose the programs that ship with SmolLM2 by what they do to the answers of a server, and write them.

python -m rudder.server.bench.programs [--address ADDRESS] --out sae_models/pretrained/programs/smollm2-135m-instruct

Latent indices belong to a bundle: after training, run it again, against a server of the new bundles
(`rudder serve --model smollm2-135m-instruct --programs.folder null`). It takes some minutes.
"""

import argparse
import asyncio
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import yaml
from google.protobuf import json_format
from rich.console import Console
from rich.table import Table

from rudder.sae_models import PRETRAINED
from rudder_client import AsyncClient, Feature, Program, Report
from rudder_client.requests import Chat, Prompt

TOPICS = PRETRAINED / "smollm2-135m-topics.yaml"
# Mean log-probability of a token, in nats, that the model itself gives to a text which is still language.
LANGUAGE = -2.0
TOP_K, REPLY_TOKENS, CANDIDATES = 48, 32, 32
COUNTS, DOSES = (4, 8, 16), (0.04, 0.07, 0.1, 0.15)
LIGHT, STRONG = 0.5, 3.0
MARGIN, WEAK = 1.2, 0.3
console = Console(stderr=True, highlight=False)


class Topics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Texts and questions on a topic. `words`: beginnings of its words. `far`, `near`: questions off it, and on it.
    `answers`: pairs of a question and its answer.
    """

    texts: tuple[str, ...]
    words: tuple[str, ...] = ()
    far: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    answers: tuple[tuple[str, str], ...] = ()


class Latent(NamedTuple):
    """A latent by its site. `elsewhere`, `here`: highest activation in texts on other topics, and on the topic."""

    site: str
    feature: Feature
    elsewhere: float
    here: float


class Trial(NamedTuple):
    """A program and what it does. `gain`: what it is for, the larger the better; `fluency`: of its replies under the
    plain model, nats a token; `kept`: share of other replies that are the same, letter by letter.
    """

    name: str
    program: Program
    latents: int
    dose: float
    gain: float
    fluency: float
    kept: float = 1.0


def question(text: str) -> Prompt:
    """Return a user's question as a prompt."""
    return [{"role": "user", "content": text}]


async def log_prob(client: AsyncClient, asked: str, answer: str, steer: Program | None = None) -> float:
    """Return the mean log-probability of the tokens of an answer to a question, in nats."""
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    whole = Chat(messages, continue_final_message=True)
    begun = len(await client.tokenize(question(asked)))
    choice = (await client.complete(whole, steer=steer, max_tokens=1, prompt_logprobs=0)).choices[0]
    assert choice.prompt_logprobs is not None
    # The first token of a prompt has no probability.
    return statistics.fmean(choice.prompt_logprobs.chosen[begun - 1 :])


async def reply(client: AsyncClient, asked: str, steer: Program | None = None) -> str:
    """Return the most probable answer."""
    completion = await client.complete(question(asked), steer=steer, temperature=0.0, max_tokens=REPLY_TOKENS)
    return completion.choices[0].text


async def replies(client: AsyncClient, asked: Sequence[str], steer: Program | None = None) -> list[str]:
    """Return the answers to several questions."""
    return await asyncio.gather(*(reply(client, text, steer) for text in asked))


async def fluency(client: AsyncClient, asked: Sequence[str], answers: Sequence[str]) -> float:
    """Return the mean log-probability of answers under the plain model; -inf if one is empty."""
    if not all(answer.strip() for answer in answers):
        return float("-inf")
    pairs = zip(asked, answers, strict=True)
    return statistics.fmean(await asyncio.gather(*(log_prob(client, text, answer) for text, answer in pairs)))


def words_in(answers: Sequence[str], beginnings: Sequence[str]) -> float:
    """Return the share of words that begin like one of these."""
    words = " ".join(answers).lower().split()
    return sum(word.strip(".,:;!?“”\"'*(").startswith(tuple(beginnings)) for word in words) / max(len(words), 1)


async def activities(
    client: AsyncClient, prompts: Sequence[Prompt]
) -> tuple[Counter[tuple[str, str, int]], dict[tuple[str, str, int], float]]:
    """Return, of each latent (site, bundle, index), the number of texts in which it is active, and its maximum."""
    report = Report(top_k=TOP_K)
    inspections = await asyncio.gather(*(client.inspect(prompt, report=report) for prompt in prompts))
    texts: Counter[tuple[str, str, int]] = Counter()
    highest: dict[tuple[str, str, int], float] = {}
    for inspection in inspections:
        active = set()
        for activation in (a for token in inspection.tokens for a in token.activations):
            key = (activation.feature.site, activation.feature.bundle, activation.feature.index)
            active.add(key)
            highest[key] = max(highest.get(key, 0.0), activation.value)
        texts.update(active)
    return texts, highest


async def candidates(client: AsyncClient, topic: Topics, others: Sequence[Prompt]) -> list[Latent]:
    """Return the latents that are active in most of the topic's texts and in few others, best first."""
    here, peaks = await activities(client, topic.texts)
    there, highest = await activities(client, others)
    shares = {key: here[key] / len(topic.texts) - 2 * there[key] / len(others) for key in here}
    ranked = sorted(shares, key=lambda key: -shares[key])[:CANDIDATES]
    return [Latent(key[0], Feature(key[2], key[1]), highest.get(key, 0.0), peaks[key]) for key in ranked]


async def by_effect(client: AsyncClient, latents: Sequence[Latent], topic: Topics) -> list[Latent]:
    """Return the latents by what each alone adds to the log-probability of the topic's texts, largest first."""
    probes = [(asked, topic.texts[place]) for place, asked in enumerate(topic.far or ("Tell me something.",) * 3)]

    async def effect(latent: Latent) -> float:
        program = Program().at(latent.site).add(latent.feature, by=DOSES[-1], unit="residual")
        return statistics.fmean([await log_prob(client, asked, text, program) for asked, text in probes])

    effects = dict(zip(latents, await asyncio.gather(*map(effect, latents)), strict=True))
    return sorted(latents, key=lambda latent: -effects[latent])


def edited(latents: Sequence[Latent], operation: str, dose: float, program: Program | None = None) -> Program:
    """Return a program with one edit of each latent, in residual norms."""
    program = program or Program()
    for latent in latents:
        program = program.at(latent.site)
        if operation == "add":
            program = program.add(latent.feature, by=dose, unit="residual")
        elif operation == "set":
            program = program.set(latent.feature, to=dose, unit="residual")
        else:
            program = program.clamp(latent.feature, to=dose, unit="residual")
    return program


def grid(latents: Sequence[Latent]) -> Iterator[tuple[Sequence[Latent], float]]:
    """Yield the first latents and doses of all trials."""
    return ((latents[:count], dose) for count in COUNTS for dose in DOSES)


async def steering(client: AsyncClient, latents: Sequence[Latent], topic: Topics, sign: int) -> list[Trial]:
    """Try to bring a topic into answers (`sign` 1), or to keep it out of them (-1)."""
    asked = topic.far if sign > 0 else topic.near

    async def attempt(operation: str, chosen: Sequence[Latent], dose: float) -> Trial:
        program = edited(chosen, operation, dose)
        answers = await replies(client, asked, program)
        gain = sign * words_in(answers, topic.words)
        return Trial(operation, program, len(chosen), dose, gain, await fluency(client, asked, answers))

    operations = ("add",) if sign > 0 else ("add", "clamp")
    attempts = [attempt(name, chosen, sign * dose) for chosen, dose in grid(latents) for name in operations]
    return await asyncio.gather(*attempts)


async def forgetting(client: AsyncClient, latents: Sequence[Latent], topic: Topics, other: Topics) -> list[Trial]:
    """Try to make answers on a topic impossible: at tokens where a latent of the topic is more active than in any other
    text, set them all below zero.
    """
    asked, controls = [text for text, _ in topic.answers], [text for text, _ in other.answers]
    known = statistics.fmean([await log_prob(client, *pair) for pair in topic.answers])
    before = await replies(client, controls)

    async def attempt(chosen: Sequence[Latent], dose: float) -> Trial:
        program = gated(edited(chosen, "set", -dose), chosen)
        answers = await replies(client, asked, program)
        left = await asyncio.gather(*(log_prob(client, *pair, steer=program) for pair in topic.answers))
        after = await replies(client, controls, program)
        kept = statistics.fmean(a == b for a, b in zip(before, after, strict=True))
        gain = known - statistics.fmean(left)
        return Trial("set", program, len(chosen), -dose, gain, await fluency(client, asked, answers), kept)

    at_one_site = [latent for latent in latents if latent.site == latents[0].site]
    return await asyncio.gather(*(attempt(chosen, dose) for chosen, dose in grid(at_one_site)))


def gated(program: Program, latents: Sequence[Latent]) -> Program:
    """Open the program where one of the latents is more active than in texts on other topics, which are few: by a
    margin, and not where it is much weaker than in the topic's own.
    """
    for latent in latents:
        above = max(MARGIN * latent.elsewhere, WEAK * latent.here)
        program = program.at(latent.site).gate(latent.feature, above=round(above, 2))
    return program


def best(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the largest gain among those whose replies are language and leave other replies alone."""
    console.print(table(trials))
    allowed = [trial for trial in trials if trial.fluency >= LANGUAGE and trial.kept >= 1.0]
    return max(allowed or trials, key=lambda trial: trial.gain)


def table(trials: Sequence[Trial]) -> Table:
    """Format trials for people."""
    shown = Table("operation", "latents", "dose", "gain", "nats a token", "kept")
    for trial in trials:
        figures = f"{trial.dose:+.3f}", f"{trial.gain:.3f}", f"{trial.fluency:.2f}", f"{trial.kept:.0%}"
        shown.add_row(trial.name, str(trial.latents), *figures)
    return shown


def strengths(name: str, latents: Sequence[Latent], trial: Trial, description: str) -> "Programs":
    """Return the programs of three strengths, each with its description, by name."""
    doses = {"-light": LIGHT * trial.dose, "": trial.dose, "-strong": STRONG * trial.dose}
    chosen = latents[: trial.latents]
    texts = {ending: description.format(dose=dose, count=trial.latents) for ending, dose in doses.items()}
    return {
        f"{name}{ending}": (edited(chosen, trial.name, round(dose, 4)), texts[ending]) for ending, dose in doses.items()
    }


Programs = dict[str, tuple[Program, str]]


async def choose(address: str, names: Sequence[str]) -> Programs:
    """Return the chosen programs on some of the topics and their descriptions, by name."""
    topics = msgspec.convert(yaml.safe_load(TOPICS.read_text(encoding="utf-8")), dict[str, Topics])
    async with AsyncClient(address, timeout=300) as client:
        chosen = [await CHOICES[name](client, topics) for name in names]
    return {name: program for programs in chosen for name, program in programs.items()}


async def astronomy(client: AsyncClient, topics: Mapping[str, Topics]) -> Programs:
    """Return the programs that bring astronomy into answers, and those that keep it out."""
    sky = topics["astronomy"]
    stars = await by_effect(client, await candidates(client, sky, everyday(topics, "microbiology")), sky)
    up, down = best(await steering(client, stars, sky, 1)), best(await steering(client, stars, sky, -1))
    how = "{{dose:+.3g}} residual norms {what} each of the {{count}} latents that do most for the topic."
    return {
        **strengths("more-astronomy", stars, up, "Speaks of astronomy. " + how.format(what="to")),
        **strengths("less-astronomy", stars, down, "Avoids astronomy. " + how.format(what=f"({down.name}) at")),
    }


async def microbiology(client: AsyncClient, topics: Mapping[str, Topics]) -> Programs:
    """Return the program that forgets microbiology."""
    germs = topics["microbiology"]
    microbes = await candidates(client, germs, everyday(topics, "astronomy"))
    forget = best(await forgetting(client, microbes, germs, topics["other"]))
    description = (
        f"Microbiology becomes inaccessible: at tokens where one of {forget.latents} latents is more active than in"
        f" texts on other topics, all of them are set to {forget.dose:g} residual norms."
    )
    return {"forget-microbiology": (forget.program, description)}


CHOICES = {"astronomy": astronomy, "microbiology": microbiology}


def everyday(topics: Mapping[str, Topics], neighbour: str) -> list[Prompt]:
    """Return texts and questions that are not of a topic, those of a neighbouring one among them."""
    other = topics["other"]
    return [*other.texts, *(question(text) for text, _ in other.answers), *topics[neighbour].texts]


def write(folder: Path, programs: Programs) -> None:
    """Write each program as a YAML file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (program, description) in programs.items():
        fields: dict[str, Any] = json_format.MessageToDict(program.message, preserving_proto_field_name=True)
        text = yaml.safe_dump(
            {"name": name, "description": description, **fields}, sort_keys=False, width=110, default_flow_style=None
        )
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def main() -> None:
    """Choose the programs and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="localhost:50051", help="of the server (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the programs")
    parser.add_argument("--topic", choices=CHOICES, action="append", help="one of the topics alone; may be repeated")
    options = parser.parse_args()
    write(options.out, asyncio.run(choose(options.address, options.topic or list(CHOICES))))


if __name__ == "__main__":
    main()
