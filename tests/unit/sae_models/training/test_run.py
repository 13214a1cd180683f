"""A run makes bundles, goes on after a kill as if there had been none, and says in one sentence what is wrong."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rudder.sae_models import settings
from rudder.sae_models.activations import corpus, harvest
from rudder.sae_models.architectures import ARCHITECTURES
from rudder.sae_models.bundle import bundle
from rudder.sae_models.evaluation import splicing as metrics
from rudder.sae_models.evaluation.activity import INACTIVE
from rudder.sae_models.files import locked
from rudder.sae_models.sae import AdaptiveK
from rudder.sae_models.sparse.collectives import Mesh
from rudder.sae_models.training import checkpoint, complexity, config, run
from rudder.sae_models.training.checkpoint import CheckpointError
from rudder.sae_models.training.config import Config, ConfigError
from rudder.sae_models.training.record import lines
from rudder.server import cli
from tests.unit import tiny
from tests.unit.disk import full_beyond

SWEEP = {"sweep": {"k": [4, 8]}}


def main(arguments: list[str]) -> int:
    """Run `rudder train` in this process."""
    return cli.main(["train", *arguments])


def curve(folder: Path) -> list[tuple[int, str, dict[str, float]]]:
    """Every training line of a run."""
    return [(line["step"], line["sae"], line["train"]) for line in lines(folder / "metrics.jsonl") if "train" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A sweep over k that ran without a break."""
    asked = tiny.configuration(tmp_path_factory.mktemp("whole"), **SWEEP)
    run.run(asked)
    return asked


def test_a_run_leaves_record_report_and_a_bundle_for_each_sae(whole: Config) -> None:
    out = Path(whole.out)
    assert config.load(out / "config.yaml") == whole
    assert [step for step, _, _ in curve(out)] == [step for step in range(10, 201, 10) for _ in range(2)]
    for k in (4, 8):
        made = bundle.load(out / f"model-layers.0-k{k}")
        assert (made.manifest.training.tokens, made.manifest.architecture) == (12_800, "batch_topk")
        assert made.manifest.training.l0 == pytest.approx(k, abs=0.5)
    fidelity = {name: figures["fvu"] for step, name, figures in curve(out) if step == 200}
    assert fidelity["model-layers.0-k8"] < fidelity["model-layers.0-k4"] < 1
    assert not list(out.rglob("*.partial"))


def test_the_record_tells_what_the_sae_costs_the_model(whole: Config) -> None:
    evaluations = [line["evaluation"] for line in lines(Path(whole.out) / "metrics.jsonl") if "evaluation" in line]
    assert len(evaluations) == 2
    for found in evaluations:
        assert found["kl"] > 0
        assert {"ce", "ce_spliced", "ce_ablated", "ce_recovered"} <= found.keys()
        assert sum(found["decoder_cosine"]) == 32
        assert sum(found["density"]) == round(32 * (1 - found["dead_share"]))
        assert 0 <= found["probe_1"] <= 1


def test_the_same_command_on_a_whole_run_changes_nothing(whole: Config) -> None:
    out = Path(whole.out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert [path.name for path in run.run(whole)] == ["model-layers.0-k4", "model-layers.0-k8"]
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}


def test_another_configuration_in_the_same_folder_is_refused_by_its_field(whole: Config) -> None:
    changed = config.convert(tiny.plain(Path(whole.out).parent, **SWEEP, window=64))
    with pytest.raises(ConfigError, match=r"^window: differs from .*config\.yaml"):
        run.run(changed)


