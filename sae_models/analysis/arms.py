"""Ways to steer towards a topic, compared: what each reaches of the topic, at what cost in fluency and in the prompt.

After AxBench (arXiv 2501.17148), with classifiers in place of a language model as judge: each text is graded 0, 1 or 2
for topic, fluency and keeping to its prompt; its score is their harmonic mean, 0 if one is 0. Doses are chosen on half
of the prompts, texts are reported on the other half.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor
from torch.nn import functional

from rudder.sae_models.analysis.candidates import Group, random_directions
from rudder.sae_models.analysis.crossing import Budgets, first_crossing
from rudder.sae_models.analysis.judges import Panel, Represent
from rudder.sae_models.analysis.sampling import Steering
from rudder.sae_models.analysis.steering import Room, Trial
from rudder.sae_models.bundle.bundle import Bundle

# Fixed before the first report. Grades 1 and 2 of the topic: least probability.
TOPIC = (0.2, 0.5)
# Of fluency: most perplexity, as a ratio to the mean of unsteered texts, and most repeated 4-grams above their mean.
PERPLEXITY, REPETITION = (2.5, 1.5), (0.2, 0.05)
# Of keeping to the prompt: similarity of at least the median of unsteered texts to prompts of others; of at least the
# lower quartile of unsteered texts to their own.
RANDOM_DIRECTIONS = 8
SEED = 1
SAE_ARMS = ("input", "output", "group", "output-group")


@dataclass(frozen=True)
class Arm:
    """A way to steer: unit directions [K, d], of which text i has number i modulo K. `words`: what it says itself."""

    name: str
    directions: Tensor
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rubric:
    """What grades are relative to: mean nats and repetition of unsteered texts, and similarities to their prompts."""

    nats: float
    repeated: float
    other_prompt: float
    own_prompt: float

    def grades(self, trial: Trial, response: Tensor, kept: Tensor) -> Tensor:
        """Return the grades of each text for topic, fluency and prompt [n, 3]."""
        dear, rise = trial.nats - self.nats, trial.repeated - self.repeated
        fluent = [(dear <= log(p)) & (rise <= r) for p, r in zip(PERPLEXITY, REPETITION, strict=True)]
        topic = [response >= least for least in TOPIC]
        keeping = [kept >= self.other_prompt, kept >= max(self.other_prompt, self.own_prompt)]
        columns = [first.float() + (first & second).float() for first, second in (topic, fluent, keeping)]
        return torch.stack(columns, 1)


def harmonic(grades: Tensor) -> Tensor:
    """Return the harmonic mean of each text's grades [n, 3], 0 if one is 0."""
    return grades.shape[1] / (1 / grades).sum(1)


