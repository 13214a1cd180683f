"""Rows that may steer towards a topic: ranked on labelled text, by their labels or on pairs, and scored by output."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rudder.sae_models.activations.corpus import Document, Windows
from rudder.sae_models.activations.harvest import residuals
from rudder.sae_models.activations.hooks import Site, hooked, parse_site
from rudder.sae_models.analysis import selection
from rudder.sae_models.analysis.sampling import Voice, encoded
from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.evaluation.logit_lens import unembedding
from rudder.sae_models.token_text import token_name

# Latents of a ranking that are scored by output.
RANKED = 32
GROUP = 8
NEUTRAL_TEXT = "From my experience,"
PROMOTED = 20
AMPLIFICATION = 10.0


@dataclass(frozen=True)
class Profile:
    """What a corpus is like by book at a site: share of tokens on which each latent is active and its mean activation,
    [books, F], and the mean residual, [books, d].
    """

    books: Sequence[str]
    frequency: Tensor
    activation: Tensor
    residual: Tensor

    def rise(self, book: str, other: str | None = None) -> Tensor:
        """Return how much more active each latent [F] is on a book than on another, or on the mean of all others."""
        return self.activation[self.books.index(book)] - self._base(self.activation, book, other)

    def difference_of_means(self, book: str) -> Tensor:
        """Return the unit direction [d] from the mean residual of all other books to that of a book."""
        return functional.normalize(
            self.residual[self.books.index(book)] - self._base(self.residual, book, None), dim=0
        )

    def _base(self, values: Tensor, book: str, other: str | None) -> Tensor:
        if other is not None:
            return values[self.books.index(other)]
        return torch.stack([values[i] for i, name in enumerate(self.books) if name != book]).mean(0)


def profile_of(trunk: Any, bundle: Bundle, windows: Windows, documents: Sequence[Document]) -> Profile:
    """Measure the profile of windows by the book of their documents."""
    books = sorted({document.book for document in documents})
    number = torch.tensor([books.index(documents[source].book) for source in windows.document.tolist()])
    latents, width = bundle.sae.decoder.shape
    active, sums, x_sums = (
        torch.zeros(len(books), latents),
        torch.zeros(len(books), latents),
        torch.zeros(len(books), width),
    )
    tokens, start = torch.zeros(len(books), 1), 0
    for x, counted in residuals(trunk, site_of(bundle), windows):
        book = number[start : start + len(x)]
        f = bundle.sae.encode(x) * counted[..., None]
        active.index_add_(0, book, (f > 0).sum(1).float())
        sums.index_add_(0, book, f.sum(1))
        x_sums.index_add_(0, book, (x * counted[..., None]).sum(1))
        tokens.index_add_(0, book, counted.sum(1, keepdim=True).float())
        start += len(x)
    tokens = tokens.clamp_min(1)
    return Profile(books, active / tokens, sums / tokens, x_sums / tokens)


@dataclass(frozen=True)
class Ranking:
    """Latents that stand for a topic, best first, and how strongly each is active on it: the weights of a group."""

    latents: tuple[int, ...]
    strength: tuple[float, ...]


def by_contrast(profile: Profile, book: str, ignored: Sequence[str] = ()) -> Ranking:
    """Rank the latents that are frequent on a book and rare on every other (`selection.select`), most frequent first.

    Their strength is how much more active they are on it.
    """
    kept = [index for index, name in enumerate(profile.books) if name not in ignored]
    books = [profile.books[index] for index in kept]
    latents = selection.select(profile.frequency[kept], books, (book,), (), RANKED, ceiling=0.02)
    rise = profile.rise(book)
    return Ranking(tuple(latents), tuple(rise[latents].clamp_min(1e-6).tolist()))


def by_label(bundle: Bundle, words: str) -> Ranking:
    """Rank the latents whose labels have the words, as the catalogue's search does; all equally strong."""
    found = [s.index for s in bundle.catalogue.search(words, RANKED) if s.frequency != 0]
    return Ranking(tuple(found), (1.0,) * len(found))


def by_pairs(with_topic: Tensor, without: Tensor) -> Ranking:
    """Rank latents by the share of pairs in which they are active with the topic and silent without it (SAIF, arXiv
    2502.11356).

    Activations [pairs, F] are the largest of each text. The strength is the mean where the latent is active. Latents
    that no pair has are left out.
    """
    share = ((with_topic > 0) & (without <= 0)).float().mean(0)
    mean = with_topic.sum(0) / (with_topic > 0).sum(0).clamp_min(1)
    best = share.argsort(descending=True, stable=True)[:RANKED]
    kept = [index for index in best.tolist() if share[index] > 0]
    return Ranking(tuple(kept), tuple(mean[kept].tolist()))


@dataclass(frozen=True)
class Scores:
    """Output and input score of latents (arXiv 2505.20063), by latent; an input score is None without contexts."""

    output: dict[int, float]
    input: dict[int, float | None]