def test_a_run_killed_in_the_middle_goes_on_to_the_same_curve(whole: Config, tmp_path: Path) -> None:
    asked = tiny.plain(tmp_path, **SWEEP)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(asked))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "rudder.server", "train", str(tmp_path / "run.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / checkpoint.LATEST).exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    note = json.loads((out / "checkpoints" / checkpoint.LATEST).read_bytes())
    assert 0 < note["step"] < 200, "the kill came too late to tell anything"
    assert not (out / "model-layers.0-k4").exists()
    run.run(config.convert(asked))
    assert [line[:2] for line in curve(out)] == [line[:2] for line in curve(Path(whole.out))]
    for (_, _, mine), (_, _, theirs) in zip(curve(out), curve(Path(whole.out)), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_latents_of_the_shipped_model_are_labelled_by_the_words_they_fire_on(tmp_path: Path) -> None:
    asked = tiny.plain(tmp_path, model=str(tiny.TEXTBOOK_LM), tokens=12_800)
    asked["sae"] |= {"site": "layers.1.resid_post", "latents": 256, "k": 8}
    text = "Cells divide. Viruses need a host, and the host may be a cell. " * 10
    rows = ({"book": f"book{i % 2}", "module": f"m{i}", "title": f"Section {i}", "text": text} for i in range(60))
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = bundle.load(run.run(config.convert(asked))[0])
    assert 0 < (made.manifest.training.fvu or 0) < 0.8
    labels = [summary.label for summary in made.catalogue.page(-1, 256)]
    assert any("viruses" in label or "cells" in label for label in labels)
    assert INACTIVE in labels


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in ("route", "transcoder")])
def test_every_architecture_comes_to_a_bundle(tmp_path: Path, architecture: str) -> None:
    asked = tiny.plain(tmp_path, tokens=3200)
    asked["sae"]["architecture"] = architecture
    made = bundle.load(run.run(config.convert(asked))[0])
    assert made.manifest.architecture == architecture
    assert 0 < (made.manifest.training.fvu or 0) < 1


@pytest.mark.parametrize("stored", [False, True])
def test_adaptive_k_is_taught_the_complexities_of_the_corpus(tmp_path: Path, stored: bool) -> None:
    asked = tiny.plain(tmp_path, tokens=3200)
    asked["sae"] |= {"architecture": "adaptive_k", "k_min": 2, "k_max": 16}
    if stored:
        asked["data"]["store"] = str(tmp_path / "store")
    taught = bundle.load(run.run(config.convert(asked))[0]).sae.selection
    assert isinstance(taught, AdaptiveK)
    assert float(taught.probe.norm()) > 0


def test_complexities_must_be_there_or_asked_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = tiny.plain(tmp_path, tokens=3200)
    asked["sae"] |= {"architecture": "adaptive_k", "k_min": 2, "k_max": 16}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(asked))
    rows = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    rows[3:] = [row | {"complexity": None} for row in rows[3:]]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main([str(tmp_path / "run.yaml")]) == 2
    told = capsys.readouterr().err
    assert "rudder: corpus: 3 of 120 documents have a `complexity` from 0 to 10" in told
    assert "set sae.complexity to loss" in told
    assert main([str(tmp_path / "run.yaml"), "--sae.complexity=loss", f"--out={tmp_path / 'second'}"]) == 0
    taught = bundle.load(tmp_path / "second" / "model-layers.0").sae.selection
    assert isinstance(taught, AdaptiveK)
    assert float(taught.probe.norm()) > 0


