"""A server does not start with what is unsafe, unless it is allowed by name."""

import os
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from rudder.server import config, unsafe
from rudder.server.config import ConfigError


@pytest.fixture(autouse=True)
def safe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable, _ in unsafe.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))


def refused(name: str, match: str, **overrides: str) -> None:
    """Require that the server does not start, and that it does where the operator allows it."""
    with pytest.raises(ConfigError, match=match) as caught:
        unsafe.check(config.load(overrides=overrides))
    assert caught.value.field == "allow_unsafe"
    assert name in str(caught.value)
    assert unsafe.check(config.load(overrides={**overrides, "allow_unsafe": name})) == (name,)


def test_the_defaults_are_safe() -> None:
    assert unsafe.check(config.load()) == ()
    # What is allowed and not needed is not exported as needed.
    assert unsafe.check(config.load(overrides={"allow_unsafe": "dev_mode"})) == ()


@pytest.mark.parametrize("name", unsafe.VARIABLES)
def test_a_variable_that_switches_protection_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variable, _ = unsafe.VARIABLES[name]
    monkeypatch.setenv(variable, "1")
    refused(name, variable)
    if name != "failpoints":
        monkeypatch.setenv(variable, "0")
        assert unsafe.check(config.load()) == ()


def test_python_without_assertions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "flags", SimpleNamespace(optimize=1))
    refused("optimized_python", "python -O")


def test_plugins_that_nobody_named(monkeypatch: pytest.MonkeyPatch) -> None:
    own = metadata.EntryPoint("own", "vllm.plugins.x:f", unsafe.PLUGINS)
    strange = metadata.EntryPoint("strange", "elsewhere:f", unsafe.PLUGINS)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [own, strange] if group == unsafe.PLUGINS else [])
    refused("plugins", "would load strange:")
    monkeypatch.setenv("VLLM_PLUGINS", "strange")
    assert unsafe.check(config.load()) == ()


@pytest.mark.parametrize("field", [f"{section}.folder" for section in unsafe.FOLDERS])
def test_a_folder_that_everybody_may_write_to(field: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o777)
    refused("writable_folder", field, **{field: str(folder)})
    folder.chmod(0o755)
    assert unsafe.check(config.load(overrides={field: str(folder)})) == ()


def test_a_folder_that_is_mounted_read_only_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a ConfigMap, whose mode lets everybody write."""
    tmp_path.chmod(0o777)
    overrides = {"policies.folder": str(tmp_path)}
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY))
    assert unsafe.check(config.load(overrides=overrides)) == ()


def test_the_cache_of_the_engine_is_code(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    refused("writable_folder", "VLLM_CACHE_ROOT")


REFUSED = [advisory for advisory in unsafe.ADVISORIES if advisory.refused]


@pytest.mark.parametrize("advisory", REFUSED, ids=lambda advisory: unsafe.dotted(advisory.fixed_in))
def test_a_version_with_a_known_fault(advisory: unsafe.Advisory, monkeypatch: pytest.MonkeyPatch) -> None:
    *major, minor = advisory.fixed_in
    monkeypatch.setattr(unsafe, "engine_version", lambda: f"{unsafe.dotted((*major, minor - 1))}.3+cpu")
    refused("engine_version", advisory.fault)
    monkeypatch.setattr(unsafe, "engine_version", lambda: unsafe.dotted(advisory.fixed_in))
    assert not any(advisory.fault in finding.problem for finding in unsafe.findings(config.load()))


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0rc1", "1.0", ""])
def test_versions_that_are_served(version: str) -> None:
    assert unsafe.known_faults(version) == []


def test_a_name_that_allows_nothing() -> None:
    with pytest.raises(ConfigError, match="'devmode' is not one of"):
        unsafe.check(config.load(overrides={"allow_unsafe": "devmode"}))
