"""Explanations of latents by a language model behind an OpenAI-compatible endpoint, scored by detection.

The protocol of automated interpretability (arXiv 2410.13928): the model reads contexts in which the tokens that
activate a latent are marked and explains what they share; then it reads other contexts, some of the latent and some of
others, and says which fit the explanation. An explanation replaces a label only if it picks out contexts better than
chance.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
import numpy as np
from tqdm import tqdm

from rudder.sae_models.bundle import bundle, revision
from rudder.sae_models.bundle.bundle import WEIGHTS, Bundle
from rudder.sae_models.bundle.catalogue import ALL, Catalogue, Context, Latent
from rudder.sae_models.errors import UserError
from rudder.sae_models.evaluation import label_score
from rudder.sae_models.evaluation.label_score import MIN_CONTEXTS, Detection
from rudder.sae_models.optional import import_optional

JOURNAL = ".explanations.jsonl"
# Contexts of other latents that are shown for each of the latent's own.
OTHERS_PER_CONTEXT = 2
MAX_LABEL, MAX_ANSWER_TOKENS = 200, 200
TIMEOUT_S, RETRIES = 120.0, 2
# Consecutive answers that are of no use before asking ends.
MAX_USELESS = 10
EXPLAIN = """\
You study one unit of a neural network that reads text. Below are excerpts on which the unit is active; each token \
that activates it stands between « and ». Say in one short line, at most fifteen words, what the marked tokens or \
their surroundings have in common. Write that line after "Explanation:" and nothing else."""
DETECT = """\
A unit of a neural network that reads text is described like this: {explanation}
Which of these excerpts would activate it? Write their numbers after "Numbers:", separated by commas, or "none"."""

Ask = Callable[[str, str], str]
T = TypeVar("T")


class EndpointError(UserError):
    """The endpoint cannot be reached, refuses, or does not speak the protocol."""


class Explanation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model said of a latent of the SAE with these weights: a line of the journal.

    `area` and `error`: of the detection (label_score.Detection). `problem`: why the answer is of no use; else empty.
    """

    weights: str
    model: str
    latent: int
    text: str = ""
    area: float = 0.5
    error: float = 0.5
    problem: str = ""

    @property
    def holds(self) -> bool:
        """Whether the explanation picks out contexts better than chance."""
        return not self.problem and Detection(self.area, self.error).above_chance


@dataclass(frozen=True)
class Request:
    """What to explain: `latents`, or all that have contexts; at most `limit` of them that the model has not yet."""

    latents: tuple[int, ...] = ()
    limit: int = ALL


def explain(path: Path, model: str, ask: Ask, request: Request) -> list[Explanation]:
    """Explain latents of a bundle and write it anew with the explanations that hold. Return all by this model.

    Every answer is in a journal beside the bundle before the next question. Whatever ends the asking, the answers so
    far go into the catalogue, and the next call goes on from there. EndpointError: the endpoint fails. UserError: a
    latent cannot be explained, or the journal is damaged.
    """
    opened = bundle.load(path)
    journal, weights = path.with_name(path.name + JOURNAL), opened.manifest.files[WEIGHTS]
    known = [entry for entry in read_journal(journal) if (entry.weights, entry.model) == (weights, model)]
    answered = {entry.latent for entry in known}
    pending = [index for index in explicable(opened, request.latents) if index not in answered][: request.limit]
    try:
        with journal.open("ab") as file:
            for entry in entries(opened.catalogue, pending, ask):
                known.append(msgspec.structs.replace(entry, weights=weights, model=model))
                file.write(msgspec.json.encode(known[-1]) + b"\n")
                file.flush()
    finally:
        apply(opened, known)
    return known


def explicable(opened: Bundle, latents: Sequence[int]) -> list[int]:
    """Return the latents that have contexts to explain and to score with. UserError: a requested one has none."""
    catalogue = opened.catalogue
    for index in latents:
        if not 0 <= index < opened.manifest.latents:
            raise UserError(f"latents: {index}, the bundle has {opened.manifest.latents}")
    wanted = latents or [summary.index for summary in catalogue.page(-1, ALL)]
    usable = [index for index in wanted if has_contexts(catalogue.get(index))]
    if not usable or (latents and len(usable) < len(latents)):
        missing = sorted(set(latents) - set(usable))
        which = f"{missing[0]} has" if missing else "all have"
        raise UserError(f"latents: {which} too few contexts in the catalogue: run `rudder bundle label` on more text")
    return usable


