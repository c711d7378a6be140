"""The manifests for Kubernetes. Pods, config maps and references are held against Kubernetes' own schemas (strict: an
unknown field is a mistake). KubeRay's schema comes with no package, so its fields are checked against a table of those
that its API reference names for version 1.6 (`FIELDS`), as far as they are used.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray
import yaml

from app.build import GRACE_S
from app.cli.flags import RAY_FLAGS
from tests.unit.manifests.files import KEYS, check_application, documents, pool_of

FILE = "kuberay/rayservice.yaml"
KUBERNETES = "1.33"

#: The fields of ray.io/v1 by what they belong to: a type, the values that are allowed, a kind below, or a list of that.
FIELDS: dict[str, dict[str, Any]] = {
    "RayService": {"apiVersion": {"ray.io/v1"}, "kind": {"RayService"}, "metadata": dict, "spec": "RayServiceSpec"},
    "RayServiceSpec": {
        "rayClusterDeletionDelaySeconds": int,
        "upgradeStrategy": "RayServiceUpgradeStrategy",
        "serveConfigV2": str,
        "rayClusterConfig": "RayClusterSpec",
    },
    "RayServiceUpgradeStrategy": {"type": {"NewCluster", "None"}},
    "RayClusterSpec": {
        "rayVersion": str,
        "authOptions": "AuthOptions",
        "gcsFaultToleranceOptions": "GcsFaultToleranceOptions",
        "headGroupSpec": "HeadGroupSpec",
        "workerGroupSpecs": ["WorkerGroupSpec"],
    },
    "AuthOptions": {"mode": {"token", "disabled"}, "secretName": str},
    "GcsFaultToleranceOptions": {"redisAddress": str, "redisPassword": "RedisCredential"},
    "RedisCredential": {"valueFrom": dict},
    "HeadGroupSpec": {"rayStartParams": dict, "template": dict},
    "WorkerGroupSpec": {
        "groupName": str,
        "replicas": int,
        "minReplicas": int,
        "maxReplicas": int,
        "rayStartParams": dict,
        "template": dict,
    },
}
REQUIRED = {
    "HeadGroupSpec": {"rayStartParams", "template"},
    "WorkerGroupSpec": {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"},
    "RayClusterSpec": {"headGroupSpec"},
    "GcsFaultToleranceOptions": {"redisAddress"},
}


def check_fields(value: Any, kind: Any, path: str) -> None:
    """Raises `AssertionError` for a field that KubeRay does not know, or that has another type there."""
    if isinstance(kind, list):
        assert isinstance(value, list), path
        for index, each in enumerate(value):
            check_fields(each, kind[0], f"{path}[{index}]")
    elif isinstance(kind, set):
        assert value in kind, path
    elif isinstance(kind, type):
        assert type(value) is kind, path
    else:
        assert isinstance(value, dict), path
        assert not value.keys() - FIELDS[kind].keys(), path
        assert not REQUIRED.get(kind, set()) - value.keys(), path
        for name, each in value.items():
            check_fields(each, FIELDS[kind][name], f"{path}.{name}")


@pytest.fixture(scope="module")
def by_name() -> dict[tuple[str, str], Any]:
    return {(each["kind"], each["metadata"]["name"]): each for each in documents(FILE)}


@pytest.fixture(scope="module")
def spec(by_name: dict[tuple[str, str], Any]) -> Any:
    return by_name["RayService", "slotpool"]["spec"]


@pytest.fixture(scope="module")
def pods(spec: Any) -> list[Any]:
    cluster = spec["rayClusterConfig"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_service_has_fields_that_kuberay_knows(by_name: dict[tuple[str, str], Any], spec: Any):
    check_fields(by_name["RayService", "slotpool"], "RayService", "RayService")
    starts = [spec["rayClusterConfig"]["headGroupSpec"], *spec["rayClusterConfig"]["workerGroupSpecs"]]
    assert all(type(value) is str for group in starts for value in group["rayStartParams"].values())
    with pytest.raises(AssertionError, match="upgradeStrategy"):
        check_fields({"upgradeStrategy": {"kind": "None"}}, "RayServiceSpec", "spec")


def test_what_is_kubernetes_own_is_as_its_schema_has_it(by_name: dict[tuple[str, str], Any], pods: list[Any]):
    for (kind, _), each in by_name.items():
        if kind != "RayService":
            kubernetes_validate.validate(each, KUBERNETES, strict=True)
    for pod in pods:
        whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": pod}
        kubernetes_validate.validate(whole, KUBERNETES, strict=True)


def test_what_pods_refer_to_is_in_the_file_or_said_at_its_top(by_name: dict[tuple[str, str], Any], pods: list[Any]):
    head = Path("cluster/manifests", FILE).read_text().split("\napiVersion", 1)[0]
    for pod in pods:
        (container,) = pod["spec"]["containers"]
        maps = [each["configMapRef"]["name"] for each in container["envFrom"] if "configMapRef" in each]
        maps += [each["configMap"]["name"] for each in pod["spec"]["volumes"] if "configMap" in each]
        assert all(("ConfigMap", name) in by_name for name in maps)
        claims = [each.get("persistentVolumeClaim", {}).get("claimName", "") for each in pod["spec"]["volumes"]]
        secrets = [each["secretRef"]["name"] for each in container["envFrom"] if "secretRef" in each]
        assert all(name in head for name in chain(claims, secrets))
        volumes = {each["name"] for each in pod["spec"]["volumes"]}
        assert {each["name"] for each in container["volumeMounts"]} == volumes
    assert all(name in head for name in ("slotpool-ray-token", "slotpool-redis", *KEYS))


def test_the_pool_is_one_that_the_pool_can_read(by_name: dict[tuple[str, str], Any], spec: Any, tmp_path: Path):
    (name, text), *more = by_name["ConfigMap", "slotpool-pool"]["data"].items()
    pool = pool_of(text, tmp_path)
    assert not more
    assert pool.api_keys
    assert pool.admin_keys, "whoever may send requests may not load and unload"
    serve = yaml.safe_load(spec["serveConfigV2"])
    check_application(serve, config=f"/etc/slotpool/{name}")
    (deployment,) = serve["applications"][0]["deployments"]
    assert deployment["num_replicas"] <= spec["rayClusterConfig"]["workerGroupSpecs"][0]["minReplicas"]
    assert spec["rayClusterDeletionDelaySeconds"] >= pool.longest_request_s() + GRACE_S, "a stream would be cut"


def test_every_pod_sees_the_configuration_and_the_models(by_name: dict[tuple[str, str], Any], pods: list[Any]):
    pool = yaml.safe_load(by_name["ConfigMap", "slotpool-pool"]["data"]["pool.yaml"])
    for pod in pods:
        mounted = {each["mountPath"] for each in pod["spec"]["containers"][0]["volumeMounts"]}
        assert "/etc/slotpool" in mounted
        assert {str(Path(model["model_path"]).parent) for model in pool["models"].values()} <= mounted


def test_ray_starts_with_the_flags_of_the_command(by_name: dict[tuple[str, str], Any], spec: Any):
    flags = dict(by_name["ConfigMap", "slotpool-ray-flags"]["data"])
    assert flags.pop("RAY_LOG_TO_STDERR") == "1", "the log of requests is a pod's"
    assert flags == RAY_FLAGS, "slotpool flags"
    assert spec["rayClusterConfig"]["rayVersion"] == ray.__version__
