"""Certificates: what flips, what makes them stale, and evaluations that could not show a fault."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import yaml
from google.protobuf import json_format

from rudder.sae_models.bundle.bundle import settings_sha256
from rudder.sae_models.errors import UserError
from rudder.server.cli import main
from rudder.server.engine import adapter
from rudder.server.engine.engine import Engine
from rudder.server.safety import certificate as certificates
from rudder.server.safety import certify
from rudder.server.safety.certificate import Acts, Case, Certificate, Evaluation, Fingerprint, Text
from rudder.server.safety.problems import PolicyInvalid
from rudder.server.safety.start import check_certificates
from rudder.server.safety.store import PolicyStore
from rudder.v1 import policy_pb2, program_pb2
from tests.unit.policies import REGISTRY, HoldingEngine, editing, latent, message
from tests.unit.policies import policy as compiled_policy
from tests.unit.programs import SITE

NOW = Fingerprint(policy="p", model="m", bundles={"b": "1"}, engine={"dtype": "float32", "vllm": "0.32.0"})
EDIT, GATE = "0: layers.2.resid_post feature 7 of b set 3", "layers.2.resid_post"


def acts(guard: int | None = None, edit: int = 0, gate: int = 0) -> Acts:
    return Acts(guards={"topic": guard}, edits={EDIT: edit}, gates={GATE: gate})


RECORDED = [acts(), acts(5, 10, 12), acts(9, 20, 20), *(acts() for _ in range(97))]


def cases(recorded: list[Acts]) -> tuple[Case, ...]:
    texts = [Text(text=f"text {number}") for number in range(len(recorded))]
    return tuple(Case(sha256=text.sha256, text=text, expected=act) for text, act in zip(texts, recorded, strict=True))


def evaluation(recorded: list[Acts]) -> Evaluation:
    return Evaluation(policy="forget", version=3, recorded="2026-01-31", fingerprint=NOW, cases=cases(recorded))


def certificate(now: list[Acts], max_flips: float = 0.01) -> Certificate:
    return certificates.certified("forget", evaluation(RECORDED), "digest", NOW, now, max_flips)


def replaced(**changes: Acts) -> list[Acts]:
    """What was recorded, with other acts on the texts number N of keys `tN`."""
    return [changes.get(f"t{number}", act) for number, act in enumerate(RECORDED)]


def test_same_acts_pass() -> None:
    made = certificate(RECORDED)
    assert (made.result, made.version, made.policy) == ("PASS", 3, "forget")
    counts = {part.name: (part.texts, part.acted, part.flips) for part in made.parts}
    assert counts == {"guard topic": (100, 2, 0), f"edit {EDIT}": (100, 2, 0), f"gate {GATE}": (100, 2, 0)}


@pytest.mark.parametrize(
    ("number", "now", "parts"),
    [
        (1, acts(None, 10, 12), ["guard topic"]),
        (0, acts(3, 0, 0), ["guard topic"]),
        (1, acts(7, 10, 12), []),
        (1, acts(8, 10, 12), ["guard topic"]),
        (1, acts(5, 0, 12), [f"edit {EDIT}"]),
        (1, acts(5, 11, 12), []),
        (1, acts(5, 12, 12), [f"edit {EDIT}"]),
        (2, acts(9, 22, 20), []),
        (2, acts(9, 20, 17), [f"gate {GATE}"]),
        (0, acts(None, 0, 1), [f"gate {GATE}"]),
    ],
)
def test_flips_are_found(number: int, now: Acts, parts: list[str]) -> None:
    made = certificate(replaced(**{f"t{number}": now}))
    flipped = {part.name: part.flipped for part in made.parts if part.flips}
    assert flipped == dict.fromkeys(parts, (Text(text=f"text {number}").sha256,))


def test_more_flips_than_the_share_degrade_the_part_and_the_policy() -> None:
    one, two = replaced(t1=acts(None, 10, 12)), replaced(t1=acts(None, 10, 12), t0=acts(1))
    assert certificate(one).result == "PASS"
    made = certificate(two)
    assert (made.result, [part.result for part in made.parts]) == ("DEGRADED", ["DEGRADED", "PASS", "PASS"])
    assert certificate(two, max_flips=0.02).result == "PASS"
    assert certificate(one, max_flips=0).result == "DEGRADED"


def test_part_that_was_not_recorded_or_is_gone_flips_where_it_acts() -> None:
    """The content of the policy is the same, and its parts are not: nothing of that may pass."""
    renamed = [Acts(guards={"other": act.guards["topic"]}, edits=act.edits, gates=act.gates) for act in RECORDED]
    results = {part.name: part.flips for part in certificate(renamed).parts}
    assert (results["guard topic"], results["guard other"]) == (2, 2)


@pytest.mark.parametrize(
    "now",
    [
        msgspec.structs.replace(NOW, engine={"dtype": "bfloat16", "vllm": "0.32.0"}),
        msgspec.structs.replace(NOW, engine={**NOW.engine, "quantization": "fp8"}),
        msgspec.structs.replace(NOW, policy="q"),
        msgspec.structs.replace(NOW, model="n"),
        msgspec.structs.replace(NOW, bundles={"b": "2"}),
    ],
)
def test_another_configuration_makes_a_certificate_stale(now: Fingerprint) -> None:
    made = certificate(RECORDED)
    assert certificates.status_of(made, NOW) == "PASS"
    assert certificates.status_of(made, now) == "STALE"
    assert len(certificates.differences(NOW, now)) == 1
    assert certificates.status_of(None, now) == "NONE"


def test_difference_is_named() -> None:
    now = msgspec.structs.replace(NOW, engine={"dtype": "bfloat16", "vllm": "0.32.0"}, model="n")
    assert certificates.differences(NOW, now) == ["the model", "dtype was float32, is bfloat16"]


def policy(**fields: object) -> policy_pb2.Policy:
    message = policy_pb2.Policy(name="forget", version=1, bundles={"b": "1"}, program=program_pb2.Program(name="x"))
    message.guards.add(name="topic", level=1.0, refusal="No.")
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def with_guard(**fields: object) -> policy_pb2.Policy:
    message = policy()
    for name, value in fields.items():
        setattr(message.guards[0], name, value)
    return message


def bound() -> policy_pb2.Policy:
    message = policy()
    message.binds.all = True
    return message


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        (policy(version=2), True),
        (policy(mode=policy_pb2.POLICY_MODE_SHADOW), True),
        (policy(refusal="Never."), True),
        (with_guard(refusal="Never."), True),
        (bound(), True),
        (with_guard(level=2.0), False),
        (policy_pb2.Policy(name="forget", version=1, bundles={"b": "1"}), False),
        (policy_pb2.Policy(name="forget", version=1, bundles={"b": "2"}, program=policy().program), False),
    ],
)
def test_digest_is_of_what_decides_when_a_policy_acts(changed: policy_pb2.Policy, same: bool) -> None:
    assert (certificates.content_digest(changed) == certificates.content_digest(policy())) is same


@pytest.mark.parametrize(
    ("recorded", "problem"),
    [
        ([acts(), acts()], "guard topic acts on none of the 2 texts"),
        ([acts(3, 1, 1), acts(0, 1, 1)], "guard topic acts on all of the 2 texts"),
        ([acts(), acts(3, 1, 0)], "gate layers.2.resid_post acts on none of the 2 texts"),
        ([acts(), acts(3, 0, 1)], "no edit touches a token of the 2 texts"),
    ],
)
def test_texts_that_could_not_show_a_fault_are_refused(recorded: list[Acts], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        certificates.require_exercised(cases(recorded))
    certificates.require_exercised(cases(RECORDED))


def test_files_keep_what_was_written(tmp_path: Path) -> None:
    made = certificate(RECORDED)
    assert certificates.write_certificate(tmp_path, made) == tmp_path / "forget.certificate.json"
    assert certificates.read_certificate(tmp_path, "forget") == made
    assert certificates.read_certificate(tmp_path, "other") is None
    path = certificates.evaluation_path(tmp_path, "forget")
    certificates.write_evaluation(path, evaluation(RECORDED))
    assert certificates.read_evaluation(path)[0] == evaluation(RECORDED)


def test_certificate_has_no_text(tmp_path: Path) -> None:
    path = certificates.write_certificate(tmp_path, certificate(replaced(t1=acts())))
    assert Text(text="text 1").sha256 in path.read_text()
    assert "text 1" not in path.read_text()


@pytest.mark.parametrize(
    ("read", "name", "content", "problem"),
    [
        (certificates.read_certificate, "x.certificate.json", b'{"policy": "x"', "truncated"),
        (certificates.read_certificate, "x.certificate.json", b"{}", "missing required field"),
        (certificates.read_certificate, "x.certificate.json", b"\xff", "x.certificate.json"),
    ],
)
def test_file_that_is_no_certificate_is_refused(
    tmp_path: Path, read: Callable[[Path, str], object], name: str, content: bytes, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem):
        read(tmp_path, "x")


@pytest.mark.parametrize("content", [b"", b"no archive", b"\xfd7zXZ\x00"])
def test_file_that_is_no_evaluation_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.evaluation.jsonl.xz").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.evaluation\.jsonl\.xz: "):
        certificates.read_evaluation(certificates.evaluation_path(tmp_path, "x"))


def test_name_of_a_policy_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a file name"):
        certificates.read_certificate(tmp_path, "../x")


def test_texts_are_read_and_repeated_ones_left_out(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(
        '{"text": "a", "book": "x"}\n{"text": "a"}\n{"text": "a", "answer": "b"}\n'
        '{"messages": [{"role": "user", "content": "a"}]}\n'
    )
    assert [(text.text, text.answer, len(text.messages)) for text in certificates.read_texts(path)] == [
        ("a", "", 0), ("a", "b", 0), ("", "", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"answer": "a"}', "1: has neither `text` and `messages`"),
        ('{"text": "a", "messages": [{"role": "user", "content": "a"}]}', "1: has both"),
        ('{"text": 3}', "1: Expected `str`"),
        ("[]", "Expected `object`"),
    ],
)
def test_line_that_is_no_text_is_refused(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=problem):
        certificates.read_texts(path)


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"program": editing(5)}, True),
        ({"program": editing(5), "mode": "POLICY_MODE_SHADOW"}, False),
        ({"locked": [{"site": SITE, "row": latent(3)}]}, False),
    ],
)
async def test_store_refuses_what_acts_and_has_no_certificate(
    tmp_path: Path, fields: dict[str, Any], refused: bool
) -> None:
    engine: Any = HoldingEngine()
    store = PolicyStore(engine, tmp_path)
    if not refused:
        assert (await store.apply(message(**fields), "test")).name == "low"
        return
    with pytest.raises(PolicyInvalid, match="certificate: NONE: it has no certificate; run `rudder policy certify"):
        await store.apply(message(**fields), "test")
    assert [problem.field for problem in await store.problems(message(**fields))] == ["certificate"]
    (tmp_path / "low.certificate.json").write_text("{")
    with pytest.raises(PolicyInvalid, match=r"certificate: NONE: .*low\.certificate\.json: Input data was truncated"):
        await store.apply(message(**fields), "test")
    assert store.in_force == {}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--record"], "texts: --record and --texts FILE go together"),
        (["--texts", "texts.jsonl"], "texts: --record and --texts FILE go together"),
        (["--max-flips", "1"], "max-flips: 1 is not in [0, 1)"),
        (
            [],
            "low.evaluation.jsonl.xz: there is no evaluation: `rudder policy certify --record --texts FILE` makes one",
        ),
        (["--record", "--texts", "none.jsonl"], "No such file or directory: 'none.jsonl'"),
        (["--engine.dtipe", "float32"], "engine.dtipe: there is no such field"),
    ],
)
def test_command_names_what_is_missing_before_an_engine_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    problem: str,
) -> None:
    monkeypatch.setattr("rudder.server.safety.certify.start_engine", lambda _: pytest.fail("an engine starts"))
    document = json_format.MessageToDict(message(program=editing(5)), preserving_proto_field_name=True)
    (tmp_path / "low.yaml").write_text(yaml.safe_dump(document))
    assert main(["policy", "certify", str(tmp_path / "low.yaml"), *arguments]) == 2
    assert problem in " ".join(capsys.readouterr().err.split())


def test_command_prints_parts_and_returns_whether_they_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for made, status in ((certificate(RECORDED), 0), (certificate(replaced(t0=acts(1), t1=acts())), 1)):

        async def certify(*_: object, made: Certificate = made) -> Certificate:
            return made

        monkeypatch.setattr("rudder.server.safety.certify.certify", certify)
        assert main(["policy", "certify", str(tmp_path / "low.yaml")]) == status
        output = capsys.readouterr().out
        assert f"forget version 3: {made.result}" in output
        assert "2 of 100 texts" in output


class Tokenizer:
    """A vocabulary and a chat template."""

    def __init__(self, vocabulary: dict[str, int], chat_template: str | None) -> None:
        self.vocabulary, self.chat_template = vocabulary, chat_template

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


def fingerprint_with(*tokenizer: Any, settings: str = "s") -> Fingerprint:
    """The fingerprint of a policy where only the tokenizer and the model's other files may differ."""
    engine: Any = HoldingEngine()
    engine.llm, engine.bundles, engine.model = None, {}, SimpleNamespace(sha256="ab", settings=settings)
    engine.encoding_digest = vars(Engine)["encoding_digest"].func(SimpleNamespace(tokenizer=Tokenizer(*tokenizer)))
    return certificates.fingerprint(engine, message())


