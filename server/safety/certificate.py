"""The certificate of a policy: does it act on this engine as it did where its evaluation was recorded?

Beside a policy lie `NAME.evaluation.jsonl.xz`, texts with what each guard, edit and gate did on a reference
configuration, and `NAME.certificate.json`, what a rerun on another configuration found. A certificate is of one
fingerprint: another dtype, quantisation, device, version of vLLM, model, bundle or content of the policy makes it
stale.
"""

import hashlib
import hmac
import lzma
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from rudder.sae_models.errors import UserError
from rudder.sae_models.files import write_atomically
from rudder.server.engine import adapter
from rudder.server.engine.engine import Engine
from rudder.server.safety.policy import SHADOW, digest_of_message
from rudder.server.safety.problems import Problem
from rudder.v1 import policy_pb2

T = TypeVar("T")
Result = Literal["PASS", "DEGRADED"]
Status = Literal["PASS", "DEGRADED", "STALE", "NONE"]
# Two runs of one configuration differ by the batches that they happen to form: a statistic that passes close to its
# level crosses it a token sooner or later, and an edit touches a few tokens more or less.
POSITION_TOLERANCE, COUNT_TOLERANCE = 2, 0.1
MAX_FLIPPED = 100


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the files."""


class Fingerprint(Section, frozen=True):
    """What a policy's effect depends on: its content, model and bundles by hash, and how the engine computes."""

    policy: str
    model: str
    bundles: dict[str, str]
    engine: dict[str, str]


class Acts(Section, frozen=True):
    """What a policy did on one text.

    `guards`: the first position at which each holds, null: at none. `edits`: tokens that each edit of its program
    touched. `gates`: tokens at which the program's gate was open, where it has one.
    """

    guards: dict[str, int | None] = {}
    edits: dict[str, int] = {}
    gates: dict[str, int] = {}


class Text(Section, frozen=True):
    """A text of an evaluation: a text or a chat, and an answer, whose tokens count as generated."""

    text: str = ""
    messages: tuple[dict[str, str], ...] = ()
    answer: str = ""

    @property
    def sha256(self) -> str:
        """Identifies the text where the text itself must not be shown."""
        return hashlib.sha256(msgspec.json.encode((self.text, self.messages, self.answer))).hexdigest()


class Case(Section, frozen=True):
    """A text with what the policy did on it on the reference configuration."""

    sha256: str
    text: Text
    expected: Acts


class Evaluation(Section, frozen=True):
    """The first line of an evaluation's file, without `cases`, which follow one a line."""

    policy: str
    version: int
    recorded: str
    fingerprint: Fingerprint
    cases: tuple[Case, ...] = ()


class Part(Section, frozen=True):
    """One guard, edit or gate: in how many texts it acted where the evaluation was recorded, and in how many of all
    texts it acts otherwise now. `flipped`: hashes of those.
    """

    name: str
    result: Result
    texts: int
    acted: int
    flips: int
    flipped: tuple[str, ...]


class Certificate(Section, frozen=True):
    """What a rerun of an evaluation found. `max_flips`: the share of texts up to which a part passes."""

    policy: str
    version: int
    result: Result
    date: str
    max_flips: float
    evaluation: str
    fingerprint: Fingerprint
    parts: tuple[Part, ...]
    # HMAC of the other fields under policies.certificate_key; empty without one.
    seal: str = ""


def seal_of(certificate: Certificate, key: bytes) -> str:
    """Return the seal that a certificate must have."""
    content = msgspec.json.encode(msgspec.structs.replace(certificate, seal=""), order="sorted")
    return hmac.new(key, b"certificate" + content, hashlib.sha256).hexdigest()


def sealed(certificate: Certificate, key: bytes | None) -> Certificate:
    """Return a certificate with its seal, where there is a key."""
    return msgspec.structs.replace(certificate, seal=seal_of(certificate, key)) if key else certificate


def fingerprint(engine: Engine, message: policy_pb2.Policy) -> Fingerprint:
    """Return the fingerprint of a policy on a running engine."""
    bundles = {name: bundle.sha256 for name, bundle in engine.bundles.items()}
    model = engine.model.sha256 or engine.model.name
    computing = adapter.numerics(engine.llm)
    computing |= {"bank": engine.registry.layout.backend, "tokenizer": engine.encoding_digest}
    computing["model files"] = engine.model.settings
    return Fingerprint(policy=content_digest(message), model=model, bundles=bundles, engine=computing)


def content_digest(message: policy_pb2.Policy) -> str:
    """Compute the digest of what decides when a policy acts: its program, its guards and the bundles that they read.

    Whom it binds, its mode and its texts may change without another evaluation.
    """
    content = policy_pb2.Policy(bundles=message.bundles)
    if message.HasField("program"):
        content.program.CopyFrom(message.program)
    for guard in message.guards:
        content.guards.add().CopyFrom(guard)
        content.guards[-1].ClearField("refusal")
    return digest_of_message(content)