def similarity(represent: Represent, texts: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """Return the cosine [n] of texts and prompts in the judges' embeddings."""
    return functional.cosine_similarity(represent(texts), represent(prompts), dim=1)


def rubric_of(room: Room, represent: Represent) -> Rubric:
    """Return the rubric of a room: what its unsteered texts are like."""
    plain, prompts = room.unsteered, list(room.prompts)
    own = similarity(represent, plain.texts, prompts)
    other = similarity(represent, plain.texts, prompts[1:] + prompts[:1])
    nats, repeated = float(plain.nats.mean()), float(plain.repeated.mean())
    return Rubric(nats, repeated, float(other.median()), float(own.quantile(0.25)))


@dataclass(frozen=True)
class Outcome:
    """Figures of texts [n]: probability of the topic, and without the arm's own words; nats under the plain model and
    divergence from it; repeated 4-grams; similarity to the prompt; and the score.
    """

    response: Tensor
    response_without: Tensor
    nats: Tensor
    kl: Tensor
    repeated: Tensor
    kept: Tensor
    score: Tensor


@dataclass(frozen=True)
class Stage:
    """Where arms are compared: a room, the rubric of its unsteered texts, the judges and what the second one reads."""

    room: Room
    panel: Panel
    represent: Represent
    rubric: Rubric

    def outcome(self, trial: Trial, topic: str, words: Sequence[str] = ()) -> Outcome:
        """Judge texts of this stage's prompts."""
        response = self.panel.response(trial.texts, topic)
        without = self.panel.response(trial.texts, topic, words) if words else response
        kept = similarity(self.represent, trial.texts, self.room.prompts)
        score = harmonic(self.rubric.grades(trial, response, kept))
        return Outcome(response, without, trial.nats, trial.kl, trial.repeated, kept, score)

    def steered(self, arm: Arm, dose: float) -> Trial:
        """Draw texts with an arm at a dose."""
        n = len(self.room.prompts)
        which = torch.arange(n) % len(arm.directions)
        return self.room.draw(Steering(self.room.site, arm.directions, which, torch.full((n,), dose)))


def stage_of(room: Room, panel: Panel, represent: Represent) -> Stage:
    """Build a stage."""
    return Stage(room, panel, represent, rubric_of(room, represent))


def arms_of(bundle: Bundle, groups: Sequence[Group], difference: Tensor) -> list[Arm]:
    """Return the steered arms of a topic: the rows of the SAE, the difference of means, and random directions."""
    width = len(difference)
    rows = [Arm(group.kind, group.direction[None], own_words(bundle, group)) for group in groups]
    return [
        *rows,
        Arm("difference-of-means", difference[None]),
        Arm("random", random_directions(RANDOM_DIRECTIONS, width, SEED)),
    ]


def own_words(bundle: Bundle, group: Group) -> tuple[str, ...]:
    """Return the words of at least three letters that a group's latents promote most."""
    tokens = (word.token for latent in group.latents for word in bundle.catalogue.get(latent).promoted)
    return tuple(sorted({word for token in tokens if len(word := token.strip().lower()) >= 3 and word.isalpha()}))


@dataclass(frozen=True)
class Chosen:
    """Doses of an arm chosen on tuning prompts, and the outcome of each on the others.

    `best`: of the highest mean score. `within`: the largest by first crossing of the budgets; 0 if none is within.
    `tuned`: mean probability of the topic at `within`, on the tuning prompts.
    """

    best: float
    within: float
    tuned: float
    at_best: Outcome
    at_within: Outcome


def choose(tune: Stage, report: Stage, arm: Arm, topic: str, doses: Sequence[float], budgets: Budgets) -> Chosen:
    """Choose the doses of an arm on one stage, and draw texts with them on another."""
    trials = {dose: tune.steered(arm, dose) for dose in doses}
    outcomes = {dose: tune.outcome(trial, topic) for dose, trial in trials.items()}
    plain = tune.outcome(tune.room.unsteered, topic)
    unsteered = tune.room.unsteered.point(0.0, plain.response)
    within = first_crossing(
        lambda dose: trials[dose].point(dose, outcomes[dose].response),
        lambda point: budgets.broken(point, unsteered),
        doses,
        bisections=0,
    ).s_max
    best = max(doses, key=lambda dose: float(outcomes[dose].score.mean()))
    reported = {
        dose: report.outcome(report.steered(arm, dose) if dose else report.room.unsteered, topic, arm.words)
        for dose in {best, within}
    }
    tuned = outcomes[within].response if within else plain.response
    return Chosen(best, within, float(tuned.mean()), reported[best], reported[within])


def unsteered(report: Stage, topic: str) -> Chosen:
    """Return what unsteered texts reach of a topic."""
    outcome = report.outcome(report.room.unsteered, topic)
    return Chosen(0.0, 0.0, float(outcome.response.mean()), outcome, outcome)


def prompted(report: Stage, topic: str) -> Chosen:
    """Return what a sentence about the topic in front of each prompt reaches."""
    words = topic.replace("-", " ")
    prompts = [f"This text is about {words}. {prompt}" for prompt in report.room.prompts]
    room = Room(report.room.voice, report.room.site, prompts, report.room.seeds)
    outcome = report.outcome(room.unsteered, topic)
    return Chosen(0.0, 0.0, float(outcome.response.mean()), outcome, outcome)


def best_of_sae(arms: Mapping[str, Chosen]) -> Chosen:
    """Return the SAE's rows that reach most of the topic within the budgets, on the tuning prompts."""
    return max((arms[name] for name in SAE_ARMS if name in arms), key=lambda chosen: chosen.tuned)


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval from a bootstrap over concepts, and over the prompts of each."""

    value: float
    low: float
    high: float


def resampled(figures: Sequence[Tensor], bootstraps: int = 2000) -> Tensor:
    """Return means of figures (one tensor [n] per concept) over concepts, [1 + bootstraps]: as they are, and resampled.

    All calls draw the same concepts and, for equal n, the same prompts, so differences of results are paired.
    """
    generator = torch.Generator().manual_seed(0)
    concepts, values = len(figures), torch.stack([figure.float() for figure in figures])
    chosen = torch.randint(concepts, (bootstraps, concepts), generator=generator)
    prompts = torch.randint(values.shape[1], (bootstraps, concepts, values.shape[1]), generator=generator)
    drawn = values[chosen].gather(2, prompts).mean((1, 2))
    return torch.cat([values.mean()[None], drawn])


def estimate(means: Tensor) -> Estimate:
    """Return the estimate of `resampled` means, or of a function of them."""
    low, high = means[1:].quantile(torch.tensor([0.025, 0.975])).tolist()
    return Estimate(float(means[0]), low, high)


def prompts_of(texts: Sequence[str], words: int) -> list[str]:
    """Return the first words of texts, each once."""
    return list(dict.fromkeys(" ".join(text.split()[:words]) for text in texts))
