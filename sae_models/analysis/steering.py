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
from rudder.sae_models.concepts import Calibration, Candidate, Interval, Point, Row

BUDGETS = Budgets()
BOOTSTRAPS = 2000
# Candidates of a concept that are calibrated: the one that is served, and the runner-up. They are those that reach most
# of the topic at one dose.
KEPT, SCREENING_DOSE = 2, 0.25
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
    """Prompts [n], each with a seed, that texts are drawn from at a site, and the unsteered texts.

    `random_texts`: those of random directions by dose, which all topics share.
    """

    voice: Voice
    site: Site
    prompts: Sequence[str]
    seeds: Sequence[int]
    unsteered: Trial = field(init=False)
    random_texts: dict[float, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "unsteered", self.draw(None))

    @property
    def cluster(self) -> Tensor:
        """The number of each text's prompt [n]: texts of one prompt are resampled together."""
        order = {prompt: number for number, prompt in enumerate(dict.fromkeys(self.prompts))}
        return torch.tensor([order[prompt] for prompt in self.prompts])

    def draw(self, steering: Steering | None) -> Trial:
        """Draw a text from each prompt."""
        texts, likely = sampling.measured(self.voice, self.prompts, self.seeds, steering)
        decoded = sampling.decoded(texts, self.voice.tokenizer)
        repeated, distinct = sampling.repetition(texts.tokens), sampling.distinct(texts.tokens)
        return Trial(decoded, likely.nats, likely.kl, repeated, distinct)

    def steer(self, direction: Tensor, dose: float) -> Trial:
        """Draw texts while x is displaced by `dose` * ||x|| along a unit direction [d]."""
        return self.draw(self.along(direction, dose))

    def texts(self, direction: Tensor, dose: float) -> list[str]:
        """Draw such texts without measuring them."""
        drawn = sampling.generate(self.voice, self.prompts, self.seeds, self.along(direction, dose))
        return sampling.decoded(drawn, self.voice.tokenizer)

    def along(self, direction: Tensor, dose: float) -> Steering:
        """Return the steering of all texts along one direction."""
        n = len(self.prompts)
        return Steering(self.site, direction[None], torch.zeros(n, dtype=torch.long), torch.full((n,), dose))


def room_of(voice: Voice, site: Site, prompts: Sequence[str], seeds: int) -> Room:
    """Build a room in which each prompt has as many texts as there are seeds."""
    repeated = [prompt for prompt in prompts for _ in range(seeds)]
    return Room(voice, site, repeated, [7919 * number + 1 for number in range(len(repeated))])


def calibrate_group(room: Room, respond: Response, group: Group, settings: Settings) -> Candidate:
    """Calibrate rows for a topic; the `random` of the candidate is still 0."""
    silent = respond(room.unsteered.texts)
    unsteered, responses = room.unsteered.point(0.0, silent), {0.0: silent}

    def measure(dose: float) -> Point:
        trial = room.steer(group.direction, dose)
        responses[dose] = respond(trial.texts)
        return trial.point(dose, responses[dose])

    found = crossing.first_crossing(measure, lambda point: settings.budgets.broken(point, unsteered), settings.grid)
    rows = tuple(Row(index, weight) for index, weight in zip(group.latents, group.weights, strict=True))
    interval = interval_of(responses[found.s_max], room.cluster)
    curve = (unsteered, *found.points)
    return Candidate(group.kind, rows, found.s_max, found.limit, curve, interval, 0.0)


def random_level(room: Room, respond: Response, s_max: float, settings: Settings) -> float:
    """Return what random directions reach of a topic: the 95th percentile of their mean responses, at the doses of the
    grid on both sides of s_max, the larger one.

    With fewer texts than a candidate's, their spread is wider: the bar is rather too high than too low.
    """
    level = 0.0
    for dose in neighbours(settings.grid, s_max):
        if dose not in room.random_texts:
            room.random_texts[dose] = draw_random(room, dose, settings.random_directions)
        means = respond(room.random_texts[dose]).view(settings.random_directions, -1).mean(1)
        level = max(level, float(means.quantile(RANDOM_PERCENTILE)))
    return level


def neighbours(grid: Sequence[float], dose: float) -> list[float]:
    """Return the largest dose of a grid up to `dose`, and the smallest one from there on; one if both are the same."""
    below = [each for each in grid if each <= dose][-1:]
    above = [each for each in grid if each >= dose][:1]
    return list(dict.fromkeys(below + above))


def draw_random(room: Room, dose: float, directions: int) -> list[str]:
    """Draw texts with random directions at a dose, each on the first RANDOM_PROMPTS prompts, direction by direction."""
    prompts = list(dict.fromkeys(room.prompts))[:RANDOM_PROMPTS]
    n = directions * len(prompts)
    width = room.voice.model.config.get_text_config().hidden_size
    which = torch.arange(directions).repeat_interleave(len(prompts))
    steering = Steering(room.site, random_directions(directions, width, 0), which, torch.full((n,), dose))
    texts = sampling.generate(room.voice, prompts * directions, range(n), steering)
    return sampling.decoded(texts, room.voice.tokenizer)


def calibrate(
    room: Room, respond: Response, bundle: Bundle, ranking: Ranking, scores: Scores, settings: Settings
) -> tuple[Candidate, ...]:
    """Calibrate the best groups of a ranking; return the best and the runner-up, those that are not inert first."""
    groups = screened(room, respond, groups_of(bundle, ranking, scores.output))
    tried = (calibrate_group(room, respond, group, settings) for group in groups)
    compared = [described(with_random(each, room, respond, settings), bundle, scores) for each in tried]
    return tuple(sorted(compared, key=lambda candidate: (bool(candidate.inert), -candidate.response.value)))


def screened(room: Room, respond: Response, groups: Sequence[Group]) -> list[Group]:
    """Return the groups that reach most of a topic at SCREENING_DOSE."""
    if len(groups) <= KEPT:
        return list(groups)
    reached = {group.kind: respond(room.texts(group.direction, SCREENING_DOSE)).mean() for group in groups}
    return sorted(groups, key=lambda group: -reached[group.kind])[:KEPT]


def with_random(candidate: Candidate, room: Room, respond: Response, settings: Settings) -> Candidate:
    """Return a candidate with what random directions reach at its dose."""
    if candidate.s_max <= 0:
        return candidate
    return replace(candidate, random=random_level(room, respond, candidate.s_max, settings))


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
