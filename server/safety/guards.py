"""A guard as it judges, and how it is compiled from its message."""

from dataclasses import dataclass
from pathlib import Path

from rudder.sae_models import token_model
from rudder.sae_models.errors import UserError
from rudder.sae_models.token_model import TokenModel
from rudder.server.preflight import is_file
from rudder.server.program.compile import phases
from rudder.server.program.errors import ProgramError, number, require
from rudder.server.program.gates import checked_parameter
from rudder.server.program.rows import Registry, checked_name
from rudder.server.program.watch import Watched, compile_watch
from rudder.v1 import policy_pb2, program_pb2

COUNT = policy_pb2.GUARD_ACTION_COUNT
ANNOTATE = policy_pb2.GUARD_ACTION_ANNOTATE
CLAMP = policy_pb2.GUARD_ACTION_CLAMP
CLAMP_FROM_START = policy_pb2.GUARD_ACTION_CLAMP_FROM_START
STOP = policy_pb2.GUARD_ACTION_STOP
REJECT = policy_pb2.GUARD_ACTION_REJECT
# Names of the actions in metrics, logs and audit entries.
ACTIONS = {
    action: policy_pb2.GuardAction.Name(action).removeprefix("GUARD_ACTION_").lower()
    for action in (COUNT, ANNOTATE, CLAMP, CLAMP_FROM_START, STOP, REJECT)
}
# Actions that need the whole prompt's verdict before the first token runs on.
OF_PROMPTS = (CLAMP_FROM_START, REJECT)
# Actions whose guard has a text for the client.
REFUSING = (STOP, REJECT)
DEFAULT_HOLD_BACK = 8
# A window of the host's statistics, and tokens that a stream holds back.
MAX_WINDOW = MAX_HOLD_BACK = 4096


@dataclass(frozen=True)
class Guard:
    """A compiled guard.

    The score of a token is `bias` plus the sum of `weights` [n] times the activations of `rows` [n]; or that of
    `token_model`, and then there are no rows. `statistic`: name and operands of a `sae_models.statistics.Statistic`,
    which must exceed `level` after at least `min_tokens` tokens. `prompt`, `generated`: the tokens that it judges.
    `hold_back`: tokens behind one that are judged before it leaves.
    """

    name: str
    rows: tuple[Watched, ...]
    weights: tuple[float, ...]
    bias: float
    statistic: tuple[str, *tuple[float, ...]]
    level: float
    action: policy_pb2.GuardAction
    min_tokens: int = 0
    prompt: bool = True
    generated: bool = True
    hold_back: int = 0
    refusal: str = ""
    spare_other_choices: bool = False
    token_model: TokenModel | None = None


def compile_guard(message: policy_pb2.Guard, registry: Registry, folder: Path, field: str) -> Guard:
    """Compile a guard; `folder` has the file of its token model. Raises ProgramError, naming the field at fault."""
    require(message.name, f"{field}.name", "is empty")
    checked_name(message.name, registry, f"{field}.name")
    require(message.action in ACTIONS, f"{field}.action", "names no action")
    prompt, generated = judged_phases(message, f"{field}.phase")
    check_options(message, field)
    terms, model = message.score.terms, model_of(message.score, registry, folder, f"{field}.score")
    if message.action == CLAMP:
        require(len(terms) == 1, f"{field}.score.terms", "the gate of a program reads one row")
    rows = [(term.site, term.row) for term in terms]
    return Guard(
        name=message.name,
        rows=compile_watch(rows, registry, f"{field}.score.terms", prompt=prompt),
        weights=tuple(weight_of(term.weight, f"{field}.score.terms[{i}].weight") for i, term in enumerate(terms)),
        bias=number(message.score.bias, f"{field}.score.bias"),
        statistic=statistic_of(message, field),
        level=number(message.level, f"{field}.level"),
        action=message.action,
        min_tokens=message.min_tokens,
        prompt=prompt,
        generated=generated,
        hold_back=hold_back_of(message),
        refusal=message.refusal,
        spare_other_choices=message.spare_other_choices,
        token_model=model,
    )


