"""The one configuration: this tree of dataclasses is the YAML file, and each of its fields is a command-line flag."""

import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal

import yaml

from rudder.sae_models import PRETRAINED


class ConfigError(ValueError):
    """A configuration that cannot be used; the message begins with the dotted field that is wrong."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name}: {problem}")
        self.field = name


def option(default: Any, text: str, least: float = -math.inf, most: float = math.inf) -> Any:
    """A field with its help text and, for numbers, its bounds."""
    return field(default=default, metadata={"help": text, "least": least, "most": most})


@dataclass(frozen=True)
class Engine:
    """The model and the bank in its forward pass."""

    model: str = option(str(PRETRAINED / "textbook-lm"), "folder or hub name of the language model")
    bundles: tuple[str, ...] = option(
        (str(PRETRAINED / "textbook-lm-layers.2"),), "folders of the SAE bundles to serve"
    )
    sites: tuple[str, ...] = option((), "sites to hook beside those of the bundles, such as layers.3.mlp_out")
    rows: int = option(256, "row places of each site's bank", 1, 1 << 16)
    slots: int = option(256, "requests with a program that can run at once", 1, 1 << 16)
    window: int = option(32, "longest window of a sequence condition, in tokens", 1, 1 << 14)
    sequence_sites: tuple[str, ...] | None = option(None, "sites whose gates may have a sequence condition; null: all")
    capture_tokens: int | None = option(None, "tokens of a step whose residual can be read; null: all", 1)
    max_num_seqs: int = option(128, "requests in one batch", 1)
    max_model_len: int | None = option(None, "longest prompt and answer together, in tokens; null: the model's own", 2)
    max_num_batched_tokens: int = option(2048, "tokens of one step", 1)
    kv_cache_memory_bytes: int | None = option(1 << 30, "size of the KV cache; null: most of what a GPU has free", 1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "arithmetic of the model")
    load_format: Literal["auto", "dummy"] = option("auto", "dummy: random weights, for benchmarks")
    enforce_eager: bool = option(False, "do not compile the model: a quicker start, a slower engine")
    tensor_parallel_size: int = option(1, "devices that share each layer", 1)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where the model runs")


@dataclass(frozen=True)
class Programs:
    """The operator's named programs."""

    folder: str | None = option(str(PRETRAINED / "programs"), "folder of programs, one YAML file each; null: none")


@dataclass(frozen=True)
class Policies:
    """The operator's policies: programs that run after a request's own, with the right to edit locked rows."""

    folder: str | None = option(None, "folder of policies, one YAML file each in the form of a program; null: none")
    default: str | None = option(None, "name of the policy that binds every caller; null: none")


@dataclass(frozen=True)
class WatchedFeature:
    """A latent that is counted in Prometheus over all requests."""

    index: int = option(MISSING, "number of the latent", 0)
    site: str | None = option(None, "its site; null: the bundle's")
    bundle: str | None = option(None, "its bundle; null: the only one served")


@dataclass(frozen=True)
class Listen:
    """Where the server is reached, and how it leaves."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(50051, "port of the gRPC services; 0: any free one", 0, 65535)
    metrics_port: int = option(9464, "port of the Prometheus endpoint; 0: any free one", 0, 65535)
    accept_s: float = option(5.0, "seconds after SIGTERM in which calls are still taken, until routers have heard", 0)
    drain_s: float = option(30.0, "seconds that running requests are given after that", 0)


@dataclass(frozen=True)
class Limits:
    """What a request may ask for. Rows and slots are bounded by the engine's bank."""

    max_prompt_tokens: int | None = option(None, "null: what the model takes, less one", 1)
    max_prompt_chars: int = option(1_000_000, "characters of a prompt, before it is tokenised", 1)
    max_tokens: int | None = option(None, "tokens to generate; null: what the model takes, less one", 1)
    max_messages: int = option(1024, "messages of a chat", 1)
    max_choices: int = option(16, "choices of one request (n)", 1)
    max_stop_strings: int = option(16, "stop strings, and stop token ids", 0)
    max_stop_chars: int = option(256, "characters of a stop string", 1)
    max_logit_bias: int = option(1024, "entries of the logit bias", 0)
    max_logprobs: int = option(20, "alternatives reported beside each token", 0)
    max_edits: int = option(256, "edits and triggers of a program", 1)
    max_reported_features: int = option(256, "features named in a report", 0)
    max_top_k: int = option(64, "strongest latents reported for each token", 0)
    max_salt_chars: int = option(128, "characters of a cache salt", 0)
    max_page_size: int = option(1000, "features in one page of a list or search", 1)
    max_query_chars: int = option(1000, "characters of a search", 1)
    queue: int = option(1024, "requests that wait for the bank or the engine", 0)
    max_message_bytes: int = option(4 << 20, "size of a request", 1024)
    max_reply_bytes: int = option(16 << 20, "size of one message of an answer", 1024)
    write_timeout_s: float = option(30.0, "seconds that a client may leave a message unread", 0.001)


@dataclass(frozen=True)
class Stream:
    """How generated tokens are gathered into messages."""

    message_budget_per_s: float | None = option(
        None, "messages a second, over all streams, before tokens are gathered; null: 100 for each core", 1
    )
    max_flush_ms: float = option(400.0, "longest time that a token waits to be gathered with the next", 0)


@dataclass(frozen=True)
class Logs:
    """The log, on standard error: one line a request, and start, drain and faults of the server."""

    format: Literal["text", "json"] = option("text", "readable lines, or one JSON object a line")
    level: Literal["debug", "info", "warning", "error"] = option(
        "info", "lowest level logged; vLLM's own: VLLM_LOGGING_LEVEL"
    )


