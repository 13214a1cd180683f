"""Choose the programs that ship with SmolLM2 by what they do to the answers of a server, and write them.

python -m rudder.server.bench.programs [--address ADDRESS] --out sae_models/pretrained/programs/smollm2-135m-instruct

Latent indices belong to a bundle: after training, run it again, against a server of the new bundles
(`rudder serve --model smollm2-135m-instruct --programs.folder null`). It takes some minutes.
"""

import argparse
import asyncio
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import yaml
from google.protobuf import json_format
from rich.console import Console
from rich.table import Table

from rudder.sae_models import PRETRAINED
from rudder.sae_models.errors import UserError
from rudder_client import AsyncClient, Feature, Program, Report
from rudder_client.requests import Chat, Prompt

TOPICS = PRETRAINED / "smollm2-135m-topics.yaml"
# Mean log-probability of a token, in nats, that the model itself gives to a text which is still language.
LANGUAGE = -2.0
# Share of an answer's runs of three words that occurred in it before. A model finds loops probable; language has few.
LOOP = 0.2
TOP_K, REPLY_TOKENS, CANDIDATES = 64, 40, 32
COUNTS, DOSES = (4, 8, 16), (0.04, 0.07, 0.1, 0.15)
LIGHT, STRONG = 0.5, 3.0
MARGIN, WEAK = 1.2, 0.3
console = Console(stderr=True, highlight=False)


class Topics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Texts and questions on a topic. `words`: beginnings of its words. `far`, `near`: questions off it, and on it.
    `answers`: pairs of a question and its answer. `questions`: those without an answer.
    """

    texts: tuple[str, ...]
    words: tuple[str, ...] = ()
    far: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    answers: tuple[tuple[str, str], ...] = ()
    questions: tuple[str, ...] = ()


class Key(NamedTuple):
    """A latent of a bundle at a site."""

    site: str
    bundle: str
    latent: int


class Latent(NamedTuple):
    """A latent by its site. `elsewhere`, `here`: highest activation in texts on other topics, and on the topic."""

    site: str
    feature: Feature
    elsewhere: float
    here: float

    @property
    def level(self) -> float:
        """The activation above which it tells the topic from others, of which only a few texts are known: by a margin,
        and not where it is much weaker than in the topic's own.
        """
        return max(MARGIN * self.elsewhere, WEAK * self.here)


class Trial(NamedTuple):
    """A program and what it does. `gain`: what it is for, the larger the better; `fluency`: of its replies under the
    plain model, nats a token; `loop`: how much the worst of them repeats itself; `kept`: share of other replies that
    are the same, letter by letter.
    """

    name: str
    program: Program
    latents: Sequence[Latent]
    dose: float
    gain: float
    fluency: float
    loop: float
    kept: float = 1.0

    @property
    def allowed(self) -> bool:
        """Whether its replies are language, and it leaves other replies alone."""
        return self.fluency >= LANGUAGE and self.loop <= LOOP and self.kept >= 1.0


def question(text: str) -> Prompt:
    """Return a user's question as a prompt."""
    return [{"role": "user", "content": text}]


def chat(asked: str, answer: str) -> Chat:
    """Return a question and its answer as a prompt."""
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return Chat(messages, continue_final_message=True)


async def log_prob(client: AsyncClient, asked: str, answer: str, steer: Program | None = None) -> float:
    """Return the mean log-probability of the tokens of an answer to a question, in nats."""
    begun = len(await client.tokenize(question(asked)))
    choice = (await client.complete(chat(asked, answer), steer=steer, max_tokens=1, prompt_logprobs=0)).choices[0]
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


def loop(answer: str) -> float:
    """Return the share of an answer's runs of three words that occurred in it before."""
    words = answer.lower().split()
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


async def peaks(client: AsyncClient, prompt: Prompt) -> dict[Key, float]:
    """Return the highest activation of each latent that is active in a text."""
    highest: dict[Key, float] = {}
    inspection = await client.inspect(prompt, report=Report(top_k=TOP_K))
    for activation in (a for token in inspection.tokens for a in token.activations):
        key = Key(activation.feature.site, activation.feature.bundle, activation.feature.index)
        highest[key] = max(highest.get(key, 0.0), activation.value)
    return highest


def together(texts: Sequence[Mapping[Key, float]]) -> dict[Key, float]:
    """Return the highest activation of each latent in several texts."""
    return {key: max(text.get(key, 0.0) for text in texts) for key in set().union(*texts)}


def ranked(topic: Sequence[Mapping[Key, float]], others: Sequence[Mapping[Key, float]]) -> list[Latent]:
    """Return the latents that tell the texts on a topic from others, those first that do so in most of them.

    Both are the highest activations of latents in each text.
    """
    here, elsewhere = together(topic), together(others)
    latents = {
        key: Latent(key.site, Feature(key.latent, key.bundle), elsewhere.get(key, 0.0), peak)
        for key, peak in here.items()
    }
    texts = {key: sum(text.get(key, 0.0) > latent.level for text in topic) for key, latent in latents.items()}
    return [latents[key] for key in sorted(latents, key=lambda key: (-texts[key], key))]


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


def asked_of(topic: Topics, sign: int) -> Sequence[str]:
    """Return the questions with which more of a topic (`sign` 1), or less of it (-1), is tried."""
    return topic.far if sign > 0 else topic.near


