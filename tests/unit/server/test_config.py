"""The server's configuration: read from a file and from overrides; every error names the field."""

from pathlib import Path

import msgspec
import pytest

from rudder.sae_models import settings
from rudder.server import config
from rudder.server.config import Config, ConfigError, WatchedFeature
from rudder.v1 import catalogue_pb2


def test_defaults_serve_the_shipped_model() -> None:
    assert (Path(config.load().engine.model) / "config.json").is_file()


def test_load_reads_back_what_show_writes(tmp_path: Path) -> None:
    overrides = {
        "watch": "[{index: 3, bundle: b}]",
        "engine.sites": "layers.1.mlp_out,layers.3.resid_pre",
        "listen.port": "0",
    }
    shown = config.load(overrides=overrides)
    (tmp_path / "c.yaml").write_text(config.show(shown))
    assert config.load(tmp_path / "c.yaml") == shown
    assert shown.watch == (WatchedFeature(index=3, bundle="b"),)
    assert shown.engine.sites == ("layers.1.mlp_out", "layers.3.resid_pre")


def test_overrides_take_precedence_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("engine: {rows: 7, slots: 9}")
    engine = config.load(tmp_path / "c.yaml", {"engine.rows": "8"}).engine
    assert (engine.rows, engine.slots) == (8, 9)


def test_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("")
    assert config.load(tmp_path / "c.yaml") == Config()


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("engine: {rowz: 1}", "engine.rowz"),
        ("engnie: {}", "engnie"),
        ("engine: 3", "engine"),
        ("engine: {rows: 1.5}", "engine.rows"),
        ("engine: {rows: '8'}", "engine.rows"),
        ("engine: {rows: true}", "engine.rows"),
        ("engine: {rows: 0}", "engine.rows"),
        ("engine: {rows: 99999999}", "engine.rows"),
        ("engine: {bundles: one}", "engine.bundles"),
        ("engine: {bundles: [1]}", "engine.bundles[0]"),
        ("engine: {dtype: int4}", "engine.dtype"),
        ("engine: {enforce_eager: 1}", "engine.enforce_eager"),
        ("engine: {model: null}", "engine.model"),
        ("limits: {write_timeout_s: .nan}", "limits.write_timeout_s"),
        ("limits: {write_timeout_s: -1}", "limits.write_timeout_s"),
        ("watch: [{index: 1}, {site: layers.1.mlp_out}]", "watch[1].index"),
        ("watch: [{index: -1}]", "watch[0].index"),
        ("listen: {port: 65536}", "listen.port"),
    ],
)
def test_errors_name_the_field(tmp_path: Path, text: str, field: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(tmp_path / "c.yaml")
    assert caught.value.field == field


@pytest.mark.parametrize("text", ["a: [", "- 1", "just text"])
def test_file_that_is_not_a_mapping_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        config.load(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("name", "text"), [("engine.rows", "many"), ("engine.nothing", "1"), ("engine", "1"), ("rows", "1")]
)
def test_bad_overrides_are_named(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(overrides={name: text})
    assert caught.value.field == name


def test_null_and_text_overrides() -> None:
    loaded = config.load(overrides={"programs.folder": "null", "engine.model": "123", "engine.sequence_sites": "null"})
    assert loaded.programs.folder is None
    assert loaded.engine.model == "123"
    assert loaded.engine.sequence_sites is None


def test_every_field_has_a_help_text() -> None:
    fields = list(settings.fields(Config))
    assert len({field.name for field in fields}) == len(fields) > 40
    assert all(field.help for field in fields)
    assert all(settings.summary(field.type) for field in settings.own_fields(Config) if settings.is_section(field.type))


def test_reported_limits_are_configured_limits() -> None:
    known = {field.name for field in msgspec.structs.fields(config.Limits)} | {"rows_per_site", "slots"}
    assert set(catalogue_pb2.Limits.DESCRIPTOR.fields_by_name) <= known
