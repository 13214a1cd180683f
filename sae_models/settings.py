"""Configuration files: a tree of msgspec Structs is the YAML file, its help text and its command-line overrides.

Every section is a frozen Struct with `forbid_unknown_fields` and `kw_only`; a field's help text is
`Meta(description=...)`, its bounds are `Meta(ge=..., le=...)`. An override is a dotted field name and a value written
as in YAML: `{"sae.k": "64"}`.
"""

import difflib
import json
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import yaml
from msgspec import Meta

from rudder.sae_models.errors import UserError

S = TypeVar("S", bound=msgspec.Struct)
# msgspec's names of types that read differently in YAML.
YAML_NAMES = {"`object`": "a mapping", "`array`": "a list"}


class ConfigError(UserError):
    """A configuration that cannot be used. `field`: dotted name of the field, or path of the file."""

    def __init__(self, field: str, problem: str) -> None:
        # Both as arguments: an exception is unpickled from them.
        super().__init__(field, problem)
        self.field, self.problem = field, problem

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


class Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e6 as text; this loader reads it as a number."""


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    number = float(loader.construct_scalar(node))
    return int(number) if number.is_integer() else number


EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
Loader.add_implicit_resolver("!exponent", EXPONENT, list("-+0123456789"))
Loader.add_constructor("!exponent", _number)


@dataclass(frozen=True)
class Field:
    """One field of a configuration. `default` is msgspec.NODEFAULT where it is required."""

    name: str
    type: Any
    help: str
    default: Any


def load(kind: type[S], path: Path | None = None, overrides: Mapping[str, str] | None = None) -> S:
    """Read a YAML file, apply overrides and convert the result to `kind`. ConfigError: names the field at fault."""
    tree = read(path) if path else {}
    for name, text in (overrides or {}).items():
        override(tree, kind, name, text)
    return convert(kind, tree)


def read(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, or nothing. ConfigError: it cannot be read, or holds something else."""
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(str(path), error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), str(error)) from error
    tree = parse_yaml(content, str(path))
    if not isinstance(tree, dict | NoneType):
        raise ConfigError(str(path), "is not a mapping of fields")
    return tree or {}


def parse_yaml(text: str, name: str) -> Any:
    """Parse a YAML document. ConfigError on `name`: it is not YAML."""
    try:
        return yaml.load(text, Loader)
    # PyYAML's constructors raise ValueError for impossible dates and numbers.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(name, " ".join(str(error).split())) from error


def override(tree: dict[str, Any], kind: type[msgspec.Struct], name: str, text: str) -> None:
    """Set the field `name` of a tree of plain values from the text of a command line."""
    value = parse_value(type_of(kind, name), text, name)
    *sections, last = name.split(".")
    for depth, section in enumerate(sections, 1):
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(".".join(sections[:depth]), f"is not a mapping, but {tree!r}")
    tree[last] = value


def type_of(kind: type[msgspec.Struct], name: str) -> Any:
    """Return the type of a dotted field; Any for a key of a mapping field. ConfigError: no such field."""
    current: Any = kind
    for part in name.split("."):
        if is_section(current):
            hints = typing.get_type_hints(current, include_extras=True)
            if part not in hints:
                raise unknown_field(name, [field.name for field in fields(kind)])
            current = hints[part]
        elif any(typing.get_origin(shape) is dict for shape in alternatives(current)):
            return Any
        else:
            raise unknown_field(name, [field.name for field in fields(kind)])
    if is_section(current):
        raise ConfigError(name, f"is a section: override its fields, such as {next(fields(current, name + '.')).name}")
    return current


def parse_value(kind: Any, text: str, name: str) -> Any:
    """Parse an override's text as YAML; text fields take it as it is, lists of text may be separated by commas."""
    shapes = alternatives(kind)
    if NoneType in shapes and text == "null":
        return None
    if str in shapes or any(typing.get_origin(shape) is Literal for shape in shapes):
        return text
    if tuple[str, ...] in shapes and not text.startswith("["):
        return [part for part in text.split(",") if part]
    return parse_yaml(text, name)


def convert(kind: type[S], tree: Mapping[str, Any]) -> S:
    """Convert plain values to `kind`. ConfigError: names the field at fault."""
    require_known(kind, tree, "")
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        raise config_error(error, kind, tree) from error


def config_error(error: msgspec.ValidationError, kind: Any, tree: Any, prefix: str = "") -> ConfigError:
    """Describe a failed conversion of `tree` to `kind`: the dotted field, what was expected and the value."""
    problem, _, path = str(error).partition(" - at `$")
    field = path.strip("`").removeprefix(".")
    if match := re.fullmatch(r"Object missing required field `(.*)`", problem):
        return ConfigError(prefix + ".".join(filter(None, (field, match[1]))), "is missing")
    if problem.startswith("Invalid enum value"):
        choices = type_name(choices_at(kind, field))
        return ConfigError(prefix + field, f"{problem.replace('Invalid enum', 'invalid')}; expected {choices}")
    for name, words in YAML_NAMES.items():
        problem = problem.replace(name, words)
    value = value_at(tree, path.strip("`"))
    if isinstance(value, str | int | float):
        problem += f" {value!r}" if "got" in problem else f", got {value!r}"
    return ConfigError((prefix + field).rstrip(".") or "configuration", problem)


