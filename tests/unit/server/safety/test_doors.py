"""There is one way out of the engine: every door and every method goes through the hold-back, or nowhere near it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool

import rudder.server
from rudder.server.grpc.server import SERVICES
from rudder.server.http import answers, app
from rudder.server.http import methods as http_methods
from rudder.server.service import inference

SERVER = Path(rudder.server.__file__).parent
# Beside the hold-back, Engine.stream is called by commands and checks that no client reaches.
COMMANDS = {
    "engine/selftest.py",
    "engine/harvest.py",
    "engine/answers.py",
    "bench/sides.py",
    "bench/cost.py",
    "bench/serving/client.py",
    "bench/redteam/engine.py",
    "bench/redteam/programs.py",
    "safety/evaluation.py",
}
# What gives a request to vLLM, and what names it.
SUBMITS = {"engine/engine.py", "engine/adapter.py"}
# The methods whose answers the model computes, and those that do not ask it.
COMPUTED = {"Generate", "Complete", "Inspect"}
STORED = {
    "InferenceService": {"Tokenize"},
    "FeatureService": {"List", "Get", "Search"},
    "ModelService": {"Get", "ListPrograms"},
    "PolicyService": {"List", "Get", "Validate", "Apply", "Explain"},
    "DebugService": {"GetLedger"},
}


def calls(path: Path, name: str) -> bool:
    """Return whether a file calls a function or method of this name."""
    nodes = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return any(getattr(node, "attr", getattr(node, "id", None)) == name for node in nodes)


def callers(name: str) -> set[str]:
    """Return the files of the server that call it, but those of the engine process."""
    files = (path for path in SERVER.rglob("*.py") if "worker" not in path.relative_to(SERVER).parts)
    return {str(path.relative_to(SERVER)) for path in files if calls(path, name)}


def methods() -> Iterator[tuple[str, str]]:
    """Yield (service, method) of the contract."""
    pool = descriptor_pool.Default()
    for service in SERVICES:
        for method in pool.FindServiceByName(service).methods:
            yield service.rpartition(".")[2], method.name


def test_the_hold_back_alone_reads_what_calls_generate() -> None:
    assert callers("stream") - COMMANDS == {"safety/holdback.py"}
    assert callers("add_request") <= SUBMITS
    assert callers("released") - COMMANDS == {"service/run.py"}


@pytest.mark.parametrize(("service", "method"), list(methods()))
def test_every_method_goes_through_the_hold_back_or_computes_nothing(service: str, method: str) -> None:
    computed = service == "InferenceService" and method in COMPUTED
    assert computed or method in STORED[service], "a new method: does its answer come from the model?"
    if service == "InferenceService":
        function = getattr(inference, method.lower())
        assert bool({"run", "run_whole"} & set(function.__code__.co_names)) == computed


# Each door, and the file in which its calls begin.
DOORS = {"grpc": "grpc/interceptors.py", "http": "http/app.py"}
# What a door may take of the layers below the service: who calls, and nothing of what guards and engine do.
ALLOWED_BELOW = ("service", "identity", "monitoring", "config")


def imports(path: Path) -> Iterator[str]:
    """Yield the parts of the server that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name.split(".")[2] for name in names if name.startswith("rudder.server."))


def test_every_call_of_a_door_begins_in_one_place() -> None:
    assert callers("begin_call") == set(DOORS.values())
    served = (SERVER / "serve.py").read_text()
    assert {name for name in DOORS if f"rudder.server.{name}.server import" in served} == set(DOORS)
    assert served.count("Door(serving)") == len(DOORS)


@pytest.mark.parametrize("door", DOORS)
def test_every_door_serves_the_same_functions(door: str) -> None:
    """A door calls functions of server/service, and no engine."""
    paths = list((SERVER / door).rglob("*.py"))
    assert paths
    for path in paths:
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not {"llm", "add_request", "hub"} & names, path
        assert set(imports(path)) <= {door, *ALLOWED_BELOW}, path


def test_every_route_of_the_http_door_is_a_method_of_the_contract() -> None:
    """Three routes ask the model through `respond`, which knows two methods, and one through Inspect; the others, and
    the console's files, compute nothing.
    """
    others = {app.MODELS, app.HEALTH, http_methods.LIVE}
    assert set(app.ROUTES) - set(app.ENDPOINTS) - set(http_methods.METHODS) == others
    asking = {name for name in ("generate", "complete") if calls(SERVER / "http/answers.py", name)}
    assert asking == {"generate", "complete"}
    paths = [path for path in (SERVER / "http").glob("*.py") if path.name not in ("answers.py", "methods.py")]
    assert not [path for path in paths if "inference." in path.read_text().replace("inference_pb2.", "")]
    assert {name.rpartition(".")[2] for name in (answers.STREAMED, answers.WHOLE)} <= COMPUTED


def test_methods_of_the_contract_are_the_same_functions_at_the_http_door() -> None:
    """Each has its gRPC path, its own request, and the name by which roles know it; none changes anything."""
    contract = {f"{service}.{method}" for service, method in methods()}
    for method in http_methods.ALL:
        service, _, name = method.name.partition(".")
        assert method.name in contract
        full = next(found for found in SERVICES if found.rpartition(".")[2] == service)
        described = descriptor_pool.Default().FindServiceByName(full).methods_by_name[name]
        assert method.path.decode() == f"/{full}/{name}"
        assert method.request.DESCRIPTOR.full_name == described.input_type.full_name
    assert "PolicyService.Apply" not in {method.name for method in http_methods.ALL}
    computed = {method.behaviour for method in http_methods.ALL if method.name.startswith("InferenceService.")}
    assert computed == {inference.inspect, inference.tokenize}