def model_of(score: policy_pb2.Score, registry: Registry, folder: Path, field: str) -> TokenModel | None:
    """Load the token model of a score, which has either terms or a model. Raises ProgramError."""
    if not score.HasField("token_model"):
        require(score.terms, field, "has neither terms nor a token model")
        return None
    require(not score.terms and not score.bias, field, "has both a token model and terms or a bias")
    file, field = score.token_model.file, f"{field}.token_model"
    require(
        file and Path(file).name == file, f"{field}.file", f"{file!r} is not the name of a file beside the policy's"
    )
    require(is_file(str(folder / file)), f"{field}.file", f"{file!r} is not in the policy's folder")
    require(score.token_model.sha256, f"{field}.sha256", "is empty: a policy pins its token model")
    try:
        model = token_model.load(folder / file, score.token_model.sha256)
    except UserError as error:
        raise ProgramError(field, str(error)) from error
    known = not registry.vocabulary or model.vocabulary == registry.vocabulary
    require(known, f"{field}.file", "was trained on the ids of another tokenizer than the served model's")
    return model


def weight_of(weight: float, field: str) -> float:
    """Return the weight of a term. Raises ProgramError if it is 0, as one that was forgotten is."""
    require(weight, field, "is 0: the term would not count")
    return number(weight, field)


def judged_phases(message: policy_pb2.Guard, field: str) -> tuple[bool, bool]:
    """Return whether the guard judges (prompt tokens, generated tokens)."""
    prompt, generated = phases(message.phase, field)
    if message.action in OF_PROMPTS:
        named = message.phase in (program_pb2.PHASE_UNSPECIFIED, program_pb2.PHASE_PROMPT)
        require(named, field, f"{ACTIONS[message.action]} judges prompts: PHASE_PROMPT")
        return True, False
    if message.action == CLAMP:
        require(prompt and generated, field, "the gate of a program reads all tokens: PHASE_BOTH")
    return prompt, generated


def check_options(message: policy_pb2.Guard, field: str) -> None:
    """Raise ProgramError if a field is set that this action does not have."""
    action = ACTIONS[message.action]
    require(not message.refusal or message.action in REFUSING, f"{field}.refusal", f"{action} refuses nothing")
    stops = message.action == STOP
    require(stops or not message.HasField("hold_back"), f"{field}.hold_back", f"{action} holds nothing back")
    require(message.hold_back <= MAX_HOLD_BACK, f"{field}.hold_back", f"is more than {MAX_HOLD_BACK}")
    spares = message.spare_other_choices
    require(stops or not spares, f"{field}.spare_other_choices", f"{action} ends no choice alone")


def hold_back_of(message: policy_pb2.Guard) -> int:
    """Return how many tokens behind one must be judged before it leaves."""
    if message.action != STOP:
        return 0
    return message.hold_back if message.HasField("hold_back") else DEFAULT_HOLD_BACK


def statistic_of(message: policy_pb2.Guard, field: str) -> tuple[str, *tuple[float, ...]]:
    """Return name and operands of the guard's statistic. Raises ProgramError if one is out of range."""
    name = message.WhichOneof("statistic") or "none"
    if name == "none":
        return (name,)
    if name == "agreement":
        tokens, above = message.agreement.tokens, message.agreement.above
        require(0 <= message.level < 1, f"{field}.level", f"{message.level:g}: a share to exceed must be in [0, 1)")
        require(1 <= tokens <= MAX_WINDOW, f"{field}.agreement.tokens", f"{tokens} is not in [1, {MAX_WINDOW}]")
        return name, number(above, f"{field}.agreement.above"), tokens
    return name, checked_parameter(name, message, MAX_WINDOW, field)