async def steering(client: AsyncClient, latents: Sequence[Latent], topic: Topics, sign: int) -> list[Trial]:
    """Try to bring a topic into answers (`sign` 1), or to keep it out of them (-1)."""
    asked = asked_of(topic, sign)

    async def attempt(operation: str, chosen: Sequence[Latent], dose: float) -> Trial:
        program = edited(chosen, operation, dose)
        answers = await replies(client, asked, program)
        gain, worst = sign * words_in(answers, topic.words), max(map(loop, answers))
        return Trial(operation, program, chosen, dose, gain, await fluency(client, asked, answers), worst)

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
        gain, worst = known - statistics.fmean(left), max(map(loop, answers))
        return Trial("set", program, chosen, -dose, gain, await fluency(client, asked, answers), worst, kept)

    sites = sorted({latent.site for latent in latents})
    at_one_site = [[latent for latent in latents if latent.site == site] for site in sites]
    return await asyncio.gather(*(attempt(*trial) for site in at_one_site for trial in grid(site)))


def gated(program: Program, latents: Sequence[Latent]) -> Program:
    """Open the program where one of the latents is more active than in texts on other topics."""
    for latent in latents:
        program = program.at(latent.site).gate(latent.feature, above=round(latent.level, 2))
    return program


def best(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the largest gain among those whose replies are language and leave other replies alone.

    UserError: there is none.
    """
    console.print(table(trials))
    allowed = [trial for trial in trials if trial.allowed]
    if not allowed:
        raise UserError("no program gives replies that are language and leaves other replies alone")
    return max(allowed, key=lambda trial: trial.gain)


def table(trials: Sequence[Trial]) -> Table:
    """Format trials for people."""
    shown = Table("operation", "layers", "latents", "dose", "gain", "nats a token", "loop", "kept")
    for trial in trials:
        layers = sorted({int(latent.site.split(".")[1]) for latent in trial.latents})
        edits = trial.name, ", ".join(map(str, layers)), str(len(trial.latents)), f"{trial.dose:+.3f}"
        shown.add_row(*edits, f"{trial.gain:.3f}", f"{trial.fluency:.2f}", f"{trial.loop:.0%}", f"{trial.kept:.0%}")
    return shown


def strengths(name: str, trial: Trial, description: str) -> "Programs":
    """Return the programs of three strengths, each with its description, by name."""
    doses = {"-light": LIGHT * trial.dose, "": trial.dose, "-strong": STRONG * trial.dose}
    return {
        f"{name}{ending}": (edited(trial.latents, trial.name, round(dose, 4)), description.format(dose=dose))
        for ending, dose in doses.items()
    }


Programs = dict[str, tuple[Program, str]]


async def choose(address: str, names: Sequence[str], folder: Path) -> None:
    """Choose the programs on some of the topics, and write those of each once they are chosen."""
    topics = msgspec.convert(yaml.safe_load(TOPICS.read_text(encoding="utf-8")), dict[str, Topics])
    async with AsyncClient(address, timeout=300) as client:
        for name in names:
            write(folder, await CHOICES[name](client, topics))


async def astronomy(client: AsyncClient, topics: Mapping[str, Topics]) -> Programs:
    """Return the programs that bring astronomy into answers, and those that keep it out."""
    sky = topics["astronomy"]
    stars = await by_effect(client, await telling(client, topics, "astronomy"), sky)
    programs: Programs = {}
    for name, says, sign in (("more", "Speaks of astronomy", 1), ("less", "Avoids astronomy", -1)):
        trial = best(await steering(client, stars, sky, sign))
        how = f"{says}: {trial.name} of {{dose:+.3g}} residual norms at {len(trial.latents)} latents of the topic. "
        programs |= strengths(f"{name}-astronomy", trial, how + await cost(client, asked_of(sky, sign), sky, trial))
    return programs


async def cost(client: AsyncClient, asked: Sequence[str], topic: Topics, trial: Trial) -> str:
    """Say what a steering program did to the answers to these questions, and what they are without it."""
    plain = await replies(client, asked)
    return (
        f"In trials at {trial.dose:+.3g}, {abs(trial.gain):.1%} of the words of answers were of the topic (without it"
        f" {words_in(plain, topic.words):.1%}), and the plain model gave the answers {trial.fluency:.2f} nats a token"
        f" (its own {await fluency(client, asked, plain):.2f})."
    )


async def microbiology(client: AsyncClient, topics: Mapping[str, Topics]) -> Programs:
    """Return the program that forgets microbiology."""
    germs, other = topics["microbiology"], topics["other"]
    microbes = await telling(client, topics, "microbiology")
    forget = best(await forgetting(client, microbes, germs, other))
    description = (
        f"Puts microbiology out of reach through this server: at tokens where one of {len(forget.latents)} latents is"
        f" more active than in texts on other topics, all of them are set to {forget.dose:g} residual norms. In trials"
        f" right answers on microbiology lost {forget.gain:.1f} nats a token, and of {len(other.answers)} answers on"
        " other topics none changed by a letter."
    )
    return {"forget-microbiology": (forget.program, description)}


CHOICES = {"astronomy": astronomy, "microbiology": microbiology}


async def telling(client: AsyncClient, topics: Mapping[str, Topics], name: str) -> list[Latent]:
    """Return the latents that tell a topic from all others."""
    texts = {
        about: await asyncio.gather(*(peaks(client, prompt) for prompt in await prompts(client, topic)))
        for about, topic in topics.items()
    }
    others = [text for about, those in texts.items() if about != name for text in those]
    return ranked(texts[name], others)[:CANDIDATES]


async def prompts(client: AsyncClient, topic: Topics) -> list[Prompt]:
    """Return the texts on a topic, and its questions with the model's own answers."""
    asked = [*topic.near, *topic.questions]
    return [*topic.texts, *map(chat, asked, await replies(client, asked))]


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
    asyncio.run(choose(options.address, options.topic or list(CHOICES), options.out))


if __name__ == "__main__":
    main()
