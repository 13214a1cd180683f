"""`rudder bundle explain` against a server of the OpenAI protocol: labels, errors, interruption, resumption."""

import re
import shutil
import socket
from pathlib import Path

import pytest

from rudder.sae_models import PRETRAINED
from rudder.sae_models.bundle import bundle, revision
from rudder.sae_models.bundle.catalogue import Context, Latent, Summary
from rudder.sae_models.evaluation import explanations
from rudder.sae_models.evaluation.explanations import JOURNAL, Explanation
from rudder.server.cli import bundle as command
from rudder.server.cli import main
from tests.unit.sae_models.evaluation.chat_server import serving

FIRST = 6


def entry(index: int, latents: int) -> Latent:
    """Return a latent with contexts, on the word `wordN` for each of the first latents, without for the others."""
    summary = Summary(index, "the, of, to", 0.1, 2.0, "corpus", 0.55, 0.1, 0.5)
    if index >= min(FIRST, latents):
        return Latent(summary, (), ())
    contexts = [
        Context(f"text {n} about ", f"word{index}", " and more", 2.0 - n / 10, "a book", held_out=n >= 4)
        for n in range(8)
    ]
    return Latent(summary, (f"word{index}",), tuple(contexts))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose first latents have contexts."""
    path = tmp_path_factory.mktemp("explain") / "toy"
    shutil.copytree(PRETRAINED / "textbook-lm-layers.2", path)
    opened = bundle.load(path)
    count = opened.manifest.latents
    revision.write(opened, (entry(index, count) for index in range(count)), opened.measured).catalogue.close()
    return path


@pytest.fixture
def toy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "toy"))


@pytest.fixture(autouse=True)
def quick_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explanations, "RETRIES", 0)


def labels(path: Path) -> list[tuple[str, str]]:
    """Return label and origin of the first latents of a bundle, which is verified."""
    opened = bundle.load(path)
    found = [opened.catalogue.get(index).summary for index in range(FIRST)]
    opened.catalogue.close()
    return [(summary.label, summary.origin) for summary in found]


def perfect(system: str, user: str) -> str:
    """Explain by the marked word, and pick out the excerpts that have it."""
    if "Explanation:" in system:
        return f"Explanation: the word {re.findall('«(.+?)»', user)[0]}"
    word = re.findall(r"the word (\w+)", system)[0]
    numbers = [line.partition(".")[0] for line in user.splitlines() if f" {word} " in line]
    return f"Numbers: {', '.join(numbers) or 'none'}"


def explain(path: Path, url: str, *words: str) -> int:
    """Run the command."""
    return main(["bundle", "explain", str(path), "--endpoint", url, *words])


def test_explanations_become_labels_with_scores(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(perfect) as served:
        assert explain(toy, served.url) == 0
    assert labels(toy) == [(f"the word word{index}", "explained by small") for index in range(FIRST)]
    opened = bundle.load(toy)
    summary = opened.catalogue.get(2).summary
    assert (summary.label_score, summary.intervention) == (1.0, None)
    assert [found.index for found in opened.catalogue.search("word3", 5)] == [3]
    opened.catalogue.close()
    assert "6 latents explained by small: 6 explanations better than chance" in capsys.readouterr().out
    asked = served.requests[0]
    assert asked["model"] == "small"
    assert asked["temperature"] == 0
    assert len(served.requests) == 2 * FIRST
    # What the score is of was not shown to whoever explained.
    assert "text 3 about «word0»" in asked["messages"][1]["content"]
    assert "text 4" not in asked["messages"][1]["content"]
    assert "«" not in served.requests[1]["messages"][1]["content"]


def test_explanation_no_better_than_chance_leaves_the_label(toy: Path) -> None:
    with serving(
        lambda system, _: "Explanation: anything" if "Explanation:" in system else "Numbers: 1, 2, 3"
    ) as served:
        assert explain(toy, served.url, "--latents", "1") == 0
    assert labels(toy)[1] == ("the, of, to", "corpus")
    (known,) = explanations.read_journal(toy.with_name("toy" + JOURNAL))
    assert known.text == "anything"
    assert not known.holds


def test_limit_and_resumption_ask_for_each_latent_once(toy: Path) -> None:
    with serving(perfect) as served:
        assert explain(toy, served.url, "--limit", "2") == 0
        assert [origin for _, origin in labels(toy)].count("explained by small") == 2
        assert explain(toy, served.url) == 0
        assert len(served.requests) == 2 * FIRST
        assert explain(toy, served.url) == 0
        assert len(served.requests) == 2 * FIRST
    assert {origin for _, origin in labels(toy)} == {"explained by small"}


def test_failure_in_the_middle_keeps_what_was_done(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def failing(system: str, user: str) -> str:
        if "«word3»" in user:
            raise RuntimeError("out of memory")
        return perfect(system, user)

    with serving(failing) as served:
        assert explain(toy, served.url, "--latents", "0", "1", "3", "4") == 2
    error = capsys.readouterr().err
    assert "rudder: endpoint: http://127.0.0.1" in error.splitlines()[-1]
    assert "500" in error
    assert [origin for _, origin in labels(toy)].count("explained by small") == 2
    with serving(perfect) as served:
        assert explain(toy, served.url) == 0
        assert len(served.requests) == 2 * (FIRST - 2)


def test_interruption_keeps_what_was_done(toy: Path) -> None:
    def interrupting(system: str, user: str) -> str:
        if "«word2»" in user:
            raise KeyboardInterrupt
        return perfect(system, user)

    with pytest.raises(KeyboardInterrupt):
        explanations.explain(toy, "small", interrupting, explanations.Request())
    assert [origin for _, origin in labels(toy)].count("explained by small") == 2


@pytest.mark.parametrize("answer", ["", "I cannot say.", "Explanation: ...", "Explanation:\n"])
def test_answers_without_an_explanation_are_useless(toy: Path, answer: str) -> None:
    with serving(lambda *_: answer) as served:
        assert explain(toy, served.url) == 0
        assert len(served.requests) == FIRST
    assert {label for label, _ in labels(toy)} == {"the, of, to"}
    assert {known.problem for known in explanations.read_journal(toy.with_name("toy" + JOURNAL))} == {
        "the answer has no explanation"
    }


def test_too_many_useless_answers_end_the_run(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(explanations, "MAX_USELESS", 3)
    with serving(lambda *_: "?") as served:
        assert explain(toy, served.url) == 2
        assert len(served.requests) == 3
    assert "3 answers in a row are of no use, the last: the answer has no explanation" in capsys.readouterr().err


def closed_port() -> str:
    """Return the address of a port where nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "", "http:///v1"])
