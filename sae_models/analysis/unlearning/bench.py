"""Measure a model under study on folds: sums over sections, from which metrics.py makes figures.

Columns of the sums: `tokens`, `nats`, `hits`, `touched` of running text, `texts` and `opened` of its windows;
`questions` and `right`; `prompts`, `continued` (tokens), `continued_nats` (under the twin), `gibberish` and `repeated`
of sampled continuations; `definitions` and `leaks` of definitions completed LEAKS times.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from rudder.sae_models.analysis.unlearning.generation import repeated_share
from rudder.sae_models.analysis.unlearning.material import Material
from rudder.sae_models.analysis.unlearning.questions import OPTIONS, REPORTED_FORM, Question, has_words, words_of
from rudder.sae_models.analysis.unlearning.rig import Texts
from rudder.sae_models.analysis.unlearning.statistics import Sums
from rudder.sae_models.analysis.unlearning.subjects import Reading, Subject, Whole

PROMPT, CONTINUED = 32, 48
LEAKS, TERM_TOKENS = 8, 10
# Gibberish: a continuation less likely under the twin than this share of the twin's own.
GIBBERISH = 0.99


@dataclass(frozen=True)
class Bench:
    """A material with what the plain model reads of it: windows, options and priors; the sum of the twin's log p of
    each window of the topic [n], NaN of others; and the twin's loss, in nats a token, above which a continuation is
    gibberish.
    """

    material: Material
    windows: Reading
    options: Reading
    priors: Reading
    twin_log_p: Tensor
    gibberish: float


def bench_of(material: Material) -> Bench:
    """Read a material with the plain model, and sample from the twin."""
    plain = Whole(material.rig.model)
    prompts = material.windows.take(sampled_windows(material, range(3))).windows.tokens[:, :PROMPT]
    twin = Whole(material.rig.twin)
    nats = continuation_nats(twin, prompts, twin.sample(prompts, CONTINUED, 0))
    level = float(nats.quantile(GIBBERISH)) if len(nats) else torch.nan
    index = material.windows_of(range(3), material.split.topic.books)
    twin_log_p = torch.full((len(material.windows),), torch.nan)
    twin_log_p[index] = twin.read(material.windows.take(index)).log_p.sum(1)
    windows, options, priors = (plain.read(texts) for texts in (material.windows, material.options, material.priors))
    return Bench(material, windows, options, priors, twin_log_p, level)


def measure(
    bench: Bench, subject: Subject, folds: Collection[int], books: Collection[str] | None = None, seed: int = 0
) -> Sums:
    """Measure a subject on folds, and of running text and questions on these books alone."""
    sums = measure_text(bench, subject, folds, books, seed)
    add_questions(sums, bench, subject, bench.material.questions_of(folds, books))
    add_leaks(sums, bench, subject, folds, seed)
    return sums


def measure_text(
    bench: Bench, subject: Subject, folds: Collection[int], books: Collection[str] | None = None, seed: int = 0
) -> Sums:
    """Measure a subject on running text and continuations alone."""
    sums = Sums(len(bench.material.split.documents))
    add_text(sums, bench, subject, bench.material.windows_of(folds, books))
    add_continuations(sums, bench, subject, folds, seed)
    return sums


def add_text(sums: Sums, bench: Bench, subject: Subject, index: Tensor) -> None:
    """Add the running text of the windows with these indices."""
    texts = bench.material.windows.take(index)
    reading = subject.read(texts, bench.windows.take(index))
    section, counted = bench.material.section[index], texts.windows.counted[:, 1:]
    ones = torch.ones(len(index))
    sums.add(section, tokens=counted.sum(1), nats=-reading.log_p.sum(1), hits=reading.hits.sum(1))
    sums.add(section, touched=reading.touched[:, 1:].sum(1), opened=reading.touched.any(1), texts=ones)


def add_questions(sums: Sums, bench: Bench, subject: Subject, index: Tensor) -> None:
    """Add the questions with these indices."""
    answers = torch.tensor([bench.material.questions[i].answer for i in index.tolist()], dtype=torch.long)
    add_answers(sums, bench.material.question_section[index], question_scores(bench, subject, index), answers)


def add_answers(sums: Sums, section: Tensor, scores: Tensor, answers: Tensor) -> None:
    """Add questions of sections [q], whose options have scores [q, OPTIONS] and of which `answers` [q] are right."""
    sums.add(section, right=scores.argmax(1) == answers, questions=torch.ones(len(section)))


def question_scores(bench: Bench, subject: Subject, index: Tensor) -> Tensor:
    """Return the score [q, OPTIONS] of each option: log p a token behind the definition, less that without it.

    So neither the length of a term nor how common it is decides.
    """
    texts = (index[:, None] * OPTIONS + torch.arange(OPTIONS)).flatten()
    asked, prior = bench.material.options.take(texts), bench.material.priors.take(texts)
    given = subject.read(asked, bench.options.take(texts)).log_p
    alone = subject.read(prior, bench.priors.take(texts)).log_p
    return (_mean_of_ending(given, asked) - _mean_of_ending(alone, prior)).view(-1, OPTIONS)


def _mean_of_ending(log_p: Tensor, texts: Texts) -> Tensor:
    """Return the mean log p [n] of the scored tokens, those behind the prompts; log_p [n, length - 1], 0 elsewhere."""
    return log_p.sum(1) / texts.scored[:, 1:].sum(1).clamp(min=1)


def sampled_windows(material: Material, folds: Collection[int]) -> Tensor:
    """Return the indices of the topic's windows whose beginnings are continued."""
    index = material.windows_of(folds, material.split.topic.books)
    # The same ones whichever folds are asked for.
    every = material.windows_of(range(3), material.split.topic.books)
    chosen = every[torch.linspace(0, len(every) - 1, min(len(every), material.size.samples)).long()]
    return index[torch.isin(index, chosen)]