def test_a_window_that_surprises_the_model_is_complex(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model")
    documents = corpus.read(tiny.save_corpus(tmp_path / "corpus.jsonl"))
    windows = corpus.windows(documents, harvest.load_tokenizer(model), 32)
    found = complexity.surprising(documents, windows, model, torch.device("cpu"))
    nats, count = metrics.losses(harvest.load_model(model), windows).unbind(1)
    assert (float(found.min()), float(found.max())) == (0, 10)
    order = (nats / count).argsort()
    assert bool((found[order].diff() >= 0).all())


def test_several_sites_and_a_transcoder_come_to_bundles(tmp_path: Path) -> None:
    asked = tiny.plain(tmp_path, tokens=3200)
    sites = ["layers.0.resid_post", "layers.1.resid_post"]
    asked["sae"] = {"architecture": "route", "site": sites, "latents": 32, "k": 4}
    routed = bundle.load(run.run(config.convert(asked))[0])
    assert routed.manifest.sites == tuple(sites)
    assert routed.sae.router is not None
    asked["sae"] = {"architecture": "transcoder", "latents": 32, "k": 4, "learning_rate": 1e-2}
    asked["sae"] |= {"site": "layers.1.mlp_in", "output_site": "layers.1.mlp_out"}
    asked["out"] += "-transcoder"
    transcoder = bundle.load(run.run(config.convert(asked))[0])
    assert (transcoder.manifest.site, transcoder.manifest.output_site) == ("layers.1.mlp_in", "layers.1.mlp_out")
    assert 0 < (transcoder.manifest.training.fvu or 0) < 1


@pytest.mark.parametrize("stop", [39, 41, 199])
def test_wherever_it_stops_at_most_an_interval_is_lost_and_the_end_is_the_same(
    whole: Config, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tiny.configuration(tmp_path, **SWEEP)
    taken = run.advance
    steps = 0

    def stopping(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > 2 * stop:
            raise KeyboardInterrupt
        return taken(*args)

    monkeypatch.setattr(run, "advance", stopping)
    with pytest.raises(KeyboardInterrupt):
        run.run(asked)
    monkeypatch.setattr(run, "advance", taken)
    found = checkpoint.load(Path(asked.out) / "checkpoints", Mesh())
    assert (found[0] if found else 0) == stop // 40 * 40
    run.run(asked)
    for k in (4, 8):
        one, other = (bundle.load(Path(out) / f"model-layers.0-k{k}").sae for out in (asked.out, whole.out))
        assert torch.equal(one.encoder, other.encoder)
        assert torch.equal(one.decoder, other.decoder)


def test_a_store_gives_the_run_that_harvesting_on_the_fly_gives_but_for_rounding(whole: Config, tmp_path: Path) -> None:
    asked = tiny.plain(tmp_path, **SWEEP)
    asked["data"] = {"block": 2000, "store": str(tmp_path / "store")}
    run.run(config.convert(asked))
    kept, live = curve(Path(asked["out"])), curve(Path(whole.out))
    for name in {name for _, name, _ in live}:
        ours, wanted = ([at["fvu"] for _, sae, at in lines if sae == name] for lines in (kept, live))
        # The same vectors in the same order; bfloat16 tells later.
        assert ours[:3] == pytest.approx(wanted[:3], rel=5e-3)
        assert ours == pytest.approx(wanted, rel=0.05)
    assert kept[-1][2]["l0"] == pytest.approx(live[-1][2]["l0"], rel=0.05)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    state = {"trainers": {}, "random": torch.zeros(5)}
    checkpoint.save(tmp_path, 40, state, Mesh())
    problem = r"000000080\.0\.pt: .*File too large; the one before it is whole"
    with full_beyond(4096), pytest.raises(CheckpointError, match=problem):
        checkpoint.save(tmp_path, 80, {"big": torch.zeros(10_000)}, Mesh())
    found = checkpoint.load(tmp_path, Mesh())
    assert found is not None
    assert found[0] == 40
    assert {file.name for file in tmp_path.iterdir()} == {"000000040.0.pt", checkpoint.LATEST}


def test_a_full_disk_leaves_no_bundle_that_looks_whole_and_the_run_ends_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.plain(tmp_path, tokens=1280)))
    out = tmp_path / "run"
    # A checkpoint of this run has 20 KB, its catalogue more than 60.
    with full_beyond(40_000):
        assert main([str(tmp_path / "run.yaml")]) == 2
    assert f"rudder: bundle: {out / 'model-layers.0'}: " in capsys.readouterr().err
    assert list(out.rglob(bundle.MANIFEST)) == []
    assert main([str(tmp_path / "run.yaml")]) == 0
    assert "train: 100%" in capsys.readouterr().err
    bundle.load(out / "model-layers.0")


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        (100, "run/config.yaml"),
        (2500, "run/metrics.jsonl"),
        (12_000, "checkpoint: {}/run/checkpoints/000000020.0.pt: "),
        (20_000, "store: {}/store: File too large; the shards before it are whole"),
    ],
)
def test_wherever_the_disk_is_full_one_error_names_the_file_and_the_run_ends_later(
    size: int, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.plain(tmp_path, tokens=1280, log_every=1)))
    command = [str(tmp_path / "run.yaml"), *([f"--data.store={tmp_path / 'store'}"] if "store" in problem else [])]
    with full_beyond(size):
        assert main(command) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rudder: ")]
    assert len(told) == 1
    assert problem.format(tmp_path) in told[0]
    assert "File too large" in told[0]
    assert list(tmp_path.rglob(bundle.MANIFEST)) == []
    assert main(command) == 0
    bundle.load(tmp_path / "run" / "model-layers.0")


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("model/model.safetensors", bytes(range(256)), "model: {}/model: weights: "),
        ("model/tokenizer.json", b"{", "model: {}/model: tokenizer: "),
        ("model/config.json", b"\0", "model: {}/model: config.json: "),
        ("run.yaml", bytes(range(256)), "{}/run.yaml: 'utf-8' codec"),
        ("run.yaml", b"a: [1\nb: {", "{}/run.yaml: while parsing a flow sequence"),
        ("run", b"", "{}/run"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(
    file: str, content: bytes, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.plain(tmp_path)))
    (tmp_path / file).write_bytes(content)
    assert main([str(tmp_path / "run.yaml")]) == 2
    told = capsys.readouterr().err
    assert told.splitlines()[-1].startswith("rudder: ")
    assert problem.format(tmp_path) in told.splitlines()[-1]
    assert list(tmp_path.rglob(bundle.MANIFEST)) == []