def test_another_tokenizer_or_chat_template_makes_a_certificate_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "numerics", lambda _: {})
    now = fingerprint_with({"a": 0}, "x")
    made = msgspec.structs.replace(certificate(RECORDED), fingerprint=now)
    assert certificates.status_of(made, fingerprint_with({"a": 0}, "x")) == "PASS"
    for other in (({"a": 1}, "x"), ({"a": 0}, "y"), ({"a": 0}, None)):
        assert certificates.status_of(made, fingerprint_with(*other)) == "STALE"
    changed = fingerprint_with({"a": 0}, "x", settings="t")
    assert certificates.status_of(made, changed) == "STALE"
    assert certificates.differences(now, changed) == ["model files was s, is t"]


def test_files_beside_the_weights_of_a_model_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "merges.txt", "tokenizer.model", "README.md"):
        (tmp_path / name).write_text(name)
    before = settings_sha256(tmp_path)
    (tmp_path / "README.md").write_text("another")
    (tmp_path / "model.safetensors").write_text("hashed apart")
    assert settings_sha256(tmp_path) == before
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "merges.txt", "tokenizer.model"):
        (tmp_path / name).write_text(f"{name} ")
        assert settings_sha256(tmp_path) != before
        (tmp_path / name).write_text(name)
    (tmp_path / "generation_config.json").write_text("{}")
    assert settings_sha256(tmp_path) != before
    assert settings_sha256(tmp_path / "none") == ""