def certified(policy: str, evaluation: Evaluation, digest: str, now: Fingerprint, acts: Sequence[Acts], max_flips: float
              ) -> Certificate:  # fmt: skip
    """Compare what a policy does now with what it did. `digest`: SHA-256 of the evaluation's file."""
    parts = tuple(compare(evaluation.cases, acts, max_flips))
    return Certificate(
        policy=policy,
        version=evaluation.version,
        result="DEGRADED" if any(part.result == "DEGRADED" for part in parts) else "PASS",
        date=today(),
        max_flips=max_flips,
        evaluation=digest,
        fingerprint=now,
        parts=parts,
    )


def compare(cases: Sequence[Case], acts: Sequence[Acts], max_flips: float) -> Iterable[Part]:
    """Compare each guard, edit and gate over all texts."""
    expected, measured = [parts_of(case.expected) for case in cases], [parts_of(act) for act in acts]
    for name in dict.fromkeys(name for act in (*expected, *measured) for name in act):
        pairs = [(before.get(name), now.get(name)) for before, now in zip(expected, measured, strict=True)]
        flipped = [case.sha256 for case, (before, now) in zip(cases, pairs, strict=True) if is_flip(name, before, now)]
        yield Part(
            name=name,
            result="DEGRADED" if len(flipped) > max_flips * len(cases) else "PASS",
            texts=len(cases),
            acted=sum(has_acted(name, before) for before, _ in pairs),
            flips=len(flipped),
            flipped=tuple(flipped[:MAX_FLIPPED]),
        )


def parts_of(acts: Acts) -> dict[str, int | None]:
    """Return what each guard, edit and gate did, by `guard NAME`, `edit NAME`, `gate SITE`."""
    guards = {f"guard {name}": position for name, position in acts.guards.items()}
    edits = {f"edit {name}": touched for name, touched in acts.edits.items()}
    return guards | edits | {f"gate {site}": tokens for site, tokens in acts.gates.items()}


def has_acted(name: str, value: int | None) -> bool:
    """Whether a guard held, an edit touched a token, or a gate was open."""
    return value is not None if name.startswith("guard ") else bool(value)


def is_flip(name: str, before: int | None, now: int | None) -> bool:
    """Whether a part acts otherwise than it did: not at all instead of somewhere, or further apart than runs differ."""
    if has_acted(name, before) != has_acted(name, now):
        return True
    guard, before, now = name.startswith("guard "), before or 0, now or 0
    tolerance = POSITION_TOLERANCE if guard else max(1.0, COUNT_TOLERANCE * before)
    return abs(now - before) > tolerance


def require_exercised(cases: Sequence[Case]) -> None:
    """Raise UserError if the texts cannot tell whether a policy acts: no part may pass by never acting."""
    acts = [parts_of(case.expected) for case in cases]
    if not any(acts):
        raise UserError("texts: they show nothing of what the policy does: add some")
    for name in dict.fromkeys(name for act in acts for name in act if not name.startswith("edit ")):
        acted = sum(has_acted(name, act[name]) for act in acts)
        if not acted or (acted == len(acts) and name.startswith("guard ")):
            raise UserError(f"texts: {name} acts on {'all' if acted else 'none'} of the {len(acts)} texts: add others")
    edits = [value for act in acts for name, value in act.items() if name.startswith("edit ")]
    if edits and not any(edits):
        raise UserError(f"texts: no edit touches a token of the {len(acts)} texts: add others")


def standing(engine: Engine, message: policy_pb2.Policy, folder: Path, key: bytes | None = None) -> tuple[Status, str]:
    """Return what the certificate beside a policy is worth on a running engine, and why it is no PASS.

    `key`: of the seal that it must have.
    """
    return worth(message, folder, key, lambda _: fingerprint(engine, message))


def standing_before_start(
    message: policy_pb2.Policy, folder: Path, key: bytes | None, bundles: Mapping[str, str]
) -> tuple[Status, str]:
    """Return likewise what can be told before there is an engine: what only it knows is taken to be unchanged.

    `bundles`: those that will be served, with their hashes.
    """
    known = {"policy": content_digest(message), "bundles": dict(bundles)}
    return worth(message, folder, key, lambda certified: msgspec.structs.replace(certified.fingerprint, **known))


def worth(
    message: policy_pb2.Policy, folder: Path, key: bytes | None, current: Callable[[Certificate], Fingerprint]
) -> tuple[Status, str]:
    """Implement `standing`; `current` returns the fingerprint to compare with."""
    try:
        certificate = read_certificate(folder, message.name)
    except UserError as error:
        return "NONE", str(error)
    if certificate is None:
        return "NONE", "it has no certificate"
    if key and not hmac.compare_digest(seal_of(certificate, key), certificate.seal):
        return "NONE", "its certificate was changed, or not written with policies.certificate_key"
    now = current(certificate)
    status = status_of(certificate, now)
    if status == "STALE":
        changed = "; ".join(differences(certificate.fingerprint, now))
        return status, f"since its certificate of {certificate.date} something has changed: {changed}"
    parts = [f"{part.name}: {part.flips} of {part.texts} texts" for part in certificate.parts if part.result != "PASS"]
    return status, f"acts otherwise than recorded: {'; '.join(parts)}" if parts else ""