def has_contexts(latent: Latent) -> bool:
    """Return whether a latent has a context to explain and MIN_CONTEXTS others to score with."""
    shown, held_out = split(latent)
    return bool(shown) and len(held_out) >= MIN_CONTEXTS


def split(latent: Latent) -> tuple[list[Context], list[Context]]:
    """Return the contexts to explain from, and those to score with, which are all others."""
    held_out = [context for context in latent.contexts if context.held_out]
    texts = {marked(context) for context in held_out}
    return [c for c in latent.contexts if not c.held_out and marked(c) not in texts], held_out


def entries(catalogue: Catalogue, latents: Sequence[int], ask: Ask) -> Iterator[Explanation]:
    """Yield an explanation of each latent. EndpointError: MAX_USELESS answers in a row are of no use."""
    useless = 0
    for index in tqdm(latents, unit="latent", desc="explain"):
        entry = explain_latent(catalogue, index, ask)
        yield entry
        useless = useless + 1 if entry.problem else 0
        if useless == MAX_USELESS:
            raise EndpointError(f"endpoint: {useless} answers in a row are of no use, the last: {entry.problem}")


def explain_latent(catalogue: Catalogue, index: int, ask: Ask) -> Explanation:
    """Ask for an explanation of one latent, and score it."""
    shown, held_out = split(catalogue.get(index))
    text = explanation_in(ask(EXPLAIN, excerpts(shown)))
    if not text:
        return Explanation("", "", index, problem="the answer has no explanation")
    rng = np.random.default_rng(index)
    others = contexts_of_others(catalogue, index, OTHERS_PER_CONTEXT * len(held_out), rng)
    is_own = np.arange(len(held_out) + len(others)) < len(held_out)
    order = rng.permutation(len(is_own))
    both = [*held_out, *others]
    answer = ask(DETECT.format(explanation=text), excerpts([replace_mark(both[i]) for i in order]))
    picked = numbers_in(answer, len(order))
    if picked is None:
        return Explanation("", "", index, text, problem="the answer has no numbers of excerpts")
    fits = np.isin(np.arange(1, len(order) + 1), picked).astype(np.float32)
    scored = label_score.detection(fits[is_own[order]], fits[~is_own[order]])
    if scored is None:
        return Explanation("", "", index, text, problem="the catalogue has too few contexts of other latents")
    return Explanation("", "", index, text, scored.area, scored.error)


def contexts_of_others(catalogue: Catalogue, index: int, count: int, rng: np.random.Generator) -> list[Context]:
    """Draw up to `count` held-out contexts, each of another latent. They may activate this one, rarely."""
    found = list[Context]()
    for other in rng.permutation(len(catalogue)).tolist():
        contexts = [context for context in catalogue.get(other).contexts if context.held_out]
        if other != index and contexts:
            found.append(contexts[rng.integers(len(contexts))])
        if len(found) == count:
            break
    return found


def marked(context: Context) -> str:
    """Return a context as one line, with its activating token between « and »."""
    token = context.token
    inner = token.strip()
    before, after = token.partition(inner)[::2] if inner else ("", "")
    return " ".join(f"{context.before}{before}«{inner or token}»{after}{context.after}".split())


def replace_mark(context: Context) -> Context:
    """Return a context with its token in the text before, since in detection nothing is marked."""
    return replace(context, before=context.before + context.token, token="")


def excerpts(contexts: Iterable[Context]) -> str:
    """Number contexts, one a line."""
    lines = (marked(c) if c.token else " ".join((c.before + c.after).split()) for c in contexts)
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))


