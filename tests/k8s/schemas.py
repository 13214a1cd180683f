"""Schemas in which an unknown field is an error: Kubernetes' own, and for custom resources the fields that k8s/ uses.

kubernetes-validate holds those of Kubernetes. There is no package of the custom resources' that is as new as these, so
theirs are written here from the projects' API references: they catch a misspelling, not a change of the API.
"""

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

# The oldest and the newest Kubernetes that the manifests are for.
VERSIONS = ("1.31", "1.37")
CORE = "https://kubernetes.io/api/_definitions.json#/$defs/"
Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
DURATION: Schema = {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"}
LABELS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def struct(required: dict[str, Schema], **optional: Schema) -> Schema:
    """Return the schema of an object with these fields and no others."""
    properties = {**required, **optional}
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


def list_of(item: Schema) -> Schema:
    """Return the schema of a list that is not empty."""
    return {"type": "array", "items": item, "minItems": 1}


def core(name: str) -> Schema:
    """Return a reference to a definition of Kubernetes."""
    return {"$ref": CORE + name}


def custom(spec: Schema) -> Schema:
    """Return the schema of a custom resource."""
    metadata = struct({"name": TEXT}, namespace=TEXT, labels=LABELS, annotations=LABELS)
    return struct({"apiVersion": TEXT, "kind": TEXT, "metadata": metadata, "spec": spec})


POD_TEMPLATE = core("io.k8s.api.core.v1.PodTemplateSpec")
RULE = struct({"expr": TEXT}, alert=TEXT, record=TEXT, labels=LABELS, annotations=LABELS, keep_firing_for=DURATION)
RULE["properties"]["for"] = DURATION
SERVICE_MONITOR = struct(
    {
        "selector": struct({"matchLabels": LABELS}),
        "endpoints": list_of(struct({"port": TEXT}, path=TEXT, interval=DURATION, scrapeTimeout=DURATION)),
    }
)
BEHAVIOUR = core("io.k8s.api.autoscaling.v2.HorizontalPodAutoscalerBehavior")
SCALED_OBJECT = struct(
    {
        "scaleTargetRef": struct({"name": TEXT}, apiVersion=TEXT, kind=TEXT),
        "triggers": list_of(
            struct(
                {
                    "type": {"const": "prometheus"},
                    "metricType": {"enum": ["AverageValue", "Value"]},
                    "metadata": struct({"serverAddress": TEXT, "query": TEXT, "threshold": TEXT}),
                }
            )
        ),
    },
    minReplicaCount=COUNT,
    maxReplicaCount=COUNT,
    pollingInterval=COUNT,
    fallback=struct({"failureThreshold": COUNT, "replicas": COUNT}),
    advanced=struct({"horizontalPodAutoscalerConfig": struct({"behavior": BEHAVIOUR})}),
)
LEADER_WORKER_SET = struct(
    {
        "replicas": COUNT,
        "leaderWorkerTemplate": struct(
            {"size": COUNT, "leaderTemplate": POD_TEMPLATE, "workerTemplate": POD_TEMPLATE},
            restartPolicy={"enum": ["RecreateGroupOnPodRestart", "None"]},
        ),
    },
    startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
    rolloutStrategy=struct(
        {"type": {"const": "RollingUpdate"}},
        rollingUpdateConfiguration=struct({"maxSurge": COUNT, "maxUnavailable": COUNT}),
    ),
)
# The predictor is a PodSpec with these fields besides.
PREDICTOR_FIELDS = {"minReplicas": COUNT, "maxReplicas": COUNT, "labels": LABELS}
CUSTOM: dict[str, Schema] = {
    "monitoring.coreos.com/v1 ServiceMonitor": SERVICE_MONITOR,
    "monitoring.coreos.com/v1 PrometheusRule": struct(
        {"groups": list_of(struct({"name": TEXT, "rules": list_of(RULE)}, interval=DURATION))}
    ),
    "keda.sh/v1alpha1 ScaledObject": SCALED_OBJECT,
    "leaderworkerset.x-k8s.io/v1 LeaderWorkerSet": LEADER_WORKER_SET,
}


@cache
def definitions(version: str) -> Schema:
    """Return all definitions of a version of Kubernetes."""
    package = importlib.util.find_spec("kubernetes_validate")
    assert package is not None
    assert package.submodule_search_locations is not None
    folder = Path(package.submodule_search_locations[0], "kubernetes-json-schema", f"v{version}.0-local-strict")
    content: Schema = json.loads((folder / "_definitions.json").read_bytes())
    return content


@cache
def names(version: str) -> dict[str, str]:
    """Return the definition of each kind of a version of Kubernetes, by `apiVersion kind`."""
    found = {}
    for name, definition in definitions(version)["$defs"].items():
        for kind in definition.get("x-kubernetes-group-version-kind", ()):
            group = f"{kind['group']}/" if kind["group"] else ""
            found[f"{group}{kind['version']} {kind['kind']}"] = name
    return found


@cache
def validator(version: str, kind: str) -> Any:
    """Return the validator of a kind, given as `apiVersion kind`. KeyError: there is no such kind."""
    registry = Resource.from_contents(definitions(version)) @ Registry()
    if kind == "serving.kserve.io/v1beta1 InferenceService":
        schema = custom(struct({"predictor": predictor(version)}))
    else:
        schema = custom(CUSTOM[kind]) if kind in CUSTOM else core(names(version)[kind])
    return Draft202012Validator(schema, registry=registry)


def predictor(version: str) -> Schema:
    """Return the schema of KServe's predictor."""
    pod = definitions(version)["$defs"]["io.k8s.api.core.v1.PodSpec"]
    properties = {name: {"$ref": f"{CORE}io.k8s.api.core.v1.PodSpec/properties/{name}"} for name in pod["properties"]}
    return struct({}, **properties, **PREDICTOR_FIELDS)


def problems(item: dict[str, Any], version: str) -> list[str]:
    """Return what is wrong with an object, each with the path of its field."""
    kind = f"{item['apiVersion']} {item['kind']}"
    return [
        f"{kind} {item['metadata']['name']}: {error.json_path}: {error.message[:300]}"
        for error in validator(version, kind).iter_errors(item)
    ]
