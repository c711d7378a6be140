"""`ray up` with our file: against the schema that Ray ships, and through Ray's own reading of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
from ray import autoscaler
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.unit.manifests.files import MANIFESTS, check_application, check_command, documents, pool_of

FILE = "ray-up.yaml"


def test_ray_takes_it():
    (cluster,) = documents(FILE)
    schema = Path(autoscaler.__file__).with_name("ray-schema.json")
    jsonschema.validate(cluster, json.loads(schema.read_text()))
    prepared = prepare_config(cluster)
    validate_config(prepared)
    (nodes,) = prepared["available_node_types"].values()
    assert nodes["max_workers"] == len(cluster["provider"]["worker_ips"]) == cluster["max_workers"]


def test_every_machine_gets_what_the_commands_name():
    (cluster,) = documents(FILE)
    assert all(Path(here).is_file() for here in cluster["file_mounts"].values() if not here.startswith("~"))
    assert "~/slotpool/serve_config.yaml" in cluster["file_mounts"]
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        assert all(file in cluster["file_mounts"] for file in re.findall(r"~/slotpool/\S+?(?=;)", " ".join(commands)))


def test_its_commands_are_real():
    (cluster,) = documents(FILE)
    started = []
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        for command in commands:
            parts = [part.strip() for part in command.replace('eval "$(', "").replace(')"', "").split(";")]
            programs = [part for part in parts if re.match(r"(\S*/)?(ray|slotpool) ", part)]
            for line in programs:
                check_command(line)
            started += programs
    assert [line.split(" --")[0].split("/")[-1] for line in started] == [
        *("ray stop", "slotpool flags", "ray start"),
        *("ray stop", "slotpool flags", "ray start"),
    ]


def test_the_comments_above_it_are_commands_too():
    lines = re.findall(r"^#   (.+?)(?: +# .*)?$", (MANIFESTS / FILE).read_text(), re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        command = line.removeprefix("RAY_AUTH_MODE=token ")
        check_command(command)
        for file in re.findall(r"cluster/manifests/\S+", command):
            assert Path(file).is_file()


def test_a_mistyped_key_would_be_seen():
    (cluster,) = documents(FILE)
    schema = json.loads(Path(autoscaler.__file__).with_name("ray-schema.json").read_text())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "head_start_commands": []}, schema)


def test_the_pool_behind_it_is_one_that_the_pool_can_read(tmp_path: Path):
    (document,) = documents("serve_config.yaml")
    check_application(document, config="~/slotpool/pool.yaml")
    pool = pool_of((MANIFESTS / "pool.yaml").read_text(), tmp_path)
    assert pool.api_keys
    assert pool.admin_keys