KEY, OTHER_KEY = bytes(range(32)), bytes(32)
SEALED: dict[str, tuple[bytes | None, bytes | None, bool]] = {
    "with the key": (KEY, KEY, True),
    "with another": (OTHER_KEY, KEY, False),
    "not sealed": (None, KEY, False),
    "where none is asked for": (KEY, None, True),
}


@pytest.mark.parametrize("case", SEALED)
def test_certificate_counts_with_the_seal_that_the_server_asks_for(case: str, tmp_path: Path) -> None:
    made_with, asked, passes = SEALED[case]
    bound = message("forget", program=editing(5))
    known = msgspec.structs.replace(NOW, policy=certificates.content_digest(bound))
    made = msgspec.structs.replace(certificate(RECORDED), fingerprint=known)
    certificates.write_certificate(tmp_path, certificates.sealed(made, made_with))
    status, problem = certificates.standing_before_start(bound, tmp_path, asked, NOW.bundles)
    assert status == ("PASS" if passes else "NONE")
    assert bool(problem) is not passes


@pytest.mark.parametrize(
    "change", [{"result": "PASS", "parts": ()}, {"policy": "other"}, {"max_flips": 1.0}, {"fingerprint": NOW}]
)
def test_every_field_of_a_certificate_is_sealed(change: dict[str, Any], tmp_path: Path) -> None:
    bound = message("forget", program=editing(5))
    known = msgspec.structs.replace(NOW, policy=certificates.content_digest(bound))
    made = msgspec.structs.replace(certificate(replaced(t0=acts(1), t1=acts())), fingerprint=known)
    sealed = certificates.sealed(made, KEY)
    certificates.write_certificate(tmp_path, sealed)
    assert certificates.standing_before_start(bound, tmp_path, KEY, NOW.bundles)[0] == "DEGRADED"
    forged = msgspec.structs.replace(sealed, **change)
    path = certificates.write_certificate(tmp_path, forged)
    path.rename(tmp_path / "forget.certificate.json")
    assert certificates.standing_before_start(bound, tmp_path, KEY, NOW.bundles)[0] == "NONE"