def choices_at(kind: Any, field: str) -> Any:
    """Return the type of a dotted field of Structs or dataclasses, list items included."""
    for name in re.sub(r"\[[\d.]+\]", "", field).split("."):
        shapes = alternatives(typing.get_type_hints(kind)[name])
        kind = next((part for shape in shapes for part in typing.get_args(shape) if is_section(part)), shapes[0])
    return kind


def value_at(tree: Any, path: str) -> Any:
    """Return the value at a path such as `.watch[1].index`; None where the path does not say which."""
    for key, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", path):
        if key and isinstance(tree, Mapping):
            tree = tree.get(key)
        elif index.isdigit() and isinstance(tree, list | tuple):
            tree = tree[int(index)]
        else:
            return None
    return tree


def require_known(kind: type[msgspec.Struct], tree: Any, prefix: str) -> None:
    """Raise ConfigError for a key that is no field of its section, at any depth."""
    if not isinstance(tree, Mapping):
        return
    hints = typing.get_type_hints(kind)
    for key, value in tree.items():
        if key not in hints:
            raise unknown_field(str(key), list(hints), prefix)
        for shape in alternatives(hints[key]):
            if is_section(shape):
                require_known(shape, value, f"{prefix}{key}.")
            elif typing.get_origin(shape) is tuple and is_section(typing.get_args(shape)[0]):
                for index, item in enumerate(value if isinstance(value, list | tuple) else ()):
                    require_known(typing.get_args(shape)[0], item, f"{prefix}{key}[{index}].")


def unknown_field(name: str, known: Iterable[str], prefix: str = "") -> ConfigError:
    """Describe a field that does not exist, with the field that was probably meant."""
    known = list(known)
    same_last = [field for field in known if field.rpartition(".")[2] == name]
    near = same_last or difflib.get_close_matches(name, known, 1)
    sections = dict.fromkeys(field.partition(".")[0] for field in known)
    hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(sections)}"
    return ConfigError(prefix + name, f"there is no such field; {hint}")


def fields(kind: type[msgspec.Struct], prefix: str = "") -> Iterator[Field]:
    """List every field below `kind` by its dotted name, depth first, with type, help text and default."""
    for field in own_fields(kind):
        if is_section(field.type):
            yield from fields(field.type, f"{prefix}{field.name}.")
        else:
            yield Field(prefix + field.name, field.type, field.help, field.default)


def own_fields(kind: type[msgspec.Struct]) -> Iterator[Field]:
    """List the fields of one section, subsections included."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in msgspec.structs.fields(kind):
        hint = hints[field.name]
        metas = [meta for meta in getattr(hint, "__metadata__", ()) if isinstance(meta, Meta)]
        text = next((meta.description for meta in metas if meta.description), "")
        has_factory = field.default_factory is not msgspec.NODEFAULT
        yield Field(field.name, hint, text, field.default_factory() if has_factory else field.default)


def is_section(kind: Any) -> bool:
    """Whether a type is a Struct, and so a section of the file."""
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union without their annotations; of another type, the type."""
    if typing.get_origin(kind) is Annotated:
        return alternatives(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (UnionType, typing.Union):
        return tuple(shape for member in typing.get_args(kind) for shape in alternatives(member))
    return (kind,)


def type_name(kind: Any) -> str:
    """Name a field's type for a usage message, such as `INT` or `auto|cpu|cuda`."""
    names = {str: "TEXT", int: "INT", float: "NUMBER", bool: "true|false", NoneType: "null", Any: "YAML"}
    shapes = alternatives(kind)
    if len(shapes) > 1:
        return "|".join(map(type_name, shapes))
    origin = typing.get_origin(shapes[0])
    if origin is Literal:
        return "|".join(typing.get_args(shapes[0]))
    return {tuple: "LIST", list: "LIST", dict: "MAPPING"}.get(origin) or names.get(shapes[0], "YAML")


def dump(config: msgspec.Struct) -> str:
    """Write a configuration as a YAML file that `load` reads back."""
    text: str = yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False, allow_unicode=True)
    return text


def example(kind: type[msgspec.Struct], values: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Write the lines of a YAML file with every field and its help text; `values` replace defaults."""
    for field in own_fields(kind):
        if is_section(field.type):
            yield f"{field.name}:  # {summary(field.type)}"
            yield from (f"  {line}" for line in example(field.type))
        else:
            yield line_of(field.name, (values or {}).get(field.name, field.default), field.help)


def line_of(name: str, value: Any, text: str) -> str:
    """Write one field with its help text."""
    line = f"{name}: {json.dumps(msgspec.to_builtins(value), ensure_ascii=False)}"
    return line + (f"  # {text}" if text else "")


def summary(kind: type) -> str:
    """Return the first line of a section's docstring, without its full stop."""
    return (kind.__doc__ or "").strip().partition("\n")[0].rstrip(".")
