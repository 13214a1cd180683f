"""A run exports bundles, resumes after a kill as if uninterrupted, and reports errors in one line."""

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
from rudder.sae_models.bundle.manifest import Context
from rudder.sae_models.evaluation import splicing
from rudder.sae_models.evaluation.labelling import INACTIVE
from rudder.sae_models.files import lock_folder
from rudder.sae_models.sae import AdaptiveK
from rudder.sae_models.sparse.collectives import Mesh
from rudder.sae_models.training import checkpoint, complexity, config, data, run
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
    """Return every training line of a run."""
    return [(line["step"], line["sae"], line["train"]) for line in lines(folder / "metrics.jsonl") if "train" in line]


@pytest.fixture(scope="module")
def complete_run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A sweep over k that ran without interruption."""
    settings = tiny.configuration(tmp_path_factory.mktemp("whole"), **SWEEP)
    run.run(settings)
    return settings


def test_run_writes_record_report_and_a_bundle_per_sae(complete_run: Config) -> None:
    out = Path(complete_run.out)
    assert config.load(out / "config.yaml") == complete_run
    assert [step for step, _, _ in curve(out)] == [step for step in range(10, 201, 10) for _ in range(2)]
    for k in (4, 8):
        loaded = bundle.load(out / f"model-layers.0-k{k}")
        assert (loaded.manifest.training.tokens, loaded.manifest.architecture) == (12_800, "batch_topk")
        assert loaded.manifest.training.l0 == pytest.approx(k, abs=0.5)
    fidelity = {name: figures["fvu"] for step, name, figures in curve(out) if step == 200}
    assert fidelity["model-layers.0-k8"] < fidelity["model-layers.0-k4"] < 1
    assert not list(out.rglob("*.partial"))


def test_record_holds_splicing_figures(complete_run: Config) -> None:
    evaluations = [
        line["evaluation"] for line in lines(Path(complete_run.out) / "metrics.jsonl") if "evaluation" in line
    ]
    assert len(evaluations) == 2
    for evaluation in evaluations:
        assert evaluation["kl"] > 0
        assert {"ce", "ce_spliced", "ce_ablated", "ce_recovered"} <= evaluation.keys()
        assert sum(evaluation["decoder_cosine"]) == 32
        assert sum(evaluation["density"]) == round(32 * (1 - evaluation["dead_share"]))
        assert 0 <= evaluation["probe_1"] <= 1


def test_record_report_and_manifest_hold_the_context_and_the_share_of_attention_sinks(complete_run: Config) -> None:
    out = Path(complete_run.out)
    figures = [line.get("train") or line["evaluation"] for line in lines(out / "metrics.jsonl")]
    assert all(values["outlier_share"] == 0 for values in figures)
    assert ">sinks<" in (out / "report.html").read_text()
    manifest = bundle.load(out / "model-layers.0-k4").manifest
    assert manifest.training.outlier_share == 0
    assert manifest.context == Context(32, True, (0,))


def test_excluded_positions_and_special_tokens_are_in_no_statistic(tmp_path: Path) -> None:
    changes = {"prepend_bos": False, "excluded_positions": [0, 1, 2], "exclude_special_tokens": True, "tokens": 3200}
    settings = tiny.configuration(tmp_path, **changes)
    text = data.load_windows(settings)
    assert not bool(text.train.counted[:, :3].any())
    manifest = bundle.load(run.run(settings)[0]).manifest
    assert manifest.context == Context(32, False, (0, 1, 2), (0, 1))
    with pytest.raises(ConfigError, match=r"^excluded_positions: hold all 32 positions"):
        tiny.configuration(tmp_path / "none", excluded_positions=list(range(40)))


def test_repeating_a_complete_run_changes_nothing(complete_run: Config) -> None:
    out = Path(complete_run.out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert [path.name for path in run.run(complete_run)] == ["model-layers.0-k4", "model-layers.0-k8"]
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}


def test_other_configuration_in_the_same_folder_is_refused_with_its_field(complete_run: Config) -> None:
    changed = config.convert(tiny.plain(Path(complete_run.out).parent, **SWEEP, window=64))
    with pytest.raises(ConfigError, match=r"^window: differs from .*config\.yaml"):
        run.run(changed)


def test_killed_run_resumes_to_the_same_curve(complete_run: Config, tmp_path: Path) -> None:
    settings = tiny.plain(tmp_path, **SWEEP)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "rudder.server", "train", str(tmp_path / "run.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / checkpoint.LATEST).exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    latest = json.loads((out / "checkpoints" / checkpoint.LATEST).read_bytes())
    assert 0 < latest["step"] < 200, "the kill came too late to tell anything"
    assert not (out / "model-layers.0-k4").exists()
    run.run(config.convert(settings))
    assert [line[:2] for line in curve(out)] == [line[:2] for line in curve(Path(complete_run.out))]
    for (_, _, resumed), (_, _, uninterrupted) in zip(curve(out), curve(Path(complete_run.out)), strict=True):
        assert resumed == pytest.approx(uninterrupted, rel=1e-5)


def test_latents_are_labelled_by_the_words_they_fire_on(tmp_path: Path) -> None:
    settings = tiny.plain(tmp_path, model=str(tiny.TEXTBOOK_LM), tokens=12_800)
    settings["sae"] |= {"site": "layers.1.resid_post", "latents": 256, "k": 8}
    text = "Cells divide. Viruses need a host, and the host may be a cell. " * 10
    records = ({"book": f"book{i % 2}", "module": f"m{i}", "title": f"Section {i}", "text": text} for i in range(60))
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, records)))
    loaded = bundle.load(run.run(config.convert(settings))[0])
    assert 0 < (loaded.manifest.training.fvu or 0) < 0.8
    labels = [summary.label for summary in loaded.catalogue.page(-1, 256)]
    assert any("viruses" in label or "cells" in label for label in labels)
    assert INACTIVE in labels


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in ("route", "transcoder")])
def test_every_architecture_exports_a_bundle(tmp_path: Path, architecture: str) -> None:
    settings = tiny.plain(tmp_path, tokens=3200)
    settings["sae"]["architecture"] = architecture
    loaded = bundle.load(run.run(config.convert(settings))[0])
    assert loaded.manifest.architecture == architecture
    assert 0 < (loaded.manifest.training.fvu or 0) < 1


@pytest.mark.parametrize("stored", [False, True])
def test_adaptive_k_is_trained_on_the_complexities_of_the_corpus(tmp_path: Path, stored: bool) -> None:
    settings = tiny.plain(tmp_path, tokens=3200)
    settings["sae"] |= {"architecture": "adaptive_k", "k_min": 2, "k_max": 16}
    if stored:
        settings["data"]["store"] = str(tmp_path / "store")
    selection = bundle.load(run.run(config.convert(settings))[0]).sae.selection
    assert isinstance(selection, AdaptiveK)
    assert float(selection.probe.norm()) > 0


def test_complexities_come_from_the_corpus_or_the_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tiny.plain(tmp_path, tokens=3200)
    settings["sae"] |= {"architecture": "adaptive_k", "k_min": 2, "k_max": 16}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    records = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    records[3:] = [record | {"complexity": None} for record in records[3:]]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert main([str(tmp_path / "run.yaml")]) == 2
    errors = capsys.readouterr().err
    assert "rudder: corpus: 3 of 120 documents have a `complexity` from 0 to 10" in errors
    assert "set sae.complexity to loss" in errors
    assert main([str(tmp_path / "run.yaml"), "--sae.complexity=loss", f"--out={tmp_path / 'second'}"]) == 0
    selection = bundle.load(tmp_path / "second" / "model-layers.0").sae.selection
    assert isinstance(selection, AdaptiveK)
    assert float(selection.probe.norm()) > 0


def test_loss_complexity_is_monotonic_in_the_loss(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model")
    documents = corpus.read(tiny.save_corpus(tmp_path / "corpus.jsonl"))
    windows = corpus.windows(documents, harvest.load_tokenizer(model), 32)
    complexities = complexity.loss_complexity(documents, windows, model, torch.device("cpu"))
    nats, count = splicing.losses(harvest.load_model(model), windows).unbind(1)
    assert (float(complexities.min()), float(complexities.max())) == (0, 10)
    order = (nats / count).argsort()
    assert bool((complexities[order].diff() >= 0).all())


def test_router_and_transcoder_export_bundles(tmp_path: Path) -> None:
    settings = tiny.plain(tmp_path, tokens=3200)
    sites = ["layers.0.resid_post", "layers.1.resid_post"]
    settings["sae"] = {"architecture": "route", "site": sites, "latents": 32, "k": 4}
    routed = bundle.load(run.run(config.convert(settings))[0])
    assert routed.manifest.sites == tuple(sites)
    assert routed.sae.router is not None
    settings["sae"] = {"architecture": "transcoder", "latents": 32, "k": 4, "learning_rate": 1e-2}
    settings["sae"] |= {"site": "layers.1.mlp_in", "output_site": "layers.1.mlp_out"}
    settings["out"] += "-transcoder"
    transcoder = bundle.load(run.run(config.convert(settings))[0])
    assert (transcoder.manifest.site, transcoder.manifest.output_site) == ("layers.1.mlp_in", "layers.1.mlp_out")
    assert 0 < (transcoder.manifest.training.fvu or 0) < 1


@pytest.mark.parametrize("stop", [39, 41, 199])
def test_interrupted_run_loses_at_most_one_interval_and_ends_equal(
    complete_run: Config, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny.configuration(tmp_path, **SWEEP)
    original_step = run.step_learner
    steps = 0

    def stopping(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > 2 * stop:
            raise KeyboardInterrupt
        return original_step(*args)

    monkeypatch.setattr(run, "step_learner", stopping)
    with pytest.raises(KeyboardInterrupt):
        run.run(settings)
    monkeypatch.setattr(run, "step_learner", original_step)
    loaded = checkpoint.load(Path(settings.out) / "checkpoints", Mesh())
    assert (loaded[0] if loaded else 0) == stop // 40 * 40
    run.run(settings)
    for k in (4, 8):
        resumed, expected = (
            bundle.load(Path(out) / f"model-layers.0-k{k}").sae for out in (settings.out, complete_run.out)
        )
        assert torch.equal(resumed.encoder, expected.encoder)
        assert torch.equal(resumed.decoder, expected.decoder)


def test_stored_run_equals_live_run_up_to_rounding(complete_run: Config, tmp_path: Path) -> None:
    settings = tiny.plain(tmp_path, **SWEEP)
    settings["data"] = {"block": 2000, "store": str(tmp_path / "store")}
    run.run(config.convert(settings))
    stored, live = curve(Path(settings["out"])), curve(Path(complete_run.out))
    for name in {name for _, name, _ in live}:
        actual, expected = ([at["fvu"] for _, sae, at in lines if sae == name] for lines in (stored, live))
        # The same vectors in the same order; their rounding to bfloat16 shows in later steps, where it also decides
        # which latents are dense enough for the penalty.
        assert actual[:3] == pytest.approx(expected[:3], rel=5e-3)
        assert actual == pytest.approx(expected, rel=0.15)
    assert stored[-1][2]["l0"] == pytest.approx(live[-1][2]["l0"], rel=0.05)


def test_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    state = {"trainers": {}, "random": torch.zeros(5)}
    checkpoint.save(tmp_path, 40, state, Mesh())
    problem = r"000000080\.0\.pt: .*File too large; the one before it is whole"
    with full_beyond(4096), pytest.raises(CheckpointError, match=problem):
        checkpoint.save(tmp_path, 80, {"big": torch.zeros(10_000)}, Mesh())
    loaded = checkpoint.load(tmp_path, Mesh())
    assert loaded is not None
    assert loaded[0] == 40
    assert {file.name for file in tmp_path.iterdir()} == {"000000040.0.pt", checkpoint.LATEST}


def test_full_disk_leaves_no_partial_bundle_and_the_run_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.plain(tmp_path, tokens=1280)))
    out = tmp_path / "run"
    # A checkpoint of this run takes 20 KB, its catalogue more than 60 KB.
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
        (20_000, "store: {}/store: File too large; the shards before it are complete"),
    ],
)
def test_full_disk_is_one_error_with_the_file_and_the_run_resumes(
    size: int, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.plain(tmp_path, tokens=1280, log_every=2)))
    command = [str(tmp_path / "run.yaml"), *([f"--data.store={tmp_path / 'store'}"] if "store" in problem else [])]
    with full_beyond(size):
        assert main(command) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rudder: ")]
    assert len(errors) == 1
    assert problem.format(tmp_path) in errors[0]
    assert "File too large" in errors[0]
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
def test_damaged_file_is_named_in_one_line(
    file: str, content: bytes, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.plain(tmp_path)))
    (tmp_path / file).write_bytes(content)
    assert main([str(tmp_path / "run.yaml")]) == 2
    errors = capsys.readouterr().err
    assert errors.splitlines()[-1].startswith("rudder: ")
    assert problem.format(tmp_path) in errors.splitlines()[-1]
    assert list(tmp_path.rglob(bundle.MANIFEST)) == []


def test_truncated_store_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.plain(tmp_path, tokens=1280)))
    stored = [str(tmp_path / "run.yaml"), f"--data.store={tmp_path / 'store'}"]
    assert main(stored) == 0
    shard = tmp_path / "store" / "00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert main([*stored, f"--out={tmp_path / 'second'}"]) == 2
    assert f"rudder: store: {shard} has " in capsys.readouterr().err
    assert list((tmp_path / "second").rglob(bundle.MANIFEST)) == []


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 40, {"random": torch.zeros(5)}, Mesh())
    (tmp_path / "000000040.0.pt").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=f"^checkpoint: {tmp_path}: "):
        checkpoint.load(tmp_path, Mesh())
    checkpoint.save(tmp_path, 40, {"random": torch.zeros(5)}, Mesh())
    with pytest.raises(CheckpointError, match="of 1 latent_ranks, not 2"):
        checkpoint.load(tmp_path, Mesh(latent_parts=2))


def test_second_run_in_a_folder_is_refused(complete_run: Config) -> None:
    with lock_folder(Path(complete_run.out)), pytest.raises(OSError, match="another process writes in it"):
        run.run(complete_run)


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
def test_invalid_configuration_is_one_error_line_and_leaves_no_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, problem: str
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.plain(tmp_path)))
    assert main([str(tmp_path / "run.yaml"), f"--{change}"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rudder: ")]
    assert len(errors) == 1
    assert problem in errors[0]
    assert list(tmp_path.rglob(bundle.MANIFEST)) == []


def test_diverging_run_stops_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.plain(tmp_path)))
    assert main([str(tmp_path / "run.yaml"), "--sae.learning_rate=1e38"]) == 2
    assert "rudder: model-layers.0: the loss is " in capsys.readouterr().err
    assert not (tmp_path / "run" / run.CHECKPOINTS).exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "holds no text"), (bytes(range(256)), "line 1"), (b'{"text": "one"}\n', "too few to hold some out")],
)
@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.txt"])
def test_unsuitable_corpus_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, problem: str
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.plain(tmp_path)))
    (tmp_path / name).write_bytes(content)
    assert main([str(tmp_path / "run.yaml"), f"--corpus={tmp_path / name}"]) == 2
    assert f"rudder: corpus: {'' if 'few' in problem else tmp_path}" in (err := capsys.readouterr().err)
    assert problem in err
    assert list(tmp_path.rglob(bundle.MANIFEST)) == []


def test_numbers_may_have_an_exponent(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.plain(tmp_path)))
    loaded = config.load(tmp_path / "run.yaml", {"tokens": "2e6", "sae.learning_rate": "1e-3"})
    assert loaded.tokens == 2_000_000
    assert config.sae_specs(loaded)[0].settings.learning_rate == 1e-3


def test_example_is_a_configuration_with_help_for_every_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_every_architecture_has_an_example_that_documents_its_settings(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--example", architecture]) == 0
    (tmp_path / "example.yaml").write_text(text := capsys.readouterr().out)
    spec = config.sae_specs(config.load(tmp_path / "example.yaml"))[0]
    assert spec.architecture == architecture
    explained = " ".join(line.partition("# ")[2] for line in text.splitlines())
    unknown = [field.name for field in dataclasses.fields(spec.settings) if field.name not in explained]
    assert unknown == []


def test_help_mentions_the_example(capsys: pytest.CaptureFixture[str]) -> None:
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
