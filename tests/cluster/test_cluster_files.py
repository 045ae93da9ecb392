"""The two cluster files pass Ray's own loader and schema, and Ray's AWS provider can start their nodes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
AWS = CHECKOUT / "cluster.yaml"
LOCAL = CHECKOUT / "docs" / "cluster-local.yaml"


def prepare(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does with a file before it touches a provider. Raises for a file it would refuse."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


@pytest.mark.parametrize("path", [AWS, LOCAL], ids=["aws", "local"])
def test_ray_accepts_the_file(path: Path) -> None:
    prepared = prepare(load(path))
    assert prepared["head_node_type"] in prepared["available_node_types"]


def test_every_local_machine_joins() -> None:
    prepared = prepare(load(LOCAL))
    (node_type,) = prepared["available_node_types"].values()
    assert node_type["min_workers"] == node_type["max_workers"] == len(prepared["provider"]["worker_ips"])


def test_the_aws_cluster_has_a_node_type_for_each_kind_of_work() -> None:
    prepared = prepare(load(AWS))
    types = prepared["available_node_types"]
    assert set(types) == {"head", "data", "train", "serve"}
    assert prepared["head_node_type"] == "head"
    assert types["head"]["max_workers"] == 0
    assert all(t["min_workers"] <= t["max_workers"] <= prepared["max_workers"] for t in types.values())
    assert types["data"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in types["serve"]["node_config"]


@pytest.mark.parametrize("path", [AWS, LOCAL], ids=["aws", "local"])
def test_authentication_is_on_everywhere_and_the_dashboard_on_loopback(path: Path) -> None:
    config = load(path)
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        (start,) = [line for line in commands if "ray start" in line]
        assert start.index("RAY_AUTH_MODE=token") < start.index("ray start")
        assert "RAY_AUTH_TOKEN_PATH" in start
    (head,) = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in head
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert any("chmod 600 ~/.ray/auth_token" in line for line in config["setup_commands"])


@pytest.mark.parametrize("path", [AWS, LOCAL], ids=["aws", "local"])
def test_nodes_install_this_package_from_the_lock(path: Path) -> None:
    config = load(path)
    installs = "\n".join(config["setup_commands"])
    assert "--requirement requirements.lock" in installs
    assert "--no-deps --editable ." in installs
    for local in config["file_mounts"].values():
        assert local.startswith("~") or (CHECKOUT / local).exists(), local


def _misspelt(config: dict[str, Any]) -> None:
    config["max_wokers"] = 3


def _misspelt_in_type(config: dict[str, Any]) -> None:
    config["available_node_types"]["train"]["minworkers"] = 1


def _no_node_config(config: dict[str, Any]) -> None:
    del config["available_node_types"]["data"]["node_config"]


def _more_minimum_than_maximum(config: dict[str, Any]) -> None:
    config["available_node_types"]["data"]["min_workers"] = config["max_workers"] + 1


def _no_head(config: dict[str, Any]) -> None:
    config["head_node_type"] = "boss"


def _fraction_of_a_gpu(config: dict[str, Any]) -> None:
    config["available_node_types"]["serve"]["resources"] = {"GPU": 0.5}


@pytest.mark.parametrize(
    "spoil",
    [_misspelt, _misspelt_in_type, _no_node_config, _more_minimum_than_maximum, _no_head, _fraction_of_a_gpu],
)
def test_the_same_check_refuses_a_spoilt_file(spoil: Callable[[dict[str, Any]], None]) -> None:
    from jsonschema import ValidationError

    config = load(AWS)
    spoil(config)
    with pytest.raises((ValidationError, ValueError)):
        prepare(config)


def test_the_local_file_needs_addresses() -> None:
    import click

    config = load(LOCAL)
    del config["provider"]["head_ip"]
    with pytest.raises((click.ClickException, SystemExit)):
        prepare(config)


def test_rays_aws_provider_starts_every_node_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's provider against a mock EC2: botocore checks each parameter, as it would for the real one."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

    (tmp_path / ".ssh").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with mock_aws():
        for profile in ("modelyard-head", "modelyard-worker"):
            boto3.client("iam").create_instance_profile(InstanceProfileName=profile)
        config = AWSNodeProvider.fillout_available_node_types_resources(prepare(load(AWS)))
        config = AWSNodeProvider.bootstrap_config(config)
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for name, node_type in config["available_node_types"].items():
            tags = {TAG_RAY_NODE_KIND: "head" if name == "head" else "worker", TAG_RAY_USER_NODE_TYPE: name}
            provider.create_node(node_type["node_config"], tags, 1)
        reservations = boto3.client("ec2", region_name="us-west-2").describe_instances()["Reservations"]
        started = {i["InstanceType"]: i for r in reservations for i in r["Instances"]}

    types = config["available_node_types"]
    assert set(started) == {t["node_config"]["InstanceType"] for t in types.values()}
    assert started[types["data"]["node_config"]["InstanceType"]]["InstanceLifecycle"] == "spot"
    assert types["train"]["resources"]["GPU"] == 4
    assert types["serve"]["resources"]["GPU"] == 1
    assert "GPU" not in types["data"]["resources"]
    assert all(i["MetadataOptions"]["HttpTokens"] == "required" for i in started.values())