def objections(status: Status, problem: str) -> list[Problem]:
    """Return why a policy of this standing is not served."""
    hint = "run `rudder policy certify FILE` with this server's configuration, or set policies.allow_uncertified"
    return [] if status == "PASS" else [Problem("certificate", f"{status}: {problem}; {hint}")]


def status_of(certificate: Certificate | None, now: Fingerprint) -> Status:
    """Say what a certificate is worth on an engine with this fingerprint."""
    if certificate is None:
        return "NONE"
    return certificate.result if certificate.fingerprint == now else "STALE"


def differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """Name what differs between two fingerprints."""
    same_engine = {name: (before.engine.get(name, "-"), value) for name, value in now.engine.items()}
    changed = [f"{name} was {old}, is {new}" for name, (old, new) in same_engine.items() if old != new]
    fields = {"policy": "the policy's content", "model": "the model", "bundles": "the bundles"}
    return [*(text for name, text in fields.items() if getattr(before, name) != getattr(now, name)), *changed]


def needs_certificate(message: policy_pb2.Policy) -> bool:
    """Whether a policy could fail unnoticed: one that only forbids, or only counts, has nothing to rerun."""
    return message.mode != SHADOW and bool(message.HasField("program") or message.guards)


def file_beside(folder: Path, name: str, suffix: str) -> Path:
    """Return the path of `NAME.suffix`. UserError: the name is no file name."""
    if Path(name).name != name:
        raise UserError(f"name: {name!r}: a policy with a certificate has a name that is a file name")
    return folder / f"{name}.{suffix}"


def evaluation_path(folder: Path, name: str) -> Path:
    """Return the path of a policy's evaluation."""
    return file_beside(folder, name, "evaluation.jsonl.xz")


def certificate_path(folder: Path, name: str) -> Path:
    """Return the path of a policy's certificate."""
    return file_beside(folder, name, "certificate.json")


def read_certificate(folder: Path, name: str) -> Certificate | None:
    """Read the certificate of a policy; None if there is none. UserError: it cannot be read."""
    path = certificate_path(folder, name)
    return decode(path.read_bytes(), Certificate, path) if path.exists() else None


def write_certificate(folder: Path, certificate: Certificate) -> Path:
    """Write a certificate beside its policy; return its path."""
    path = certificate_path(folder, certificate.policy)
    write_atomically(path, msgspec.json.format(msgspec.json.encode(certificate)) + b"\n")
    return path


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write an evaluation: its fields on the first line, a case on each other."""
    head = msgspec.structs.replace(evaluation, cases=())
    lines = [msgspec.json.encode(part) for part in (head, *evaluation.cases)]
    write_atomically(path, lzma.compress(b"\n".join(lines) + b"\n"))


def read_evaluation(path: Path) -> tuple[Evaluation, str]:
    """Read an evaluation; return it and the SHA-256 of its file. UserError: it cannot be read."""
    if not path.exists():
        raise UserError(f"{path}: there is no evaluation: `rudder policy certify --record --texts FILE` makes one")
    content = path.read_bytes()
    try:
        head, *cases = lzma.decompress(content).splitlines()
    except (lzma.LZMAError, ValueError) as error:
        raise UserError(f"{path}: is not an evaluation: {error}") from error
    decoded = tuple(decode(case, Case, path) for case in cases)
    digest = hashlib.sha256(content).hexdigest()
    return msgspec.structs.replace(decode(head, Evaluation, path), cases=decoded), digest


def read_texts(path: Path) -> list[Text]:
    """Read JSON lines with `text`, or `messages`, and `answer`; other fields are ignored. UserError: it has neither."""
    texts = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        fields = decode(line, dict[str, object], path)
        kept = {name: value for name, value in fields.items() if name in Text.__struct_fields__}
        try:
            text = msgspec.convert(kept, Text)
        except msgspec.ValidationError as error:
            raise UserError(f"{path}:{number}: {error}") from error
        if bool(text.text) == bool(text.messages):
            raise UserError(f"{path}:{number}: has {'both' if text.text else 'neither'} `text` and `messages`")
        texts.append(text)
    return list({text.sha256: text for text in texts}.values())


def decode(content: bytes, kind: type[T], path: Path) -> T:
    """Decode JSON. UserError: it is not of this kind."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from error


def today() -> str:
    """Return the date, in UTC."""
    return datetime.now(UTC).date().isoformat()
