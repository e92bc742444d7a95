"""What must hold of every file of `cluster/`: a token, no root, no open door, room that is asked for, no secret."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.manifests import KUBERAY, RAY_UP, ROOT, all_pods, cluster_of, pods_of, read, strings

kuberay = pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
ray_up = pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.parent.name)
_SPOT = {"cloud.google.com/gke-spot", "eks.amazonaws.com/capacityType", "karpenter.sh/capacity-type"}
_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|ACCESS_KEY|CREDENTIALS)", re.IGNORECASE)
# Keys of AWS, of Google's service accounts, of SSH, and long random words in general.
_SECRET = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN|private_key|\b[0-9a-f]{32,}\b|\b(?=\w*\d)(?=\w*[A-Z])\w{40,}\b")


def _bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([MG]i)", quantity).groups()  # type: ignore[union-attr]
    return int(number) << {"Mi": 20, "Gi": 30}[unit]


@pytest.mark.parametrize("path", [*KUBERAY, *RAY_UP], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_file_holds_a_secret(path: Path) -> None:
    assert _SECRET.findall(path.read_text()) == []
    for where, text in strings(read(path)):
        name = where.rsplit(".", 1)[-1]
        assert not (_SECRET_NAME.search(name) and name.isupper()), f"{where}: {text}"
        assert not re.match(r"--env=\w*(TOKEN|SECRET|KEY)\w*=", text), text


@kuberay
def test_a_token_guards_the_cluster(path: Path) -> None:
    assert cluster_of(read(path))["authOptions"] == {"mode": "token"}


@kuberay
def test_nothing_is_open_to_the_world(path: Path) -> None:
    document = read(path)
    head = cluster_of(document)["headGroupSpec"]
    assert head.get("serviceType", "ClusterIP") == "ClusterIP"
    assert not head.keys() & {"enableIngress", "ingressOptions", "headService"}
    assert "serveService" not in document["spec"], "ClusterIP, where nothing is said"
    for pod in all_pods(document):
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert not any("hostPath" in volume for volume in pod.get("volumes", []))


@kuberay
def test_containers_are_locked_up(path: Path) -> None:
    """As the restricted standard of Kubernetes' pod security asks, and a read-only disk."""
    for pod in all_pods(read(path)):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"] == {
            "runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"},
        }  # fmt: skip
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


@kuberay
def test_secrets_come_from_kubernetes(path: Path) -> None:
    for container in (each for pod in all_pods(read(path)) for each in pod["containers"]):
        for variable in container["env"]:
            if _SECRET_NAME.search(variable["name"]):
                assert "secretKeyRef" in variable["valueFrom"]


@kuberay
def test_room_on_disk_is_asked_for_and_suffices(path: Path) -> None:
    for pod in all_pods(read(path)):
        (container,) = pod["containers"]
        asked, most = container["resources"]["requests"], container["resources"]["limits"]
        limits = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume}
        assert all("sizeLimit" in each for each in limits.values())
        disk = sum(_bytes(each["sizeLimit"]) for each in limits.values() if each.get("medium") != "Memory")
        memory = sum(_bytes(each["sizeLimit"]) for each in limits.values() if each.get("medium") == "Memory")
        assert disk <= _bytes(asked["ephemeral-storage"]) <= _bytes(most["ephemeral-storage"])
        assert memory <= _bytes(asked["memory"]) / 2
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        variables = {each["name"]: each.get("value", "") for each in container["env"]}
        assert variables["HOME"] in mounts, "all else is read-only"
        cache = mounts[str(Path(variables.get("RBM_DIST_CACHE", "/tmp/x")).parent)]
        if "RBM_DIST_CACHE_GB" in variables:
            assert float(variables["RBM_DIST_CACHE_GB"]) * 1e9 < _bytes(limits[cache]["sizeLimit"])


@kuberay
def test_the_head_does_no_work_and_is_not_taken_away(path: Path) -> None:
    cluster = cluster_of(read(path))
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    affinity = pods_of(cluster)[0]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = affinity["nodeSelectorTerms"]
    assert {(each["key"], each["operator"]) for each in term["matchExpressions"]} == {(key, "NotIn") for key in _SPOT}


@kuberay
def test_a_run_hears_of_a_worker_that_is_taken_away(path: Path) -> None:
    """It has `deadline` seconds, within what Kubernetes gives the pod; the driver is there as long."""
    cluster = cluster_of(read(path))
    head, *workers = pods_of(cluster)
    for group, pod in zip(cluster["workerGroupSpecs"], workers, strict=True):
        if group.get("labels", {}).get("ray.io/market-type") != "spot":
            continue
        stop = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        deadline = int(stop.split("--deadline-remaining-seconds ")[1].split()[0])
        assert stop.endswith(f"&& sleep {deadline}")
        assert head["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", str(deadline)]
        assert deadline < min(head["terminationGracePeriodSeconds"], pod["terminationGracePeriodSeconds"])


@ray_up
def test_with_ray_up_a_token_guards_the_cluster(path: Path) -> None:
    document = read(path)
    assert "--env=RAY_AUTH_MODE=token" in document["docker"]["run_options"]
    assert document["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


@ray_up
def test_with_ray_up_ssh_is_the_one_way_in(path: Path) -> None:
    document = read(path)
    (start,) = (each for each in document["head_start_ray_commands"] if "--head" in each)
    assert "--dashboard-host=127.0.0.1" in start
    assert not {"security_group", "ports"} & (document["provider"].keys() | document["docker"].keys())


@ray_up
def test_with_ray_up_containers_are_locked_up(path: Path) -> None:
    options = read(path)["docker"]["run_options"]
    assert {"--cap-drop=ALL", "--security-opt=no-new-privileges"} <= set(options)
    assert not any(option.startswith(("--user", "--privileged", "--cap-add", "-u")) for option in options)


@ray_up
def test_with_ray_up_the_head_does_no_work_and_is_not_taken_away(path: Path) -> None:
    document = read(path)
    for name, node in document["available_node_types"].items():
        is_head = name == document["head_node_type"]
        assert node["labels"] == {"ray.io/market-type": "on-demand" if is_head else "spot"}
        assert _is_spot(node["node_config"]) is not is_head
        assert is_head == (node["resources"] == {"CPU": 0, "GPU": 0})
    assert sum(node.get("min_workers", 0) for node in document["available_node_types"].values()) > 0


@ray_up
def test_with_ray_up_each_node_has_an_account_in_place_of_keys(path: Path) -> None:
    document = read(path)
    types = document["available_node_types"]
    accounts = {name: str(_account(node["node_config"])) for name, node in types.items()}
    assert "rbm-dist-head" in accounts["head"]
    assert all("rbm-dist-worker" in account for name, account in accounts.items() if name != "head")


def _is_spot(node: dict[str, Any]) -> bool:
    market = node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    return market or node.get("scheduling", {}).get("provisioningModel") == "SPOT"


def _account(node: dict[str, Any]) -> Any:
    return node.get("IamInstanceProfile") or node["serviceAccounts"]


def test_slurm_makes_a_token_for_each_job() -> None:
    script = (ROOT / "launch" / "slurm.sh").read_text()
    assert "export RAY_AUTH_TOKEN RAY_AUTH_MODE=token" in script
    assert "--include-dashboard=false" in script
