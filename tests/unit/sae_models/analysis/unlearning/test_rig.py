"""Offline runs behind an edit equal the whole model with a hook, and sampling with a cache equals sampling without."""

import pytest
import torch
from torch import Tensor

from rudder.sae_models.activations.corpus import Windows
from rudder.sae_models.activations.hooks import hooked
from rudder.sae_models.analysis.detector import Detector, window_mean
from rudder.sae_models.analysis.unlearning.generation import repeated_share, sample
from rudder.sae_models.analysis.unlearning.rig import Context, Texts, run_edited, run_whole
from rudder.sae_models.analysis.unlearning.steering import (
    AlarmGate,
    ShareGate,
    Steering,
    TokenGate,
    always,
    blended,
    columns,
    in_prompt,
    untouched,
    vector_rows,
)
from rudder.sae_models.sae import Rows
from tests.unit.sae_models.analysis.unlearning.rigs import SENTENCES, rig

D = 192


@pytest.fixture(scope="module")
def texts() -> Texts:
    windows, _ = rig().encode([sentence.format("x") for sentence in SENTENCES.values()])
    return rig().texts(windows)


def push(gate: object = always) -> Steering:
    direction = torch.ones(1, D) / D**0.5
    return Steering(vector_rows(direction), columns("add", [0.5], relative=1), gate)  # type: ignore[arg-type]


def test_a_run_behind_an_edit_equals_the_hooked_model(texts: Texts) -> None:
    plain = run_whole(rig().model, texts)
    log_p, hits, touched = run_edited(rig(), texts, push(), plain)
    counted = texts.windows.counted

    def edit(x: Tensor) -> Tensor:
        return push()(Context(x, counted[:, : x.shape[1]], texts.prompt)).x

    with hooked(rig().model, rig().site, edit):
        expected = run_whole_in_one_pass(texts)
    torch.testing.assert_close(log_p, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(touched, counted)
    assert not torch.equal(log_p, plain[0])
    assert hits.shape == log_p.shape


def run_whole_in_one_pass(texts: Texts) -> Tensor:
    with torch.no_grad():
        log_p = rig().model(texts.windows.tokens).logits[:, :-1].log_softmax(-1)
    chosen = log_p.gather(-1, texts.windows.tokens[:, 1:, None]).squeeze(-1)
    return torch.where(texts.windows.counted[:, 1:], chosen, 0.0)


def test_what_an_edit_does_not_touch_is_as_the_model_reads_it(texts: Texts) -> None:
    plain = run_whole(rig().model, texts)
    log_p, hits, touched = run_edited(rig(), texts, untouched, plain)
    assert torch.equal(log_p, plain[0])
    assert torch.equal(hits, plain[1])
    assert not touched.any()


def test_sampling_with_a_cache_equals_sampling_without() -> None:
    """Also where the gate opens in the middle of the answer, and where the prompt opens it from its start."""
    windows, _ = rig().encode(["Bacteria have a cell wall"] * 2)
    x = rig().texts(windows).x
    detector = Detector(x[0, 3] / x[0, 3].norm(), 0.0)
    score = float(detector.score(x[0, 1:]).amax())
    for level in (0.2 * score, 2 * score):
        edit = push(AlarmGate(detector, level, 4, 4))
        cached = sample(rig().model, windows.tokens, 6, 0, rig().site, edit)
        tokens = windows.tokens
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            grown = rig().texts(window_of(tokens), torch.full((2,), windows.tokens.shape[1]))
            effect = edit(grown.context(torch.arange(2)))
            with torch.no_grad():
                logits = rig().upper(inputs_embeds=effect.x).logits[:, -1]
            noise = torch.rand(logits.shape, generator=generator).clamp_min(1e-20)
            tokens = torch.cat([tokens, (logits / 0.8 - (-noise.log()).log()).argmax(-1, keepdim=True)], 1)
        assert torch.equal(cached, tokens[:, windows.tokens.shape[1] :])


def window_of(tokens: Tensor) -> Windows:
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[:, 0] = False
    return Windows(tokens, counted, torch.arange(len(tokens)), torch.full((len(tokens),), tokens.shape[1]))


SCORES = torch.tensor([[9.0, 0.0, 3.0, 0.0, 0.0, 3.0], [9.0, 0.0, 0.0, 0.0, 3.0, 0.0]])
TEXT = Context(SCORES[..., None], torch.tensor([[False, *[True] * 5]] * 2), torch.tensor([4, 4]))
SCORE = Detector(torch.ones(1), 0.0)


def test_an_alarm_in_the_prompt_opens_from_the_start_and_one_in_the_answer_from_there() -> None:
    is_open = AlarmGate(SCORE, 1.4, window=2, min_tokens=2)(TEXT) & TEXT.counted
    assert is_open.tolist() == [[False, *[True] * 5], [False, False, False, False, True, True]]


def test_no_alarm_before_enough_tokens() -> None:
    is_open = AlarmGate(SCORE, 1.4, window=2, min_tokens=5)(TEXT)
    assert is_open.tolist() == [[False] * 5 + [True], [False] * 5 + [True]]


def test_bos_raises_no_alarm() -> None:
    assert not AlarmGate(SCORE, 3.5, window=1, min_tokens=1)(TEXT).any()


def test_window_mean_is_of_the_last_counted_scores() -> None:
    score = torch.tensor([[5.0, 1.0, 2.0, 9.0, 3.0], [0.0, 4.0, 4.0, 1.0, 0.0]])
    counted = torch.tensor([[False, True, True, False, True], [False, True, True, True, False]])
    mean, count = window_mean(score, counted, 2)
    assert count.tolist() == [[0, 1, 2, 2, 3], [0, 1, 2, 3, 3]]
    assert mean[counted].tolist() == [1.0, 1.5, 2.5, 4.0, 4.0, 2.5]


def test_share_gate_judges_the_prompt_and_opens_at_active_tokens() -> None:
    rows = Rows(torch.ones(1, 1), torch.zeros(1), torch.ones(1), torch.ones(1, 1))
    assert in_prompt(TEXT).sum(1).tolist() == [4, 4]
    assert TokenGate(rows)(TEXT).sum(1).tolist() == [2, 1]
    is_open = ShareGate(rows, 0.3)(TEXT)
    assert is_open.tolist() == [[False, False, True, False, False, True], [False] * 6]
    assert not ShareGate(rows, 0.35)(TEXT).any(), "active tokens of the answer do not open it"


def test_a_blend_of_weight_one_gives_the_mean() -> None:
    mean = torch.tensor([0.5])
    edited = blended(mean, 1.0, always)(TEXT).x
    assert (edited[:, 1:] == 0.5).all()
    assert (edited[:, 0] == 9).all()


def test_repeated_share() -> None:
    assert repeated_share(torch.tensor([[1, 2, 1, 2, 1, 2, 1, 2], [1, 2, 3, 4, 5, 6, 7, 8]])).tolist() == [
        pytest.approx(0.6),
        0,
    ]
