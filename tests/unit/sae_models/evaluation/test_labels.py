"""Labels from Neuronpedia's exports: every layout is read, labels of other SAEs are refused, records are counted."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rudder.sae_models.evaluation import labels
from rudder.sae_models.evaluation.labels import Label, LabelError

SITE = "layers.20.resid_post"


def record(index: object, description: object = "viruses", **more: object) -> dict[str, Any]:
    """Return a record of an export of explanations."""
    details = {"explanationModelName": "gpt-4o-mini", "typeName": "oai_token-act-pair", "embedding": [0.1, 0.2]}
    return {"modelId": "gemma-2-2b", "layer": "20-gemmascope-res-16k", "index": index, "description": description} | (
        details | more
    )


def read(path: Path, model: str = "google/gemma-2-2b") -> labels.Labels:
    """Read the labels of a file for an SAE of sixteen latents."""
    return labels.match(labels.read(path), [model, ""], SITE, 16)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_every_layout_is_read(tmp_path: Path, name: str) -> None:
    records = [record("3"), record(5, " planets\n and  stars ")]
    text = "\n".join(map(json.dumps, records)) + "\n\n" if "jsonl" in name else json.dumps(records)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    origin = "neuronpedia gpt-4o-mini oai_token-act-pair"
    assert read(tmp_path / name).by_latent == {3: Label("viruses", origin), 5: Label("planets and stars", origin)}
    assert read(tmp_path) == read(tmp_path / name)


def test_explanations_in_a_list_are_read(tmp_path: Path) -> None:
    explanations = [{"description": ""}, {"description": "cells", "explanationModelName": "a-model"}]
    (tmp_path / "a.json").write_text(json.dumps([record(1, None, explanations=explanations)]))
    assert read(tmp_path / "a.json").by_latent == {1: Label("cells", "neuronpedia a-model")}


def test_records_without_text_and_second_labels_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([record(1), record(1, "other"), record(2, " "), record(3, None)]))
    result = read(tmp_path / "a.json")
    assert (result.records, result.empty, result.repeated, len(result.by_latent)) == (4, 2, 1, 1)
    assert result.by_latent[1].text == "viruses"


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("modelId: 'gemma-2-9b', the bundle's model is gemma22b", {"modelId": "gemma-2-9b"}),
        ("layer: '19-gemmascope-res-16k', the bundle's site is layers.20", {"layer": "19-gemmascope-res-16k"}),
        ("index: 16, the SAE has 16", {"index": "16"}),
        ("index: -1, the SAE has 16", {"index": -1}),
    ],
)
def test_match_refuses_labels_of_another_sae_by_field(tmp_path: Path, field: str, change: dict[str, Any]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record(1)) + "\n" + json.dumps(record(2) | change))
    with pytest.raises(LabelError, match=f"^{field}"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("site", "known", "label_set", "problem"),
    [
        ("layers.20.resid_post", "20-gemmascope-res-16k", "20-gemmascope-res-16k", None),
        ("layers.20.resid_post", "", "20-gemmascope-res-16k", None),
        ("layers.20.resid_post", "20-gemmascope-res-16k", "20-other-res-16k", "are called '20-gemmascope-res-16k'"),
        ("layers.20.resid_post", "", "20-gemmascope-mlp-16k", "the bundle's site is layers.20.resid_post"),
        ("layers.20.resid_post", "", "20-gemmascope-att-16k", "the bundle's site is layers.20.resid_post"),
        ("layers.20.mlp_out", "", "20-gemmascope-res-16k", "the bundle's site is layers.20.mlp_out"),
        ("layers.20.attn_out", "", "20-gemmascope-att-16k", None),
        ("layers.20.mlp_out", "", "20-gemmascope-transcoder-16k", None),
        ("layers.20.resid_post", "", "20-gemmascope-res-65k", "the SAE has 16384 latents"),
        ("layers.20.resid_post", "", "20-gemmascope-res-15k", "the SAE has 16384 latents"),
        ("layers.20.resid_post", "", "20-aisi", "does not say whose labels they are, give --labels-set 20-aisi"),
        ("layers.20.resid_post", "20-aisi", "20-aisi", None),
    ],
)
def test_labels_of_another_set_are_refused_also_with_the_same_width(
    tmp_path: Path, site: str, known: str, label_set: str, problem: str | None
) -> None:
    (tmp_path / "a.json").write_text(json.dumps([record(1, layer=label_set)]))
    if problem is None:
        assert labels.match(labels.read(tmp_path), ["gemma-2-2b"], site, 16384, known).label_set == label_set
    else:
        with pytest.raises(LabelError, match=f"^layer: {label_set!r}.*{problem}"):
            labels.match(labels.read(tmp_path), ["gemma-2-2b"], site, 16384, known)


def test_labels_of_two_sets_are_refused(tmp_path: Path) -> None:
    records = [record(1), record(2, layer="20-other-res-16k")]
    (tmp_path / "a.json").write_text(json.dumps(records))
    with pytest.raises(LabelError, match=r"^layer: '20-other-res-16k' after '20-gemmascope-res-16k'"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"{}"),
        ("a.json", b"[1]"),
        ("a.json", b"["),
        ("a.jsonl", json.dumps(record("many")).encode()),
        ("a.jsonl", b"\xff\xfe"),
        ("a.jsonl.gz", b"not gzip"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 1000, mtime=0)[:30]),
        ("b/nothing", b""),
    ],
)
def test_read_refuses_other_files_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    path = tmp_path / "b" if name == "b/nothing" else tmp_path / name
    with pytest.raises(LabelError, match=f"^{path}"):
        read(path)