def test_a_store_cut_short_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.plain(tmp_path, tokens=1280)))
    stored = [str(tmp_path / "run.yaml"), f"--data.store={tmp_path / 'store'}"]
    assert main(stored) == 0
    shard = tmp_path / "store" / "00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert main([*stored, f"--out={tmp_path / 'second'}"]) == 2
    assert f"rudder: store: {shard} has " in capsys.readouterr().err
    assert list((tmp_path / "second").rglob(bundle.MANIFEST)) == []


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 40, {"random": torch.zeros(5)}, Mesh())
    (tmp_path / "000000040.0.pt").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=f"^checkpoint: {tmp_path}: "):
        checkpoint.load(tmp_path, Mesh())
    checkpoint.save(tmp_path, 40, {"random": torch.zeros(5)}, Mesh())
    with pytest.raises(CheckpointError, match="of 1 latent_ranks, not 2"):
        checkpoint.load(tmp_path, Mesh(latent_parts=2))


def test_two_runs_do_not_share_a_folder(whole: Config) -> None:
    with locked(Path(whole.out)), pytest.raises(OSError, match="another process writes in it"):
        run.run(whole)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("tokenz=3", "tokenz: there is no such field; did you mean tokens?"),
        ("sae.latent=3", "sae.latent: there is no such field; did you mean latents?"),
        ("data.stor=x", "data.stor: there is no such field; did you mean data.store?"),
        ("evaluation.foo=1", "evaluation.foo: there is no such field; did you mean evaluation.tokens?"),
        ("sweep.foo=[1]", "sae.foo: there is no such field; the fields are name"),
        ("sweep.k=[]", "sweep: a field without values, or a value twice"),
        ("sweep.k=[4,4]", "sweep: a field without values, or a value twice"),
        ("tokens=many", "tokens: Expected `int`, got `str`"),
        ("batch=0", "batch: Expected `int` >= 1"),
        ("sae.architecture=topkk", "sae.architecture: 'topkk' is not one of adaptive_k"),
        ("sae.site=layers.x", "sae.site: 'layers.x' is not layers.<L>"),
        ("sae.site=layers.7.resid_post", "site: layer 7 is not in 0..1"),
        ("sae.k=64", "sae.k: 64 of 32 latents"),
        ("sae.site=[layers.0.resid_post,layers.1.resid_post]", "sae.site: 2 for batch_topk; only route reads several"),
        (
            "sae.output_site=layers.0.mlp_out",
            "sae.output_site: layers.0.mlp_out for batch_topk; only transcoder has one",
        ),
        ("latent_ranks=3", "latent_ranks: 3 does not divide the 1 processes"),
        ("model=nowhere", "model: no config.json in nowhere"),
        ("corpus=nowhere.jsonl", "corpus: nowhere.jsonl: "),
        ("sae.latents=1e12", "sae.latents: 1000000000000, maximum 67108864"),
        ("batch=1e6", "tokens: 12800 are less than a batch of 1000000"),
        ("batch=12000", "batch: 12000 vectors, the data hold "),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_no_bundle_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, problem: str
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.plain(tmp_path)))
    assert main([str(tmp_path / "run.yaml"), f"--{change}"]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rudder: ")]
    assert len(told) == 1
    assert problem in told[0]
    assert list(tmp_path.rglob(bundle.MANIFEST)) == []


def test_a_run_that_diverges_stops_and_saves_nothing_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.plain(tmp_path)))
    assert main([str(tmp_path / "run.yaml"), "--sae.learning_rate=1e38"]) == 2
    assert "rudder: model-layers.0: the loss is " in capsys.readouterr().err
    assert not (tmp_path / "run" / run.CHECKPOINTS).exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "holds no text"), (bytes(range(256)), "line 1"), (b'{"text": "one"}\n', "too few to hold some out")],
)
@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.txt"])
def test_a_corpus_that_cannot_be_trained_on_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, problem: str
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.plain(tmp_path)))
    (tmp_path / name).write_bytes(content)
    assert main([str(tmp_path / "run.yaml"), f"--corpus={tmp_path / name}"]) == 2
    assert f"rudder: corpus: {'' if 'few' in problem else tmp_path}" in (err := capsys.readouterr().err)
    assert problem in err
    assert list(tmp_path.rglob(bundle.MANIFEST)) == []