@torch.no_grad()
def scores_of(voice: Voice, bundle: Bundle, latents: Sequence[int]) -> Scores:
    """Score latents by what they make the model say, and by whether they are active on what they promote.

    Output: the latent is added to the residual of the last token of a neutral text, ten times as strongly as the most
    active latent there; the score is the largest probability among the PROMOTED tokens that its decoder promotes most,
    times one less the best of their ranks as a share of the vocabulary. Input: the share of the catalogue's strongest
    contexts whose token is among those tokens. (The paper reads 100 contexts, the catalogue has a few.)
    """
    index = torch.tensor(list(latents))
    promoted = (bundle.sae.decoder[index].float() @ unembedding(voice.model).T).topk(PROMOTED).indices
    probability = _amplified(voice, bundle, index)
    ranked = probability.argsort(descending=True).argsort()
    best = ranked.gather(1, promoted).amin(1) / probability.shape[1]
    output = probability.gather(1, promoted).amax(1) * (1 - best)
    said = [{token_name(token, voice.tokenizer).strip().lower() for token in row} for row in promoted.tolist()]
    read = [input_score(bundle, latent, tokens) for latent, tokens in zip(latents, said, strict=True)]
    return Scores(dict(zip(latents, output.tolist(), strict=True)), dict(zip(latents, read, strict=True)))


def _amplified(voice: Voice, bundle: Bundle, index: Tensor) -> Tensor:
    """Return the next-token probabilities [latents, V] after the neutral text, with each latent added at its end."""
    tokens, _ = encoded([NEUTRAL_TEXT], voice.tokenizer)
    rows = bundle.sae.decoder[index].float()

    def add(x: Tensor) -> Tensor:
        strongest = bundle.sae.encode(x[:, -1].float()).amax(1, keepdim=True)
        return torch.cat([x[:, :-1], (x[:, -1] + AMPLIFICATION * strongest * rows)[:, None].to(x.dtype)], 1)

    with hooked(voice.model, site_of(bundle), add):
        logits = voice.model(tokens.expand(len(index), -1), use_cache=False).logits
    probability: Tensor = logits[:, -1].float().softmax(1)
    return probability


def input_score(bundle: Bundle, latent: int, promoted: set[str]) -> float | None:
    """Return the share of a latent's strongest contexts whose token is among these; None without contexts."""
    strongest = [context for context in bundle.catalogue.get(latent).contexts if not context.held_out]
    hits = sum(context.token.strip().lower() in promoted for context in strongest)
    return hits / len(strongest) if strongest else None


@dataclass(frozen=True)
class Group:
    """Latents with weights, whose sum of unit decoder rows is a unit direction [d]: dose v displaces x by v * ||x||."""

    kind: str
    latents: tuple[int, ...]
    weights: tuple[float, ...]
    direction: Tensor


def group_of(kind: str, bundle: Bundle, latents: Sequence[int], strength: Sequence[float]) -> Group:
    """Build a group whose latents have weights in proportion to strengths."""
    rows = functional.normalize(bundle.sae.decoder[list(latents)].float(), dim=1)
    raw = torch.tensor(list(strength)) @ rows
    weights = torch.tensor(list(strength)) / raw.norm()
    return Group(kind, tuple(latents), tuple(weights.tolist()), raw / raw.norm())


def groups_of(bundle: Bundle, ranking: Ranking, output: dict[int, float]) -> list[Group]:
    """Return the groups that are tried for a ranking: its first latent (`input`), the one of the highest output score
    (`output`), its first eight by strength (`group`), and the eight of the highest output scores (`output-group`).
    """
    strength = dict(zip(ranking.latents, ranking.strength, strict=True))
    by_output = sorted(ranking.latents, key=lambda latent: -output[latent])
    tried = {
        "group": ranking.latents[:GROUP],
        "output-group": tuple(by_output[:GROUP]),
        "input": ranking.latents[:1],
        "output": tuple(by_output[:1]),
    }
    # The same latents under another name are not tried twice.
    distinct = {frozenset(latents): kind for kind, latents in reversed(tried.items()) if latents}
    return [group_of(kind, bundle, tried[kind], [strength[i] for i in tried[kind]]) for kind in distinct.values()]


def random_directions(count: int, width: int, seed: int) -> Tensor:
    """Return random unit directions [count, width]."""
    return functional.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def largest_activations(trunk: Any, bundle: Bundle, windows: Windows, documents: int) -> Tensor:
    """Return the largest activation of each latent in each of the first `documents` documents, [documents, F]."""
    result, start = torch.zeros(documents, bundle.sae.latents), 0
    for x, counted in residuals(trunk, site_of(bundle), windows):
        strongest = (bundle.sae.encode(x) * counted[..., None]).amax(1)
        for source, row in zip(windows.document[start : start + len(x)].tolist(), strongest, strict=True):
            result[source] = torch.maximum(result[source], row)
        start += len(x)
    return result


def site_of(bundle: Bundle) -> Site:
    """Return the site of a bundle."""
    return parse_site(bundle.manifest.site)
