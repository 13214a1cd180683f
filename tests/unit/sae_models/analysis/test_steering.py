"""Calibration on a small model whose unembedding is planted: adding the direction of a word makes it say the word."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rudder.sae_models.activations import harvest
from rudder.sae_models.activations.hooks import parse_site
from rudder.sae_models.analysis import steering
from rudder.sae_models.analysis.candidates import Group
from rudder.sae_models.analysis.crossing import Budgets
from rudder.sae_models.analysis.sampling import Voice
from rudder.sae_models.analysis.steering import Room, Settings
from tests.unit import tiny

TOKEN = 900
PROMPTS = ("The cell", "A king", "Peace", "Viruses need a host")
SETTINGS = Settings(seeds=2, random_directions=8, budgets=Budgets(perplexity_ratio=3.0))


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    folder = tiny.save_model(tmp_path_factory.mktemp("model"))
    model = harvest.load_model(folder)
    with torch.no_grad():
        model.lm_head.weight *= 40
        # Nothing else points its way.
        model.lm_head.weight[TOKEN] *= 1.5
    return steering.room_of(
        Voice(model, harvest.load_tokenizer(folder), tokens=20), parse_site("layers.1.resid_post"), PROMPTS, 2
    )


def respond(room: Room, texts: Sequence[str]) -> Tensor:
    word = room.voice.tokenizer.decode([TOKEN])
    return torch.tensor([min(1.0, text.count(word) / 4) for text in texts])


def group(direction: Tensor) -> Group:
    return Group("group", (3,), (1.0,), torch.nn.functional.normalize(direction.detach(), dim=0))


def test_a_planted_direction_reaches_its_topic_within_the_budgets(room: Room) -> None:
    candidate = steering.calibrate_group(
        room, lambda texts: respond(room, texts), group(room.voice.model.lm_head.weight[TOKEN]), SETTINGS
    )
    assert candidate.s_max > 0
    (at_most,) = (point for point in candidate.curve if point.dose == candidate.s_max)
    assert candidate.response.value == pytest.approx(at_most.response)
    assert candidate.response.value > 5 * candidate.curve[0].response + 0.02
    assert candidate.curve[0].dose == 0
    for point in candidate.curve:
        if point.dose <= candidate.s_max:
            assert not SETTINGS.budgets.broken(point, candidate.curve[0])
    compared = steering.with_random(candidate, room, lambda texts: respond(room, texts), SETTINGS)
    assert not compared.inert


def test_a_direction_of_something_else_is_inert(room: Room) -> None:
    other = group(-room.voice.model.lm_head.weight[TOKEN])
    candidate = steering.calibrate_group(room, lambda texts: respond(room, texts), other, SETTINGS)
    assert steering.with_random(candidate, room, lambda texts: respond(room, texts), SETTINGS).inert


def test_groups_are_screened_by_what_they_reach(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering, "SCREENING_DOSE", 1.0)
    good = group(room.voice.model.lm_head.weight[TOKEN])
    others = [group(room.voice.model.lm_head.weight[token]) for token in (50, 60, 70)]
    named = [replace(each, kind=kind) for each, kind in zip((*others, good), "abcd", strict=True)]
    kept = steering.screened(room, lambda texts: respond(room, texts), named)
    assert (len(kept), kept[0].kind) == (steering.KEPT, "d")
    assert steering.screened(room, lambda texts: respond(room, texts), named[:2]) == named[:2]


def test_random_directions_are_tried_on_both_sides_and_drawn_once(room: Room) -> None:
    assert steering.neighbours((0.1, 0.2, 0.4), 0.3) == [0.2, 0.4]
    assert steering.neighbours((0.1, 0.2, 0.4), 0.2) == [0.2]
    assert steering.neighbours((0.1, 0.2, 0.4), 0.4) == [0.4]
    room.random_texts.clear()
    settings = Settings(random_directions=5, grid=(0.2, 0.4))
    levels = [steering.random_level(room, lambda texts: torch.rand(len(texts)), 0.3, settings) for _ in range(2)]
    assert set(room.random_texts) == {0.2, 0.4}
    assert len(room.random_texts[0.2]) == 5 * len(PROMPTS)
    assert levels[0] != levels[1]
    by_direction = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]).repeat_interleave(len(PROMPTS))
    assert steering.random_level(room, lambda _: by_direction, 0.2, settings) == pytest.approx(0.38)


def test_divergence_grows_with_the_dose(room: Room) -> None:
    direction = group(room.voice.model.lm_head.weight[TOKEN]).direction
    weak, strong = (room.steer(direction, dose).kl.mean() for dose in (0.1, 1.0))
    assert 0 < weak < strong
    assert room.unsteered.kl.abs().max() == 0


def test_texts_of_a_prompt_are_resampled_together(room: Room) -> None:
    assert room.cluster.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    values, cluster = torch.tensor([0.0, 1.0] * 40), torch.arange(40).repeat_interleave(2)
    same = steering.interval_of(values, cluster)
    assert (same.low, same.value, same.high) == (0.5, 0.5, 0.5)
    apart = steering.interval_of(values, torch.arange(80))
    assert 0.35 < apart.low < 0.5 < apart.high < 0.65