def explanation_in(answer: str) -> str:
    """Return the explanation in an answer, as one line; empty if there is none."""
    found = re.findall(r"explanation:[ \t]*(.+)", answer, re.IGNORECASE)
    text = " ".join((found[-1] if found else "").split()).strip("\"'*`").strip()
    return text[:MAX_LABEL] if any(character.isalpha() for character in text) else ""


def numbers_in(answer: str, count: int) -> list[int] | None:
    """Return the numbers from 1 to `count` that an answer names, empty for none; None if it is not of that form."""
    found = re.findall(r"numbers:[ \t]*(.+)", answer, re.IGNORECASE)
    named = found[-1] if found else answer
    if re.match(r"\W*none\b", named, re.IGNORECASE):
        return []
    numbers = [int(digits) for digits in re.findall(r"\b\d{1,4}\b", named)]
    return numbers if numbers and all(1 <= number <= count for number in numbers) else None


def apply(opened: Bundle, known: Sequence[Explanation]) -> None:
    """Write a bundle anew with the explanations that hold, unless it has them."""
    by_latent = {entry.latent: entry for entry in known if entry.holds}
    latents = [opened.catalogue.get(index) for index in range(opened.manifest.latents)] if by_latent else []
    explained = [with_explanation(latent, by_latent) for latent in latents]
    if explained == latents:
        opened.catalogue.close()
        return
    revision.write(opened, explained, opened.measured).catalogue.close()


def with_explanation(latent: Latent, by_latent: Mapping[int, Explanation]) -> Latent:
    """Return a latent with its explanation, if it has one, as its label. Interventions are of labels from a corpus."""
    entry = by_latent.get(latent.summary.index)
    if entry is None:
        return latent
    summary = replace(latent.summary, label=entry.text, origin=f"explained by {entry.model}")
    summary = replace(summary, label_score=entry.area, label_error=entry.error, intervention=None)
    return replace(latent, summary=summary)


def read_journal(path: Path) -> list[Explanation]:
    """Read a journal; cut off a last line that was not written whole. UserError: another line is damaged."""
    content = path.read_bytes() if path.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    found = list[Explanation]()
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            found.append(msgspec.json.decode(line, type=Explanation))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} line {number}: {error}; remove the file to explain from the start") from error
    return found


class Message(msgspec.Struct):
    """What a model answers; other fields are ignored here as in the classes below."""

    content: str | None = None


class Choice(msgspec.Struct):
    """One answer to a question."""

    message: Message


class Completion(msgspec.Struct):
    """The reply to a question."""

    choices: list[Choice]


class ServedModel(msgspec.Struct):
    """The name of a model of an endpoint."""

    id: str


class Models(msgspec.Struct):
    """The models of an endpoint."""

    data: list[ServedModel]


def endpoint(url: str, model: str, key: str) -> tuple[str, Ask]:
    """Return the name of the model behind an OpenAI-compatible endpoint, by default the first, and a function that asks
    it: (system message, user message) -> answer. EndpointError: there is none.
    """
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise EndpointError(f"endpoint: {url!r} is not an http or https address")
    openai = import_optional("openai", "endpoint: asking for explanations")
    client = openai.OpenAI(base_url=url, api_key=key, timeout=TIMEOUT_S, max_retries=RETRIES)

    def call(reply: type[T], method: Callable[..., Any], path: str, **arguments: Any) -> T:
        try:
            return msgspec.convert(method(path, cast_to=object, **arguments), reply)
        except msgspec.ValidationError as error:
            raise EndpointError(f"endpoint: {url}{path} is no OpenAI-compatible endpoint: {error}") from error
        except (openai.OpenAIError, ValueError) as error:
            # The message of a connection error is its cause's.
            raise EndpointError(f"endpoint: {url}: {error.__cause__ or error}") from error

    def ask(system: str, user: str) -> str:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = {"model": name, "messages": messages, "temperature": 0, "max_tokens": MAX_ANSWER_TOKENS}
        choices = call(Completion, client.post, "/chat/completions", body=body).choices
        return (choices[0].message.content or "") if choices else ""

    name = model or next((served.id for served in call(Models, client.get, "/models").data), "")
    if not name:
        raise EndpointError(f"endpoint: {url}: it lists no model, give --explainer")
    return name, ask