@dataclass(frozen=True)
class Config:
    """Everything a server is told. The defaults serve the shipped model and bundle."""

    engine: Engine = field(default_factory=Engine)
    programs: Programs = field(default_factory=Programs)
    policies: Policies = field(default_factory=Policies)
    watch: tuple[WatchedFeature, ...] = option((), "latents counted in Prometheus over all requests")
    listen: Listen = field(default_factory=Listen)
    limits: Limits = field(default_factory=Limits)
    stream: Stream = field(default_factory=Stream)
    logs: Logs = field(default_factory=Logs)


@dataclass(frozen=True)
class Flag:
    """A field as a flag: `--engine.rows`. Values are written as in YAML, plain text for text."""

    name: str
    kind: Any
    help: str
    default: Any


def load(path: Path | None = None, overrides: Mapping[str, str] | None = None) -> Config:
    """The configuration of a YAML file with `overrides` (dotted field: text) in place. ConfigError names the field."""
    tree = parse_yaml(path.read_text(), str(path)) if path else None
    if not isinstance(tree, dict | NoneType):
        raise ConfigError(str(path), f"must be a mapping, not {yaml_name(tree)}")
    tree = tree or {}
    kinds = {flag.name: flag.kind for flag in flags()}
    for name, text in (overrides or {}).items():
        if name not in kinds:
            raise ConfigError(name, "there is no such field")
        section, _, last = name.rpartition(".")
        target = tree.setdefault(section, {}) if section else tree
        if not isinstance(target, dict):
            raise ConfigError(section, f"must be a mapping, not {yaml_name(target)}")
        target[last] = parse_flag(kinds[name], text, name)
    config: Config = build(Config, tree, "")
    return config


def flags(kind: type = Config, prefix: str = "") -> Iterator[Flag]:
    """Every field below `kind`, depth first."""
    hints = typing.get_type_hints(kind)
    for item in fields(kind):
        if is_dataclass(hints[item.name]):
            yield from flags(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield Flag(f"{prefix}{item.name}", hints[item.name], item.metadata["help"], item.default)


def show(config: Config) -> str:
    """The configuration as a YAML file that `load` reads back."""
    return yaml.safe_dump(plain(asdict(config)), sort_keys=False)


def plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(name, f"is not YAML: {' '.join(str(error).split())}") from error


def parse_flag(kind: Any, text: str, name: str) -> Any:
    """A flag's text as the YAML file would hold it: text stays as it is, lists of text may be separated by commas."""
    choices = (kind, *typing.get_args(kind)) if typing.get_origin(kind) is UnionType else (kind,)
    if NoneType in choices and text == "null":
        return None
    if str in choices or typing.get_origin(kind) is Literal:
        return text
    if tuple[str, ...] in choices and not text.startswith("["):
        return [part for part in text.split(",") if part]
    return parse_yaml(text, name)


def build(kind: Any, value: Any, name: str, bounds: Mapping[str, Any] | None = None) -> Any:
    """`value`, as YAML gives it, as an instance of `kind`."""
    if is_dataclass(kind):
        return build_section(typing.cast(type, kind), value, name)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is UnionType:
        return None if value is None else build(parts[0], value, name, bounds)
    if origin is Literal:
        if value not in parts:
            raise ConfigError(name, f"must be one of {', '.join(parts)}, not {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(name, f"must be a list, not {yaml_name(value)}")
        return tuple(build(parts[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    return build_scalar(kind, value, name, bounds or {})


def build_section(kind: type, value: Any, name: str) -> Any:
    """A mapping as a dataclass; absent fields take their defaults, unknown ones are refused."""
    if not isinstance(value, dict):
        raise ConfigError(name, f"must be a mapping, not {yaml_name(value)}")
    hints, dot = typing.get_type_hints(kind), f"{name}." if name else ""
    if unknown := [key for key in value if key not in hints]:
        raise ConfigError(f"{dot}{unknown[0]}", f"there is no such field; there are {', '.join(hints)}")
    if missing := [item.name for item in fields(kind) if required(item) and item.name not in value]:
        raise ConfigError(f"{dot}{missing[0]}", "is missing")
    given = [item for item in fields(kind) if item.name in value]
    return kind(**{f.name: build(hints[f.name], value[f.name], f"{dot}{f.name}", f.metadata) for f in given})


def required(item: Field[Any]) -> bool:
    """Whether a field has no default."""
    return item.default is MISSING and item.default_factory is MISSING


def build_scalar(kind: type, value: Any, name: str, bounds: Mapping[str, Any]) -> Any:
    """Text, a truth value or a number within its bounds."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(name, f"must be {YAML_NAMES[kind]}, not {yaml_name(value)} {value!r}")
    if kind in (int, float) and not bounds.get("least", -math.inf) <= value <= bounds.get("most", math.inf):
        raise ConfigError(name, f"must be {in_words(bounds)}, not {value}")
    return value


def in_words(bounds: Mapping[str, Any]) -> str:
    """`at least 1`, or `from 0 to 65535`."""
    least, most = bounds["least"], bounds["most"]
    return f"at least {least}" if most == math.inf else f"from {least} to {most}"


def yaml_name(value: Any) -> str:
    """What people call the kind of a YAML value."""
    return YAML_NAMES.get(type(value), type(value).__name__)


YAML_NAMES = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "a mapping",
    NoneType: "null",
}
