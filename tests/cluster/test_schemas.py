"""The files of `cluster/` as those read them who use them: KubeRay, Ray's launcher, EC2, Compute Engine."""

import gzip
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from tests.cluster.manifests import KUBERAY, RAY_UP, ROOT, read

SCHEMAS = Path(os.environ.get("RBM_DIST_SCHEMAS", ROOT.parent / "shared" / "schemas"))


@contextmanager
def played(aws: Any) -> Iterator[None]:
    """Play AWS in this process; what others keep there (the buckets of other tests) stays."""
    aws.start(reset=False)
    try:
        yield
    finally:
        aws.stop(remove_data=False)


def schema_of(kind: str) -> dict[str, Any]:
    """KubeRay's own schema of a kind; skips where it is not at hand."""
    path = SCHEMAS / f"kuberay-{kind.lower()}.v1.schema.json.gz"
    if not path.is_file():
        pytest.skip(f"no {path}; set RBM_DIST_SCHEMAS to the folder of KubeRay's schemas")
    return json.loads(gzip.decompress(path.read_bytes()))


def unknown_keys(value: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """Keys that a structural schema does not know: Kubernetes drops these without a word."""
    if isinstance(value, list):
        each = schema.get("items", {})
        return [key for index, item in enumerate(value) for key in unknown_keys(item, each, f"{path}[{index}]")]
    if not isinstance(value, dict) or schema.get("x-kubernetes-preserve-unknown-fields"):
        return []
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    found = []
    for key, item in value.items():
        if key in known:
            found += unknown_keys(item, known[key], f"{path}.{key}")
        elif others:
            found += unknown_keys(item, others if isinstance(others, dict) else {}, f"{path}.{key}")
        elif known or others is False:
            found.append(f"{path}.{key}")
    return found


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_kuberay_understands_every_key(path: Path) -> None:
    document = read(path)
    schema = schema_of(document["kind"])
    wrong = [
        f"{'.'.join(map(str, each.path))}: {each.message}" for each in Draft7Validator(schema).iter_errors(document)
    ]
    assert wrong == []
    metadata = {"properties": {"name": {}}}  # Kubernetes' own; the schema says no more than that it is an object
    assert unknown_keys(document, {**schema, "properties": {**schema["properties"], "metadata": metadata}}) == []


def test_a_misspelt_key_is_found() -> None:
    document = read(ROOT / "cluster" / "kuberay" / "raycluster.yaml")
    document["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["securitycontext"] = {}
    (key,) = unknown_keys(document["spec"], schema_of("RayCluster")["properties"]["spec"])
    assert key == ".workerGroupSpecs[0].template.spec.containers[0].securitycontext"


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.parent.name)
def test_ray_up_takes_the_file_and_installs_nothing_of_its_own(path: Path) -> None:
    """As `ray up` does before it talks to the cloud: defaults, schema, and its rules over several keys."""
    util = pytest.importorskip("ray.autoscaler._private.util")
    given = read(path)
    prepared = util.prepare_config(read(path))
    util.validate_config(prepared)
    for key in ("docker", "file_mounts", "head_start_ray_commands", "worker_start_ray_commands", "auth"):
        assert prepared[key] == given[key], f"{key}: what is in the file stands"
    assert prepared["available_node_types"].keys() == given["available_node_types"].keys()
    assert prepared["head_setup_commands"] == given["head_setup_commands"], "no Ray beside the image's"
    assert prepared["worker_setup_commands"] == []


def test_ec2_starts_the_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a server that plays EC2, and knows its types, keys and rules; through Ray's own provider."""
    moto = pytest.importorskip("moto", reason="moto is not installed")
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
    from ray.autoscaler._private import util
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray keeps the key that it makes
    (tmp_path / ".ssh").mkdir()
    text = (ROOT / "cluster" / "aws" / "cluster.yaml").read_text()
    with played(moto.mock_aws()):
        region = yaml.safe_load(text)["provider"]["region"]
        ec2, iam = boto3.client("ec2", region), boto3.client("iam", region)
        network = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        subnet = ec2.create_subnet(VpcId=network, CidrBlock="10.0.0.0/24")["Subnet"]["SubnetId"]
        ec2.modify_subnet_attribute(SubnetId=subnet, MapPublicIpOnLaunch={"Value": True})
        group = ec2.create_security_group(GroupName="rbm-dist", Description="nodes", VpcId=network)["GroupId"]
        image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        for name in ("rbm-dist-head", "rbm-dist-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        for placeholder, value in {
            "[SUBNET]": f"[{subnet}]", "[SECURITY_GROUP]": f"[{group}]", "ImageId: AMI": f"ImageId: {image}",
            "::ACCOUNT:": "::123456789012:",
        }.items():  # fmt: skip
            assert placeholder in text
            text = text.replace(placeholder, value)
        config = bootstrap_aws(util.prepare_config(yaml.safe_load(text)))
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for name, node in config["available_node_types"].items():
            provider.create_node(node["node_config"], {"ray-user-node-type": name}, 1)
        started = [each for block in ec2.describe_instances()["Reservations"] for each in block["Instances"]]
        names = {
            next(tag["Value"] for tag in each["Tags"] if tag["Key"] == "ray-user-node-type"): each for each in started
        }
        assert {name: each.get("InstanceLifecycle") for name, each in names.items()} == {
            "head": None, "cpu": "spot", "gpu": "spot",
        }  # fmt: skip
        assert {each["SecurityGroups"][0]["GroupId"] for each in started} == {group}
        assert (
            len(ec2.describe_security_groups(Filters=[{"Name": "vpc-id", "Values": [network]}])["SecurityGroups"]) == 2
        )
        offered = ec2.describe_instance_types(InstanceTypes=[each["InstanceType"] for each in started])["InstanceTypes"]
        cores = {each["InstanceType"]: each["VCpuInfo"]["DefaultVCpus"] for each in offered}
        gpus = {
            each["InstanceType"]: sum(gpu["Count"] for gpu in each.get("GpuInfo", {}).get("Gpus", []))
            for each in offered
        }
        for name in ("cpu", "gpu"):
            has, kind = config["available_node_types"][name]["resources"], names[name]["InstanceType"]
            assert (has["CPU"], has["GPU"]) == (cores[kind], gpus[kind])


def test_compute_engine_knows_every_key() -> None:
    """By its own description, which Google's client brings along."""
    client = pytest.importorskip("googleapiclient", reason="google-api-python-client is not installed")
    described = Path(client.__file__).parent / "discovery_cache" / "documents" / "compute.v1.json"
    schemas = json.loads(described.read_text(encoding="utf-8"))["schemas"]

    def wrong(value: Any, schema: dict[str, Any], path: str) -> list[str]:
        schema = schemas[schema["$ref"]] if "$ref" in schema else schema
        kinds = {"object": dict, "array": list, "string": (str, int), "integer": int, "boolean": bool}
        if not isinstance(value, kinds[schema["type"]]) or value not in schema.get("enum", [value]):
            return [f"{path}: {value!r} is no {schema['type']} of {schema.get('enum', 'any value')}"]
        if isinstance(value, list):
            return [each for item in value for each in wrong(item, schema["items"], f"{path}[]")]
        if not isinstance(value, dict):
            return []
        known = schema["properties"]
        unknown = [f"{path}.{key}: unknown" for key in value if key not in known]
        return unknown + [
            each for key in value if key in known for each in wrong(value[key], known[key], f"{path}.{key}")
        ]

    types = read(ROOT / "cluster" / "gcp" / "cluster.yaml")["available_node_types"]
    instance = {"$ref": "Instance"}
    assert [each for name, node in types.items() for each in wrong(node["node_config"], instance, name)] == []
    assert wrong({"scheduling": [{"preemptible": True}]}, instance, "x"), "a list, as it is often written, is none"