def test_certificate_is_refused_before_an_engine_starts(tmp_path: Path) -> None:
    """What only the engine knows is looked at once it runs."""
    bundles = {known.name: known.sha256 for known in REGISTRY.dictionaries.values()}
    bound = message("forget", program=editing(5))
    known = msgspec.structs.replace(NOW, policy=certificates.content_digest(bound), bundles=bundles)
    made = msgspec.structs.replace(certificate(RECORDED), fingerprint=known)
    path = tmp_path / "forget.yaml"

    def refusal(one: policy_pb2.Policy = bound, found: Certificate = made) -> str:
        certificates.write_certificate(tmp_path, found)
        try:
            check_certificates({path: one}, REGISTRY, None)
        except PolicyInvalid as invalid:
            return str(invalid)
        return ""

    with pytest.raises(PolicyInvalid, match=rf"{path}: certificate: NONE: it has no certificate; run `rudder policy"):
        check_certificates({path: bound}, REGISTRY, None)
    assert refusal() == ""
    assert "STALE: since its" in refusal(message("forget", program=editing(3)))
    assert "something has changed: the bundles" in refusal(
        found=msgspec.structs.replace(made, fingerprint=msgspec.structs.replace(known, bundles={}))
    )
    assert "DEGRADED" in refusal(
        found=msgspec.structs.replace(certificate(replaced(t0=acts(1), t1=acts())), fingerprint=known)
    )
    shadow = message("forget", program=editing(3), mode="POLICY_MODE_SHADOW")
    assert refusal(shadow) == ""


async def test_evaluation_whose_texts_were_taken_out_certifies_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "fingerprint", lambda *_: NOW)
    bound = compiled_policy("forget", program=editing())
    certificates.write_evaluation(certificates.evaluation_path(tmp_path, "forget"), evaluation([]))
    with pytest.raises(UserError, match="has no texts"):
        await certify.rerun(NoEngine(), bound, tmp_path, 0.0)  # type: ignore[arg-type]


class NoEngine:
    """Runs no text: there is none."""

    admission = SimpleNamespace(running=1)
    registry = REGISTRY