def test_endpoint_that_is_no_address_is_named(toy: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(toy, url) == 2
    assert "is not an http or https address" in capsys.readouterr().err


def test_endpoint_that_is_not_there_is_named(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = closed_port()
    assert explain(toy, url) == 2
    assert f"endpoint: {url}" in " ".join(capsys.readouterr().err.split())


def test_endpoint_without_the_protocol_is_refused(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(perfect, models=()) as served:
        assert explain(toy, served.url) == 2
        assert "it lists no model, give --explainer" in capsys.readouterr().err
        assert explain(toy, served.url.removesuffix("/v1") + "/other") == 2
        assert explain(toy, served.url.removesuffix("/v1") + "/other", "--explainer", "x") == 2
        assert "is no OpenAI-compatible endpoint" in " ".join(capsys.readouterr().err.split())
    with serving(perfect, status=401) as served:
        assert explain(toy, served.url) == 2
    assert "out of order" in capsys.readouterr().err
    assert labels(toy) == [("the, of, to", "corpus")] * FIRST


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--latents", "4096"), "latents: 4096, the bundle has 4096"),
        (("--latents", "7"), "latents: 7 has too few contexts"),
        (("--limit", "0"), "--limit"),
    ],
)
def test_latents_that_cannot_be_explained_are_named(
    toy: Path, words: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(perfect) as served:
        try:
            status = explain(toy, served.url, *words)
        except SystemExit as ended:
            status = int(str(ended.code))
        assert not served.requests
    assert status == 2
    assert problem in " ".join(capsys.readouterr().err.split())


def test_bundle_that_is_missing_or_damaged_is_refused(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(perfect) as served:
        assert explain(toy / "nothing", served.url) == 2
        (toy / "catalogue.sqlite.xz").write_bytes(b"")
        assert explain(toy, served.url) == command.FAILS
        assert "catalogue.sqlite" in capsys.readouterr().err
        assert not served.requests


def line(latent: int) -> bytes:
    """Return a line of a journal."""
    return b'{"weights":"w","model":"m","latent":%d,"text":"x"}\n' % latent


def test_journal_survives_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(line(1) + line(2)[:-9])
    assert [known.latent for known in explanations.read_journal(path)] == [1]
    assert path.read_bytes() == line(1)
    assert explanations.read_journal(tmp_path / "none") == []


@pytest.mark.parametrize("damage", [b"{}\n", b"[]\n", b"\xff\xfe\n", b'{"latent":"x"}\n', b"\n"])
def test_damaged_line_of_a_journal_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "journal"
    path.write_bytes(line(1) + damage + line(2))
    with pytest.raises(Exception, match=r"journal line 2: .*remove the file"):
        explanations.read_journal(path)


@pytest.mark.parametrize(
    ("answer", "numbers"),
    [
        ("Numbers: 1, 3", [1, 3]),
        ("numbers: 2 and 4.", [2, 4]),
        ("Thinking of 9.\nNumbers: 5", [5]),
        ("Numbers: none", []),
        ("None of them", []),
        ("2", [2]),
        ("Numbers: 13", None),
        ("Numbers: 0", None),
        ("Numbers: all", None),
        ("", None),
        ("Numbers: " + "9" * 5000, None),
    ],
)
def test_numbers_of_an_answer(answer: str, numbers: list[int] | None) -> None:
    assert explanations.numbers_in(answer, 12) == numbers


def test_explanation_of_an_answer_is_one_short_line() -> None:
    assert explanations.explanation_in('thought\nExplanation: "names\tof  stars"\nmore') == "names of stars"
    assert len(explanations.explanation_in("Explanation: " + "a" * 9000)) == explanations.MAX_LABEL
    assert explanations.explanation_in("Explanation: 123 !") == ""


@pytest.mark.parametrize(
    ("context", "text"),
    [
        (Context("The ", " star", " shines\nbright", 1.0, ""), "The «star» shines bright"),
        (Context("a", "\n", "b", 1.0, ""), "a« »b"),
        (Context("", "", "b", 1.0, ""), "«»b"),
    ],
)
def test_context_marks_the_token_without_its_space(context: Context, text: str) -> None:
    assert explanations.marked(context) == text


def test_another_model_or_other_weights_are_explained_anew(toy: Path) -> None:
    known = Explanation("other weights", "small", 0, "an older one", 1.0, 0.1)
    assert explanations.explain(toy, "small", perfect, explanations.Request((0,)))[0].weights != known.weights
    assert [e.model for e in explanations.explain(toy, "large", perfect, explanations.Request((0,)))] == ["large"]
    assert labels(toy)[0][1] == "explained by large"
