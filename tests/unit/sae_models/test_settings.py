"""Settings: YAML, overrides, bounds and help texts of a tree of Structs, whose errors name the field."""

import pickle
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from msgspec import Meta

from rudder.sae_models import settings
from rudder.sae_models.errors import UserError
from rudder.sae_models.settings import ConfigError


class Inner(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A section."""

    size: Annotated[int, Meta(ge=1, le=10, description="bounded")] = 3
    rate: Annotated[float, Meta(ge=0, description="a number")] = 0.5
    names: Annotated[tuple[str, ...] | None, Meta(description="texts")] = ()


class Item(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An item of a list."""

    index: Annotated[int, Meta(description="required")]


class Tree(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A configuration."""

    inner: Inner = Inner()
    kind: Annotated[Literal["a", "b"], Meta(description="a choice")] = "a"
    text: Annotated[str, Meta(description="text")] = ""
    keys: Annotated[dict[str, Any], Meta(description="free keys")] = {}
    items: Annotated[tuple[Item, ...], Meta(description="sections")] = ()


def error_of(**overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        settings.load(Tree, None, {name.replace("__", "."): text for name, text in overrides.items()})
    assert isinstance(caught.value, UserError)
    assert str(caught.value).startswith(f"{caught.value.field}: ")
    return str(caught.value)


def test_overrides_are_yaml_of_the_fields_type() -> None:
    overrides = {
        "inner.size": "1e1", "inner.names": "x,y", "inner.rate": "1", "text": "123", "keys.k": "[1, 2e3]",
        "keys.a.b": "x",
    }  # fmt: skip
    tree = settings.load(Tree, None, overrides)
    assert tree.inner == Inner(size=10, names=("x", "y"), rate=1.0)
    assert tree.text == "123"
    assert tree.keys == {"k": [1, 2000], "a": {"b": "x"}}
    assert settings.load(Tree, None, {"inner.names": "null"}).inner.names is None
    assert settings.load(Tree, None, {"inner.names": "[x, 'y,z']"}).inner.names == ("x", "y,z")


def test_errors_name_field_expectation_and_value() -> None:
    assert error_of(inner__size="0") == "inner.size: Expected `int` >= 1, got 0"
    assert error_of(inner__size="11") == "inner.size: Expected `int` <= 10, got 11"
    assert error_of(inner__size="many") == "inner.size: Expected `int`, got `str` 'many'"
    assert error_of(inner__size="[").startswith("inner.size: while parsing a flow node")
    assert error_of(kind="c") == "kind: invalid value 'c'; expected a|b"
    assert error_of(items="[{index: 1}, {}]") == "items[1].index: is missing"
    assert error_of(items="[{indx: 1}]") == "items[0].indx: there is no such field; did you mean index?"
    assert error_of(inner="{}") == "inner: is a section: override its fields, such as inner.size"
    assert error_of(size="3") == "size: there is no such field; did you mean inner.size?"
    assert error_of(inner__sizes="3") == "inner.sizes: there is no such field; did you mean inner.size?"
    assert error_of(zzz="3") == "zzz: there is no such field; the fields are inner, kind, text, keys, items"
    assert error_of(text__more="3").startswith("text.more: there is no such field")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"inner: 3", "inner: Expected a mapping, got `int` 3"),
        (b"inner:", "inner: Expected a mapping, got `null`"),
        (b"[1]", "{}: is not a mapping of fields"),
        (b"a: [", "{}: while parsing a flow node"),
        (b"\xff", "{}: 'utf-8' codec"),
        (b"text: 2020-99-99", "{}: month must be in 1..12"),
        (b"1: 2", "1: there is no such field"),
        (b"? [1]\n: 2", "{}: while constructing a mapping"),
        (b"[" * 5000, "{}: "),
        (b"items: [3]", "items[0]: Expected a mapping, got `int` 3"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        settings.load(Tree, path)
    assert str(caught.value).startswith(problem.format(path))
    assert "\n" not in str(caught.value)


def test_errors_can_be_pickled() -> None:
    assert str(pickle.loads(pickle.dumps(ConfigError("inner.size", "is missing")))) == "inner.size: is missing"


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file or directory$"):
        settings.load(Tree, tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=r": Is a directory$"):
        settings.load(Tree, tmp_path)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
KEYS = st.text(max_size=5) | st.sampled_from(["size", "rate", "index"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)


@hypothesis_settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["inner", "kind", "text", "keys", "items", "x"]), VALUES))
def test_any_tree_converts_or_names_a_field(tree: dict[str, Any]) -> None:
    with suppress(ConfigError):
        assert isinstance(settings.convert(Tree, tree), Tree)


def test_dump_and_example_are_files_that_load_reads_back(tmp_path: Path) -> None:
    tree = Tree(inner=Inner(size=4, names=None), keys={"k": [1]}, items=(Item(index=2),))
    (tmp_path / "c.yaml").write_text(settings.dump(tree))
    assert settings.load(Tree, tmp_path / "c.yaml") == tree
    (tmp_path / "example.yaml").write_text("\n".join(settings.example(Tree)))
    assert settings.load(Tree, tmp_path / "example.yaml") == Tree()


def test_example_explains_every_field() -> None:
    lines = list(settings.example(Tree, {"text": "other"}))
    assert lines[0] == "inner:  # A section"
    assert lines[1] == "  size: 3  # bounded"
    assert 'text: "other"  # text' in lines
    assert {field.name for field in settings.fields(Tree)} == {
        "inner.size", "inner.rate", "inner.names", "kind", "text", "keys", "items",
    }  # fmt: skip


def test_exponents_are_numbers() -> None:
    assert settings.parse_yaml("[1e6, -2.5e-1, 1e6x]", "field") == [1_000_000, -0.25, "1e6x"]
    assert yaml.safe_load("1e6") == "1e6"
