"""Calibrate rows that steer towards a topic: strength 1 by first crossing, against random directions of equal dose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import exp

import torch
from msgspec.structs import replace
from torch import Tensor

from rudder.sae_models.activations.hooks import Site
from rudder.sae_models.analysis import crossing, sampling
from rudder.sae_models.analysis.candidates import Group, Ranking, Scores, groups_of, random_directions
from rudder.sae_models.analysis.crossing import Budgets
from rudder.sae_models.analysis.sampling import Steering, Voice
from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.concepts import Calibration, Candidate, Concept, Interval, Point, Row

BUDGETS = Budgets()
BOOTSTRAPS = 2000
# Candidates of a concept that are kept: the one that is served, and the runner-up.
KEPT = 2
# Prompts on which random directions are tried.
RANDOM_PROMPTS = 16
RANDOM_PERCENTILE = 0.95

# How far each text [n] is on the topic.
Response = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Settings:
    """How concepts are calibrated. `seeds`: texts of each prompt; `random_directions`: tried at the dose s_max."""

    seeds: int = 2
    random_directions: int = 20
    budgets: Budgets = BUDGETS
    grid: tuple[float, ...] = crossing.GRID

    def record(self, voice: Voice, prompts: int) -> Calibration:
        """Return what a file of concepts says of its calibration."""
        b = self.budgets
        return Calibration(
            prompts=prompts, seeds=self.seeds, tokens=voice.tokens, temperature=voice.temperature,
            random_directions=self.random_directions, perplexity_ratio=b.perplexity_ratio,
            repetition_rise=b.repetition_rise, distinct_ratio=b.distinct_ratio,
        )  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """Texts drawn at one dose. Per text: `nats` per token under the plain model, `kl` from it, `repeated` 4-grams."""

    texts: Sequence[str]
    nats: Tensor
    kl: Tensor
    repeated: Tensor
    distinct: float

    def point(self, dose: float, response: Tensor) -> Point:
        """Return the figures of these texts."""
        means = (float(each.mean()) for each in (self.nats, self.repeated, self.kl, response))
        nats, repeated, kl, topic = means
        return Point(dose, exp(nats), repeated, self.distinct, kl, topic)


@dataclass(frozen=True)
class Room:
    """Prompts [n], each with a seed, that texts are drawn from at a site, and the unsteered texts."""

    voice: Voice
    site: Site
    prompts: Sequence[str]
    seeds: Sequence[int]
    unsteered: Trial = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "unsteered", self.draw(None))

    @property
    def cluster(self) -> Tensor:
        """The number of each text's prompt [n]: texts of one prompt are resampled together."""
        order = {prompt: number for number, prompt in enumerate(dict.fromkeys(self.prompts))}
        return torch.tensor([order[prompt] for prompt in self.prompts])

    def draw(self, steering: Steering | None) -> Trial:
        """Draw a text from each prompt."""
        texts = sampling.generate(self.voice, self.prompts, self.seeds, steering)
        likely = sampling.likelihood(self.voice, texts, steering)
        decoded = sampling.decoded(texts, self.voice.tokenizer)
        repeated, distinct = sampling.repetition(texts.tokens), sampling.distinct(texts.tokens)
        return Trial(decoded, likely.nats, likely.kl, repeated, distinct)

    def steer(self, direction: Tensor, dose: float) -> Trial:
        """Draw texts while x is displaced by `dose` * ||x|| along a unit direction [d]."""
        n = len(self.prompts)
        return self.draw(Steering(self.site, direction[None], torch.zeros(n, dtype=torch.long), torch.full((n,), dose)))


def room_of(voice: Voice, site: Site, prompts: Sequence[str], seeds: int) -> Room:
    """Build a room in which each prompt has as many texts as there are seeds."""
    repeated = [prompt for prompt in prompts for _ in range(seeds)]
    return Room(voice, site, repeated, [7919 * number + 1 for number in range(len(repeated))])


