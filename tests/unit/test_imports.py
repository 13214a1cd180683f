"""The import contracts of pyproject.toml: each fails on a forbidden import planted in a copy of the tree."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PYPROJECT = REPOSITORY / "pyproject.toml"
PACKAGES = {
    "rudder/server": "server",
    "rudder/sae_models": "sae_models",
    "rudder/v1": "clients/python/rudder/v1",
    "rudder_client": "clients/python/rudder_client",
}
# Contract, module that gets the import, and the import.
PLANTED = [
    ("server", "rudder.server.service.limits", "rudder.server.grpc.interceptors"),
    ("server", "rudder.server.engine.ledger", "rudder.server.service.limits"),
    ("server", "rudder.server.program.wire", "rudder.server.engine.ledger"),
    ("server", "rudder.server.grpc.interceptors", "rudder.server.process"),
    ("server", "rudder.server.monitoring.metrics", "rudder.server.config"),
    ("server", "rudder.server.models.convert", "rudder.server.config"),
    ("engine", "rudder.server.engine.worker.bank", "rudder.server.engine.call"),
    ("engine", "rudder.server.engine.telemetry.frame", "rudder.server.engine.worker.bank"),
    ("worker", "rudder.server.engine.worker.driver", "rudder.server.config"),
    ("worker-private", "rudder.server.engine.admission", "rudder.server.engine.worker.bank"),
    ("vllm", "rudder.server.service.limits", "vllm.v1.engine"),
    ("program", "rudder.server.program.wire", "rudder.sae_models.sparse.operations"),
    ("program", "rudder.server.program.wire", "grpc"),
    ("transport", "rudder.server.service.pace", "grpc"),
    ("server", "rudder.server.grpc.status", "rudder.server.http.errors"),
    ("server", "rudder.server.http.errors", "rudder.server.grpc.status"),
    ("sae-models", "rudder.sae_models.sae", "rudder.sae_models.formats.load"),
    ("sae-models", "rudder.sae_models.bundle.manifest", "rudder.sae_models.evaluation.splicing"),
    ("sae-models", "rudder.sae_models.training.trainer", "rudder.sae_models.analysis.compare"),
    ("sae-models-alone", "rudder.sae_models.bundle.manifest", "rudder.server.config"),
    ("client", "rudder_client.channel", "rudder.sae_models.sae"),
    ("cycles", "rudder.sae_models.sae", "rudder.sae_models.fidelity"),
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the Python files, as they lie in site-packages."""
    for package, folder in PACKAGES.items():
        for source in (REPOSITORY / folder).rglob("*.py"):
            target = tmp_path / package / source.relative_to(REPOSITORY / folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    return tmp_path


def lint(tree: Path, contract: str) -> "subprocess.CompletedProcess[str]":
    executable = Path(sys.executable).parent / "lint-imports"
    command = [str(executable), str(PYPROJECT), "--contract", contract, "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "1000"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


def contracts() -> dict[str, str]:
    """Return the names of the contracts by id."""
    declared = tomllib.loads(PYPROJECT.read_text())["tool"]["importlinter"]["contracts"]
    return {contract["id"]: contract["name"] for contract in declared}


def test_every_contract_has_a_planted_import() -> None:
    assert {contract for contract, _, _ in PLANTED} == set(contracts())


@pytest.mark.parametrize(("contract", "module", "imported"), PLANTED, ids=lambda value: value)
def test_planted_import_breaks_its_contract(tree: Path, contract: str, module: str, imported: str) -> None:
    file = tree / f"{module.replace('.', '/')}.py"
    file.write_text(f"import {imported}\n{file.read_text()}")
    result = lint(tree, contract)
    assert result.returncode == 1, result.stdout
    assert f"{contracts()[contract]} BROKEN" in result.stdout
    violations = result.stdout.split("Broken contracts")[1].splitlines()
    importer, target = module.rpartition(".")[2], imported.split(".")[-1 if imported.startswith("rudder") else 0]
    assert any(f"{importer} -> " in line and target in line for line in violations), result.stdout


def test_new_folder_must_be_given_a_layer(tree: Path) -> None:
    (tree / "rudder" / "sae_models" / "unknown.py").touch()
    result = lint(tree, "sae-models")
    assert result.returncode == 1
    assert "unknown" in result.stdout.split("Broken contracts")[1]


@pytest.mark.parametrize("module", ["rudder.server.program.compile", "rudder.server.program.watch"])
def test_program_loads_without_torch_vllm_and_grpc(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'vllm', 'grpc'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
