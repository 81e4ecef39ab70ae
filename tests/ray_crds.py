"""The fields of KubeRay's, Kueue's and Prometheus' kinds that our manifests use, as their documented APIs have them.

A type, a set of allowed values, a list of one kind of element, or a dict of fields; `!` marks what must be there, and
what is not listed counts as misspelt. `FSDINO_TEST_CRDS` names a folder with the publishers' own CRDs (KubeRay 1.7:
ray.io_rayclusters.yaml, rayjobs and rayservices), which the manifests are then held against as well.
"""

from collections.abc import Iterator
from typing import Any

NUMBER, ANY = (int, float), object
RESOURCES = {"requests!": dict, "limits!": dict}
POD = {"metadata": dict, "spec!": ANY}  # checked as a PodTemplate
WORKERS = {
    "groupName!": str,
    "replicas!": int,
    "minReplicas!": int,
    "maxReplicas!": int,
    "rayStartParams!": dict,
    "template!": POD,
}
CLUSTER = {
    "rayVersion!": str,
    "authOptions!": {"mode!": {"disabled", "token"}, "secretName": str, "enableK8sTokenAuth": bool},
    "enableInTreeAutoscaling!": bool,
    "autoscalerOptions": {
        "version!": {"v1", "v2"},
        "upscalingMode": {"Default", "Aggressive", "Conservative"},
        "idleTimeoutSeconds": int,
        "resources": RESOURCES,
    },
    "gcsFaultToleranceOptions": {
        "backend": {"redis", "rocksdb"},
        "externalStorageNamespace": str,
        "redisAddress": str,
        "redisPassword": {"value": str, "valueFrom": {"secretKeyRef": {"name!": str, "key!": str}}},
    },
    "headGroupSpec!": {"rayStartParams!": dict, "serviceType": str, "template!": POD},
    "workerGroupSpecs!": [WORKERS],
}
JOB = {
    "entrypoint!": str,
    "entrypointNumCpus": NUMBER,
    "entrypointNumGpus": NUMBER,
    "backoffLimit!": int,
    "shutdownAfterJobFinishes!": bool,
    "ttlSecondsAfterFinished!": int,
    "activeDeadlineSeconds": int,
    "suspend": bool,
    "rayClusterSpec!": CLUSTER,
}
SERVICE = {"serveConfigV2!": str, "excludeHeadPodFromServeSvc": bool, "rayClusterConfig!": CLUSTER}
QUOTA = {"name!": str, "nominalQuota!": (int, str)}
MONITOR = {
    "selector!": {"matchExpressions!": [{"key!": str, "operator!": str, "values!": list}]},
    "podMetricsEndpoints!": [
        {"port!": str, "relabelings": [{"action!": str, "sourceLabels!": list, "targetLabel!": str}]}
    ],
}
SPECS = {
    ("ray.io/v1", "RayCluster"): CLUSTER,
    ("ray.io/v1", "RayJob"): JOB,
    ("ray.io/v1", "RayService"): SERVICE,
    ("kueue.x-k8s.io/v1beta2", "ResourceFlavor"): None,
    ("kueue.x-k8s.io/v1beta2", "LocalQueue"): {"clusterQueue!": str},
    ("kueue.x-k8s.io/v1beta2", "ClusterQueue"): {
        "namespaceSelector!": dict,
        "resourceGroups!": [{"coveredResources!": list, "flavors!": [{"name!": str, "resources!": [QUOTA]}]}],
    },
    ("monitoring.coreos.com/v1", "PodMonitor"): MONITOR,
}
"""apiVersion and kind to what `spec` may hold."""


def faults(value: Any, fields: Any, at: str = "spec") -> Iterator[str]:
    """Where a value departs from its description."""
    if fields is ANY:
        return
    if isinstance(fields, dict):
        if not isinstance(value, dict):
            yield f"{at}: expected fields, got {value!r}"
            return
        named = {name.rstrip("!"): kind for name, kind in fields.items()}
        yield from (f"{at}.{name}: no such field" for name in value.keys() - named.keys())
        yield from (f"{at}.{name[:-1]}: missing" for name in fields if name.endswith("!") and name[:-1] not in value)
        for name in value.keys() & named.keys():
            yield from faults(value[name], named[name], f"{at}.{name}")
    elif isinstance(fields, list):
        if not isinstance(value, list) or not value:
            yield f"{at}: expected a list, got {value!r}"
            return
        for number, element in enumerate(value):
            yield from faults(element, fields[0], f"{at}[{number}]")
    elif isinstance(fields, set):
        if value not in fields:
            yield f"{at}: expected one of {sorted(fields)}, got {value!r}"
    elif not isinstance(value, fields) or (isinstance(value, bool) and fields is not bool):
        yield f"{at}: expected {fields}, got {value!r}"


def strict(schema: Any) -> Any:
    """A CRD's schema that takes no fields but its own, as the API server does when it is asked for strictness."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(part) for key, part in schema.items()}
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    if isinstance(made.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made