def add_continuations(sums: Sums, bench: Bench, subject: Subject, folds: Collection[int], seed: int) -> None:
    """Add continuations of the topic's text, judged by the twin: it does not know the topic, but is fluent."""
    index = sampled_windows(bench.material, folds)
    if not len(index):
        return
    prompts = bench.material.windows.windows.tokens[index, :PROMPT]
    continued = subject.sample(prompts, CONTINUED, seed)
    nats = continuation_nats(Whole(bench.material.rig.twin), prompts, continued)
    section, ones = bench.material.section[index], torch.ones(len(index))
    sums.add(section, continued=CONTINUED * ones, continued_nats=CONTINUED * nats, prompts=ones)
    sums.add(section, gibberish=nats > bench.gibberish, repeated=repeated_share(continued))


@torch.no_grad()
def continuation_nats(judge: Whole, prompts: Tensor, continued: Tensor) -> Tensor:
    """Return the mean loss [n] of continuations under a model."""
    parts = []
    for tokens in torch.cat([prompts, continued], 1).split(32):
        nexts = tokens[:, -continued.shape[1] :]
        logits = judge.model(tokens, use_cache=False, logits_to_keep=nexts.shape[1] + 1).logits[:, :-1].float()
        parts.append((logits.logsumexp(-1) - logits.gather(-1, nexts[..., None])[..., 0]).mean(1))
    return torch.cat(parts) if parts else torch.zeros(0)


def add_leaks(sums: Sums, bench: Bench, subject: Subject, folds: Collection[int], seed: int) -> None:
    """Add definitions of the topic completed LEAKS times each: one leaks if any completion has the term."""
    material = bench.material
    every = material.questions_of(range(3), material.split.topic.books)
    chosen = every[torch.linspace(0, len(every) - 1, min(len(every), material.size.leaks)).long()]
    index = chosen[torch.isin(chosen, material.questions_of(folds))]
    for number in index.tolist():
        question = material.questions[number]
        leaked = torch.tensor([leaks(bench, subject, question, seed + number)])
        section = torch.tensor([question.section])
        sums.add(section, leaks=leaked, definitions=torch.ones(1))


def leaks(bench: Bench, subject: Subject, question: Question, seed: int) -> bool:
    """Return whether any completion of a definition has its term."""
    rig = bench.material.rig
    windows, _ = rig.encode([question.prompt(REPORTED_FORM[0])])
    completions = subject.sample(windows.tokens.expand(LEAKS, -1), TERM_TOKENS, seed)
    term = words_of(question.options[question.answer])
    return any(has_words(words_of(text), term) for text in rig.tokenizer.batch_decode(completions))