def calibrate_group(room: Room, respond: Response, group: Group, settings: Settings) -> tuple[Candidate, Tensor]:
    """Calibrate rows for a topic; return the candidate, whose `random` is still 0, and the responses [n] at s_max."""
    silent = respond(room.unsteered.texts)
    unsteered, responses = room.unsteered.point(0.0, silent), {0.0: silent}

    def measure(dose: float) -> Point:
        trial = room.steer(group.direction, dose)
        responses[dose] = respond(trial.texts)
        return trial.point(dose, responses[dose])

    found = crossing.first_crossing(measure, lambda point: settings.budgets.broken(point, unsteered), settings.grid)
    rows = tuple(Row(index, weight) for index, weight in zip(group.latents, group.weights, strict=True))
    at_most = responses[found.s_max]
    interval = interval_of(at_most, room.cluster)
    curve = (unsteered, *found.points)
    return Candidate(group.kind, rows, found.s_max, found.limit, curve, interval, 0.0), at_most


def random_responses(room: Room, respond: Response, dose: float, settings: Settings) -> Tensor:
    """Return the mean response [directions] of random directions at a dose, each on the first RANDOM_PROMPTS prompts.

    With fewer texts than a candidate's, their spread is wider: the bar is rather too high than too low.
    """
    prompts = list(dict.fromkeys(room.prompts))[:RANDOM_PROMPTS]
    count, n = settings.random_directions, len(prompts)
    which = torch.arange(count).repeat_interleave(n)
    width = room.voice.model.config.get_text_config().hidden_size
    steering = Steering(room.site, random_directions(count, width, 0), which, torch.full((count * n,), dose))
    texts = sampling.generate(room.voice, prompts * count, range(count * n), steering)
    response = respond(sampling.decoded(texts, room.voice.tokenizer))
    return response.view(count, n).mean(1)


def calibrate(
    room: Room, respond: Response, bundle: Bundle, ranking: Ranking, scores: Scores, settings: Settings
) -> tuple[Candidate, ...]:
    """Try the groups of a ranking; return the best and the runner-up, those that are not inert first."""
    tried = [calibrate_group(room, respond, group, settings)[0] for group in groups_of(bundle, ranking, scores.output)]
    best = sorted(tried, key=lambda candidate: -candidate.response.value)[:KEPT]
    compared = [described(with_random(each, room, respond, settings), bundle, scores) for each in best]
    return tuple(sorted(compared, key=lambda candidate: (bool(candidate.inert), -candidate.response.value)))


def with_random(candidate: Candidate, room: Room, respond: Response, settings: Settings) -> Candidate:
    """Return a candidate with the 95th percentile of the responses of random directions at its dose."""
    if candidate.s_max <= 0:
        return candidate
    level = random_responses(room, respond, candidate.s_max, settings).quantile(RANDOM_PERCENTILE)
    return replace(candidate, random=float(level))


def described(candidate: Candidate, bundle: Bundle, scores: Scores) -> Candidate:
    """Return a candidate whose rows have their labels and scores."""
    rows = tuple(
        replace(
            row,
            label=bundle.catalogue.get(row.index).summary.label,
            output_score=scores.output.get(row.index),
            input_score=scores.input.get(row.index),
        )
        for row in candidate.rows
    )
    return replace(candidate, rows=rows)


def interval_of(values: Tensor, cluster: Tensor, seed: int = 0) -> Interval:
    """Return the mean of values [n] with its 95 % percentile interval, from a bootstrap over clusters [n]."""
    count = int(cluster.max()) + 1
    sums = torch.zeros(count).index_add_(0, cluster, values.float())
    sizes = cluster.bincount(minlength=count).float()
    drawn = torch.randint(count, (BOOTSTRAPS, count), generator=torch.Generator().manual_seed(seed))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return Interval(float(values.float().mean()), low, high)


def with_concept(concepts: Sequence[Concept], new: Concept) -> tuple[Concept, ...]:
    """Return concepts with a new one, in place of an older one of its name, by name."""
    return tuple(sorted((*(c for c in concepts if c.name != new.name), new), key=lambda concept: concept.name))
