"""Digest of the source files that torch.compile traces into the model's graph.

vLLM keys its compile cache by `additional_config`, not by this code: without the digest, a changed bank would run from
an old artifact. Names the files by path, so that the server process imports neither torch nor the worker for it.
"""

import hashlib
from pathlib import Path

SERVER = Path(__file__).parents[1]
WORKER, SAE_MODELS = SERVER / "engine" / "worker", SERVER.parent / "sae_models"
TRACED = (
    WORKER / "bank.py",
    WORKER / "dummy.py",
    WORKER / "hooks.py",
    WORKER / "kernels.py",
    SAE_MODELS / "activations" / "layers.py",
    SAE_MODELS / "activations" / "measure.py",
    SAE_MODELS / "activations" / "probe.py",
    SAE_MODELS / "edit.py",
    SAE_MODELS / "operations.py",
    SAE_MODELS / "sae.py",
)


def code_digest() -> str:
    """Return 16 hex digits of the SHA-256 over the traced files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in TRACED)).hexdigest()[:16]
