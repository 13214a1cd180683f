"""Token models: scores do not depend on chunks, files that are not models are refused by field."""

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as save_tensors

from rudder.sae_models import token_model
from rudder.sae_models.errors import UserError
from rudder.sae_models.token_model import START, TokenModel, buckets, vocabulary_sha256

BUCKETS = 1 << 12
WEIGHTS = np.random.default_rng(0).normal(size=BUCKETS).astype(np.float32)
HASHED = [[54502, 50884, 39888], [45187, 5002, 63429], [64670, 47619, 27261]]
METADATA = {"format_version": "1", "order": "3", "bias": "-0.25", "vocabulary": "v"}


def model(order: int = 3) -> TokenModel:
    return TokenModel(WEIGHTS, -0.25, order, "v")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=30), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_chunks_change_nothing(ids: list[int], order: int, seed: int) -> None:
    rng, scores, start = Random(seed), list[float](), 0
    while start < len(ids):
        stop = start + rng.randint(0, 4)
        scores += model(order).scores(ids[start:stop], ids[:start]).tolist()
        start = stop
    assert scores == model(order).scores(ids).tolist()


def test_score_is_the_sum_over_the_ngrams_that_end_at_the_token() -> None:
    rows = [[START, START, 5], [START, 5, 9], [5, 9, 9]]
    for score, row in zip(model().scores([5, 9, 9]), rows, strict=True):
        # The k-gram of a text that it fills alone.
        grams = [buckets(row[-k:], 3, BUCKETS)[-1][k - 1] for k in (1, 2, 3)]
        assert score == pytest.approx(float(WEIGHTS[grams].astype(np.float64).sum()) - 0.25)


def test_ngrams_spread_over_the_buckets() -> None:
    rng = np.random.default_rng(0)
    used = np.bincount(np.ravel(buckets(rng.integers(0, 8192, 20_000).tolist(), 3, BUCKETS)), minlength=BUCKETS)
    assert (used > 0).mean() > 0.99
    # Consecutive ids, as of a byte-level vocabulary, do not fall into the same buckets.
    assert len({gram for (gram,) in buckets(range(256), 1, 1 << 20)}) > 250


def test_the_order_and_the_length_of_an_ngram_count() -> None:
    assert buckets([1, 2], 2, 1 << 20)[1][1] != buckets([2, 1], 2, 1 << 20)[1][1]
    assert len({*buckets([7, 7, 7], 3, 1 << 20)[-1]}) == 3


def test_the_hash_never_changes() -> None:
    """Files of weights mean nothing under another hash."""
    assert buckets([0, 8191, 151_000], 3, 1 << 16) == HASHED


def test_vocabulary_hash_depends_on_texts_and_ids_alone() -> None:
    assert vocabulary_sha256({"a": 0, "b": 1}) == vocabulary_sha256({"b": 1, "a": 0})
    assert vocabulary_sha256({"a": 0, "b": 1}) != vocabulary_sha256({"a": 1, "b": 0})


def test_a_saved_model_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    digest = token_model.save(path, model())
    loaded = token_model.load(path, digest)
    assert loaded.scores([3, 4, 5]).tolist() == model().scores([3, 4, 5]).tolist()
    assert (loaded.order, loaded.vocabulary, loaded.bias) == (3, "v", -0.25)


BAD: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "SHA-256": ({}, {}),
    "format_version is 2": ({}, {"format_version": "2"}),
    "order: 9": ({}, {"order": "9"}),
    "finite": ({}, {"bias": "nan"}),
    "weights: 4095": ({"weights": WEIGHTS[1:]}, {}),
    "the only tensor": ({"weights": WEIGHTS.astype(np.float64)}, {}),
    "weights, bias": ({"weights": np.full(BUCKETS, np.inf, np.float32)}, {}),
}


@pytest.mark.parametrize("message", BAD)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, message: str) -> None:
    tensors, metadata = BAD[message]
    path = tmp_path / "model.safetensors"
    path.write_bytes(save_tensors({"weights": WEIGHTS} | tensors, METADATA | metadata))
    with pytest.raises(UserError, match=message):
        token_model.load(path, "0" * 64 if message == "SHA-256" else "")


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="token model"):
        token_model.load(path)
