"""The digest of the code that is compiled into the model's graph."""

from pathlib import Path

import pytest

from rudder.server.engine import traced
from rudder.server.engine.traced import code_digest


def test_code_digest_covers_every_traced_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, measured = {"bank.py", "hooks.py", "kernels.py", "dummy.py"}, {"layers.py", "measure.py", "probe.py"}
    assert {path.name for path in traced.TRACED} == worker | measured | {"edit.py", "operations.py", "sae.py"}
    copies = tuple(tmp_path / path.name for path in traced.TRACED)
    for copy, path in zip(copies, traced.TRACED, strict=True):
        copy.write_bytes(path.read_bytes())
    same = code_digest()
    monkeypatch.setattr(traced, "TRACED", copies)
    assert code_digest() == same
    for copy in copies:
        copy.write_text(copy.read_text() + "\n# changed\n")
        assert code_digest() != same
        same = code_digest()
