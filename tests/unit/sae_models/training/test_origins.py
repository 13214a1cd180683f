"""A run trains on activations of text or images, or on stored vectors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModel, BertConfig, ViTConfig

from rudder.sae_models.activations import harvest, images, store
from rudder.sae_models.activations.hooks import parse_site
from rudder.sae_models.activations.store import Content
from rudder.sae_models.bundle import bundle
from rudder.sae_models.training import report
from rudder.sae_models.training.record import lines
from rudder.server import cli
from tests.unit import tiny
from tests.unit.sae_models.activations.test_store import Numbers

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SITE = "layers.0.resid_post"


def write_config(folder: Path, model: Any, origin: str) -> Path:
    """Write the configuration of a run on a random model and a source in the same folder; return the file."""
    settings = tiny.plain(folder, tokens=1280)
    if model is None:
        settings["model"] = ""
    else:
        torch.manual_seed(0)
        (folder / "model" / "model.safetensors").unlink()
        AutoModel.from_config(model).save_pretrained(folder / "model")
    settings |= {"corpus": None, origin: str(folder / origin)}
    if origin == "corpus":
        settings["corpus"] += ".jsonl"
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run.yaml"


def evaluation_of(folder: Path) -> dict[str, Any]:
    """Return the evaluation of a run with a single SAE."""
    (evaluation,) = (line["evaluation"] for line in lines(folder / "run" / "metrics.jsonl") if "evaluation" in line)
    return dict(evaluation)


def save_images(folder: Path, count: int = 64) -> None:
    """Save images of two classes, each with its own colour."""
    pillow = pytest.importorskip("PIL.Image")
    for number in range(count):
        kind = folder / ("cats", "dogs")[number % 2]
        kind.mkdir(parents=True, exist_ok=True)
        colour = (number * 4 % 256, 200 * (number % 2), 255 - number)
        pillow.new("RGB", (12, 10), colour).save(kind / f"{number}.png")


def save_processor(folder: Path) -> None:
    """Save the preprocessor configuration of a vision model."""
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(settings))


def test_vision_model_is_trained_on_images(tmp_path: Path) -> None:
    save_images(tmp_path / "images")
    config_file = write_config(tmp_path, ViTConfig(image_size=8, patch_size=4, **SMALL), "images")
    save_processor(tmp_path)
    assert cli.main(["train", str(config_file)]) == 0
    loaded = bundle.load(tmp_path / "run" / "model-layers.0")
    assert (loaded.manifest.model.name, loaded.manifest.d) == ("model", 16)
    assert loaded.manifest.training.ce_recovered is None
    assert 0 < (loaded.manifest.training.fvu or 0) < 1
    latent = max(loaded.catalogue.page(-1, 32), key=lambda summary: summary.frequency or 0)
    assert latent.label == ""
    assert loaded.catalogue.get(latent.index).quantiles
    assert float(loaded.statistics.residual_norm) > 0


def test_encoder_is_trained_on_text_and_its_latents_have_labels(tmp_path: Path) -> None:
    config_file = write_config(tmp_path, BertConfig(vocab_size=8192, **SMALL), "corpus")
    assert cli.main(["train", str(config_file)]) == 0
    loaded = bundle.load(tmp_path / "run" / "model-layers.0")
    assert loaded.manifest.training.ce_recovered is None
    labelled = [summary for summary in loaded.catalogue.page(-1, 32) if summary.label]
    assert labelled
    assert all(summary.origin == "corpus" and (summary.label_score or 0) > 0.5 for summary in labelled)
    evaluation = evaluation_of(tmp_path)
    assert "probe_1" in evaluation
    assert [cause.split(":")[0] for cause in evaluation["left_out"]] == [
        "words that latents promote",
        "CE recovered and KL",
    ]


def test_stored_vectors_need_no_model(tmp_path: Path) -> None:
    config_file = write_config(tmp_path, None, "vectors")
    content = Content("protein", "ab" * 32, "", ("layers.0.mlp_in", SITE), 8, 0, 5000, "bfloat16")
    source = Noise((500,) * 10)
    store.write(tmp_path / "vectors", content, source)
    assert cli.main(["train", str(config_file)]) == 0
    loaded = bundle.load(tmp_path / "run" / "vectors-layers.0")
    assert (loaded.manifest.model.name, loaded.manifest.model.sha256) == ("protein", "ab" * 32)
    assert loaded.manifest.training.l0 == pytest.approx(4, abs=1)
    evaluation = evaluation_of(tmp_path)
    assert len(evaluation["left_out"]) == 4
    assert "Left out: what latents stand for: needs text" in (tmp_path / "run" / report.REPORT).read_text()


class Noise(Numbers):
    """Random vectors of width 16."""

    def load(self, chunks: Any) -> dict[str, torch.Tensor]:
        """Return the same vectors on every call."""
        g = torch.Generator().manual_seed(chunks[0])
        x = torch.randn(sum(self.chunk_sizes[chunk] for chunk in chunks), 16, generator=g)
        return {"layers.0.mlp_in": x, SITE: x.abs()}


def test_store_of_images_equals_live_images(tmp_path: Path) -> None:
    save_images(tmp_path / "images")
    config_file = write_config(tmp_path, ViTConfig(image_size=8, patch_size=4, **SMALL), "images")
    save_processor(tmp_path)
    assert cli.main(["train", str(config_file), f"--data.store={tmp_path / 'store'}"]) == 0
    stored, site = store.load(tmp_path / "store"), parse_site(SITE)
    trunk = harvest.load_trunk(tmp_path / "model", site)
    train, held_out = images.read(tmp_path / "images", tmp_path / "model", trunk, (site,), seed=0)
    assert not set(train.files) & set(held_out.files)
    assert len(train.files) + len(held_out.files) == 64
    assert stored.tokens == 5 * len(train.files), "a class token and four patches of each image"
    live = torch.cat([train.load([chunk])[SITE] for chunk in range(len(train.chunk_sizes))])
    assert torch.equal(stored.load(range(len(stored.chunk_sizes)))[SITE], live.bfloat16())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (["images=x"], "corpus: set one of corpus, images, vectors; set: corpus and images"),
        (["corpus="], "corpus: set one of corpus, images, vectors; set: none"),
        (["model="], "model: is missing"),
        (["corpus=", "vectors=x", "data.store=y"], "data.store: vectors are a store already"),
        (["corpus=", "vectors=nowhere"], "store: nowhere/store.json: "),
        (["corpus=", "images=nowhere"], "images: nowhere: 0 images are too few to hold some out"),
    ],
)
def test_exactly_one_source_is_required(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], problem: str
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.plain(tmp_path)))
    assert cli.main(["train", str(tmp_path / "run.yaml"), *(f"--{change}" for change in changes)]) == 2
    assert f"rudder: {problem}" in capsys.readouterr().err


def test_damaged_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_images(tmp_path / "images")
    config_file = write_config(tmp_path, ViTConfig(image_size=8, patch_size=4, **SMALL), "images")
    save_processor(tmp_path)
    for file in (tmp_path / "images").rglob("1*.png"):
        file.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    assert cli.main(["train", str(config_file)]) == 2
    assert f"rudder: images: {tmp_path / 'images'}" in capsys.readouterr().err
    assert list(tmp_path.rglob(bundle.MANIFEST)) == []


def test_unsuitable_store_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_file = write_config(tmp_path, None, "vectors")
    content = Content("protein", "ab" * 32, "", ("layers.0.mlp_in", SITE), 8, 0, 1000, "bfloat16")
    store.write(tmp_path / "vectors", content, Noise((1000,)))
    assert cli.main(["train", str(config_file), "--sae.site=layers.3.resid_post"]) == 2
    assert f"does not hold layers.3.resid_post, but layers.0.mlp_in, {SITE}" in capsys.readouterr().err
    assert cli.main(["train", str(config_file), f"--out={tmp_path / 'second'}"]) == 2
    assert "1000 vectors are too few to hold some out" in capsys.readouterr().err
