"""Guards are compiled with every option checked, and the field at fault named."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from google.protobuf import json_format

from rudder.sae_models import token_model
from rudder.server.program.errors import ProgramError
from rudder.server.program.rows import Registry
from rudder.server.safety.guards import REJECT, STOP, Guard, compile_guard
from rudder.v1 import policy_pb2
from tests.unit.programs import OTHER, PROBE, REGISTRY, SITE, VECTOR, feature

TERM = {"site": SITE, "row": PROBE, "weight": 2.0}
GUARD: dict[str, Any] = {
    "name": "hazard",
    "score": {"terms": [TERM, {"site": OTHER, "row": feature(1, "two"), "weight": -0.5}], "bias": 0.25},
    "moving_average": {"decay": 0.125},
    "level": 0.75,
    "min_tokens": 4,
    "action": "GUARD_ACTION_STOP",
}


def compiled(folder: Path = Path(), registry: Registry = REGISTRY, **changes: Any) -> Guard:
    """Compile GUARD with these changes; None removes a field."""
    document = {name: value for name, value in (GUARD | changes).items() if value is not None}
    return compile_guard(json_format.ParseDict(document, policy_pb2.Guard()), registry, folder, "guards[0]")


def test_every_field_reaches_the_compiled_guard() -> None:
    one = compiled(hold_back=3, refusal="No.", spare_other_choices=True, phase="PHASE_GENERATED")
    assert [(row.site, row.prompt, row.row.latent) for row in one.rows] == [(1, False, -1), (2, False, 1)]
    assert (one.weights, one.bias, one.level, one.min_tokens) == ((2.0, -0.5), 0.25, 0.75, 4)
    assert one.statistic == ("moving_average", 0.125)
    assert (one.action, one.hold_back, one.refusal, one.spare_other_choices) == (STOP, 3, "No.", True)
    assert (one.prompt, one.generated) == (False, True)


def test_defaults_hold_back_eight_tokens_and_judge_both_phases() -> None:
    one = compiled(moving_average=None)
    assert (one.hold_back, one.statistic, one.prompt, one.generated) == (8, ("none",), True, True)
    assert compiled(hold_back=0).hold_back == 0
    assert all(row.prompt for row in one.rows)


@pytest.mark.parametrize("action", ["REJECT", "CLAMP_FROM_START"])
def test_actions_on_prompts_judge_prompts(action: str) -> None:
    one = compiled(action=f"GUARD_ACTION_{action}")
    assert (one.prompt, one.generated, one.hold_back) == (True, False, 0)
    assert (one.action == REJECT) == (action == "REJECT")


MODEL = {"token_model": {"file": "m.safetensors", "sha256": "ab"}}
PROBLEMS = [
    ({"name": ""}, "name", "is empty"),
    ({"action": None}, "action", "names no action"),
    ({"score": {}}, "score", "neither terms nor a token model"),
    ({"score": {"terms": [TERM]} | MODEL}, "score", "both a token model and terms"),
    ({"score": {"terms": [TERM | {"weight": 0}]}}, "score.terms[0].weight", "is 0"),
    ({"score": {"terms": [TERM | {"site": "layers.9.mlp_out"}]}}, "score.terms[0].site", "is not one of"),
    ({"score": {"terms": [TERM | {"row": VECTOR}]}}, "score.terms[0].row", "no activation"),
    ({"level": "NaN"}, "level", "not a finite number"),
    ({"moving_average": {"decay": 1.0}}, "moving_average.decay", "not between 0 and 1"),
    ({"moving_average": None, "window": {"tokens": 5000}}, "window.tokens", "not in [1, 4096]"),
    ({"moving_average": None, "agreement": {"above": 0, "tokens": 0}}, "agreement.tokens", "not in [1, 4096]"),
    ({"moving_average": None, "agreement": {"above": 0, "tokens": 4}, "level": 1}, "level", "must be in [0, 1)"),
    ({"moving_average": None, "share": {"above": 0}, "level": 1}, "level", "must be in [0, 1)"),
    ({"hold_back": 5000}, "hold_back", "more than 4096"),
    ({"action": "GUARD_ACTION_COUNT", "hold_back": 1}, "hold_back", "count holds nothing back"),
    ({"action": "GUARD_ACTION_ANNOTATE", "refusal": "No."}, "refusal", "annotate refuses nothing"),
    ({"action": "GUARD_ACTION_REJECT", "spare_other_choices": True}, "spare_other_choices", "no choice alone"),
    ({"action": "GUARD_ACTION_REJECT", "phase": "PHASE_BOTH"}, "phase", "reject judges prompts"),
    ({"action": "GUARD_ACTION_CLAMP"}, "score.terms", "reads one row"),
    ({"action": "GUARD_ACTION_CLAMP", "phase": "PHASE_PROMPT"}, "phase", "PHASE_BOTH"),
    ({"score": MODEL}, "score.token_model.file", "not in the policy's folder"),
    ({"score": {"token_model": {"file": "../m", "sha256": "ab"}}}, "score.token_model.file", "not the name of a file"),
]


@pytest.mark.parametrize(("changes", "field", "problem"), PROBLEMS)
def test_problems_name_their_field(changes: dict[str, Any], field: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ProgramError) as error:
        compiled(tmp_path, **changes)
    assert error.value.field == f"guards[0].{field}"
    assert problem in error.value.message


def test_token_model_must_be_the_pinned_file(tmp_path: Path) -> None:
    model = token_model.TokenModel(np.zeros(1 << 10, np.float32), 0.5, 2, "vocabulary")
    sha256 = token_model.save(tmp_path / "m.safetensors", model)
    pinned = {"token_model": {"file": "m.safetensors", "sha256": sha256}}
    one = compiled(tmp_path, score=pinned)
    assert one.rows == ()
    assert one.token_model
    assert one.token_model.order == 2
    for vocabulary, served in (("vocabulary", True), ("another", False)):
        registry = replace(REGISTRY, vocabulary=vocabulary)
        document = GUARD | {"score": pinned}
        if served:
            assert compiled(tmp_path, registry, **document).token_model
        else:
            with pytest.raises(ProgramError, match="another tokenizer"):
                compiled(tmp_path, registry, **document)
    with pytest.raises(ProgramError, match="SHA-256"):
        compiled(tmp_path, score=MODEL)
    with pytest.raises(ProgramError, match="pins its token model"):
        compiled(tmp_path, score={"token_model": {"file": "m.safetensors"}})


def test_documented_policy_is_one_of_the_contract() -> None:
    text = (Path(__file__).parents[4] / "docs" / "guards.md").read_text(encoding="utf-8")
    document = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    message = json_format.ParseDict(document, policy_pb2.Policy())
    assert [guard.WhichOneof("statistic") for guard in message.guards] == ["moving_average", "window"]
