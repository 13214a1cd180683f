"""Start an engine together with the policies of the configuration, so that it never serves without them."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from msgspec import structs

from rudder.server import preflight
from rudder.server.config import Config
from rudder.server.engine.engine import Engine
from rudder.server.engine.start import pin_features, start_engine, watched_rows
from rudder.server.monitoring.metrics import Metrics
from rudder.server.program import wire
from rudder.server.program.errors import ProgramError
from rudder.server.program.named import load_policies, program_files
from rudder.server.program.rows import Registry, check_capacity
from rudder.server.safety import certificate as certificates
from rudder.server.safety.audit.chain import read_key
from rudder.server.safety.binding import stages_needed
from rudder.server.safety.memory import Memory
from rudder.server.safety.policy import Policy, compile_policy, digest_of_message
from rudder.server.safety.problems import PolicyInvalid, Problem
from rudder.server.safety.store import Change, PolicyStore
from rudder.v1 import policy_pb2, program_pb2

Messages = Mapping[Path, policy_pb2.Policy]
GONE = "no file has it: put it back, or write one with its name, `removed: true` and a raised version"
# (site, row)
Watchable = tuple[str, program_pb2.Row]


async def start_with_policies(config: Config, metrics: Metrics | None = None) -> tuple[Engine, PolicyStore]:
    """Start the engine and put every policy of the folder in force. Raises what `start_engine` raises, PolicyInvalid.

    A policy that cannot be put in force stops the start, before vLLM is started. So does one that was in force and is
    missing, or is older than it was then.
    """
    loop = asyncio.get_running_loop()
    config = await loop.run_in_executor(None, preflight.check, config)
    folder = Path(config.policies.folder) if config.policies.folder else None
    # Read first: a file that changes meanwhile is one that has changed since.
    contents = {path: path.read_bytes() for path in program_files(folder)} if folder else {}
    read: Messages = await loop.run_in_executor(None, load_policies, folder) if folder else {}
    memory = await loop.run_in_executor(None, Memory.open, config)
    check_memory(memory, read)
    standing = {path: message for path, message in read.items() if not memory.removes(message)}
    messages = {path: message for path, message in standing.items() if not message.removed}
    key = certificate_key(config)

    def check(registry: Registry) -> None:
        check_policies(standing, registry)
        if not config.policies.allow_uncertified:
            check_certificates(messages, registry, key)

    engine = await start_engine(with_stages(config, messages), metrics, check)
    try:
        store = PolicyStore(engine, folder, config.policies.allow_uncertified, memory, key)
        watched = [(feature.site, feature.row) for message in messages.values() for feature in message.watch]
        if watched:
            await pin_features(engine, distinct([*watched_rows(config, engine.bundles), *watched]))
        await put_in_force(store, read, messages)
    except BaseException:
        await engine.stop()
        raise
    store.files = {path: (contents.get(path, b""), message.name) for path, message in read.items()}
    return engine, store


async def put_in_force(store: PolicyStore, read: Messages, messages: Messages) -> None:
    """Put these policies of those that were read in force, and settle the others."""
    for path, message in messages.items():
        await store.apply(message, str(path))
    for path, message in read.items():
        if path not in messages:
            settle(store, message, str(path))


def check_memory(memory: Memory, messages: Messages) -> None:
    """Raise PolicyInvalid if a policy that was in force is missing from these, or older among them."""
    problems = [
        Problem(f"{path}: {field}", text)
        for path, message in messages.items()
        if message.name in memory.known and not memory.removes(message)
        for field, text in memory.objections(message)
    ]
    gone = memory.missing({message.name for message in messages.values()})
    problems += [Problem(name, f"version {version} was in force, and {GONE}") for name, version in gone.items()]
    if problems:
        raise PolicyInvalid("policies.folder", problems)


def settle(store: PolicyStore, message: policy_pb2.Policy, source: str) -> None:
    """Remember a removal that a file asks for; say that a policy which was removed stays so though it has a file."""
    if message.removed:
        store.remember(Policy(message, digest_of_message(message)), source)
    else:
        store.tell(
            Change("refused", source, None, f"{message.name}: was removed: raise its version to put it in force")
        )


def distinct(features: Sequence[Watchable]) -> list[Watchable]:
    """Return features without those that are there before: each has one series in Prometheus."""
    return [feature for number, feature in enumerate(features) if feature not in features[:number]]


def with_stages(config: Config, messages: Messages) -> Config:
    """Return the configuration with as many stages as the policies of its folder need, at least."""
    stages = max(config.policies.stages, stages_needed(messages.values()))
    return structs.replace(config, policies=structs.replace(config.policies, stages=stages))


def check_policies(messages: Messages, registry: Registry) -> None:
    """Raise PolicyInvalid, naming every problem of every file, unless all policies can be served together."""
    compiled, problems = [], []
    for path, message in messages.items():
        try:
            compiled.append(compile_policy(message, registry, path.parent, str(path)))
        except PolicyInvalid as invalid:
            problems += [Problem(f"{path}: {field}", text) for field, text in invalid.problems]
    if problems:
        raise PolicyInvalid("policies.folder", problems)
    check_rows(compiled, registry)


def check_certificates(messages: Messages, registry: Registry, key: bytes | None) -> None:
    """Raise PolicyInvalid if certificates of these policies are missing or of others, as far as that is known yet."""
    bundles = {known.name: known.sha256 for known in registry.dictionaries.values()}
    problems = [
        Problem(f"{path}: {field}", text)
        for path, message in messages.items()
        if certificates.needs_certificate(message)
        for field, text in certificates.objections(
            *certificates.standing_before_start(message, path.parent, key, bundles)
        )
    ]
    if problems:
        raise PolicyInvalid("policies.folder", problems)


def certificate_key(config: Config) -> bytes | None:
    """Return the key of the seal that certificates must have; None: they need none."""
    return read_key(Path(config.policies.certificate_key)) if config.policies.certificate_key else None


def check_rows(policies: Iterable[Policy], registry: Registry) -> None:
    """Raise PolicyInvalid, naming the first policy whose rows have no place beside those before it."""
    stages: list[tuple[wire.Site, ...]] = []
    for policy in policies:
        stages.append(tuple(wire.Site(number, rows) for number, rows in policy.rows.items()))
        try:
            check_capacity(stages, registry, policy.name)
        except ProgramError as error:
            raise PolicyInvalid(f"policy {policy.name!r}", [Problem("program", error.message)]) from error