def test_numbers_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.plain(tmp_path)))
    loaded = config.load(tmp_path / "run.yaml", {"tokens": "2e6", "sae.learning_rate": "1e-3"})
    assert loaded.tokens == 2_000_000
    assert config.sae_specs(loaded)[0].settings.learning_rate == 1e-3


def test_the_example_is_a_configuration_with_a_line_of_help_for_every_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--example"]) == 0
    (tmp_path / "example.yaml").write_text(text := capsys.readouterr().out)
    assert len(config.sae_specs(config.load(tmp_path / "example.yaml"))) == 3
    for field in settings.own_fields(Config):
        assert f"{field.name}:" in text
        assert field.help in text
    for field in settings.fields(Config):
        assert f"{field.name.rpartition('.')[2]}:" in text
        assert field.help in text
        assert field.help


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_an_example_that_explains_its_settings(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--example", architecture]) == 0
    (tmp_path / "example.yaml").write_text(text := capsys.readouterr().out)
    spec = config.sae_specs(config.load(tmp_path / "example.yaml"))[0]
    assert spec.architecture == architecture
    explained = " ".join(line.partition("# ")[2] for line in text.splitlines())
    unknown = [field.name for field in dataclasses.fields(spec.settings) if field.name not in explained]
    assert unknown == []


def test_help_tells_how_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "rudder train --example > run.yaml" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([])
    assert "--example" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_status:
        main(["run.yaml", "nonsense"])
    assert exit_status.value.code == 2
    assert "unrecognized arguments: nonsense" in capsys.readouterr().err
