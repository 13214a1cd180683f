"""`buf breaking` against the committed descriptor set: a change that breaks released clients is refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROTO = Path(__file__).parents[4] / "proto"
# Text of inference.proto, and what a breaking change makes of it.
BREAKING = {
    "removed field": ("  string cache_salt = 6;\n", ""),
    "renumbered field": ("string cache_salt = 6;", "string cache_salt = 7;"),
    "retyped field": ("uint32 stream_interval = 5;", "string stream_interval = 5;"),
    "renamed field": ("string cache_salt = 6;", "string salt = 6;"),
    "field moved into a oneof": ("string cache_salt = 6;", "oneof salt { string cache_salt = 6; }"),
    "field made repeated": ("string cache_salt = 6;", "repeated string cache_salt = 6;"),
    "removed rpc": ("  rpc Inspect(InspectRequest) returns (InspectResponse);\n", ""),
    "stream no longer": ("returns (stream GenerateResponse)", "returns (GenerateResponse)"),
    # buf reports the files that are missing.
    "other package": ("package rudder.v1;", "package rudder.v2;"),
}


@pytest.fixture
def proto(tmp_path: Path) -> Path:
    return shutil.copytree(PROTO, tmp_path / "proto")


def breaking(proto: Path) -> "subprocess.CompletedProcess[str]":
    buf = Path(sys.executable).parent / "buf"
    command = [str(buf), "breaking", str(proto), "--against", str(PROTO / "rudder.binpb")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def edit(proto: Path, old: str, new: str) -> None:
    file = proto / "rudder" / "v1" / "inference.proto"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("change", BREAKING)
def test_breaking_change_is_refused(proto: Path, change: str) -> None:
    edit(proto, *BREAKING[change])
    result = breaking(proto)
    assert result.returncode == 100, result.stderr
    assert "inference.proto" in result.stdout


def test_new_field_and_new_rpc_are_compatible(proto: Path) -> None:
    edit(proto, "string cache_salt = 6;", "string cache_salt = 6;\n  string tag = 7;")
    edit(proto, "service InferenceService {", "service InferenceService {\n  rpc Echo(TokenIds) returns (TokenIds);")
    result = breaking(proto)
    assert result.returncode == 0, result.stdout + result.stderr
