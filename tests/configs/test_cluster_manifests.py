"""The manifests for Kubernetes and Slurm: valid, and in step with Ray and with our own options."""

import json
import os
import re
import shlex
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.scripts.scripts import start as ray_start
from ray.scripts.symmetric_run import symmetric_run

from raydiff import __version__
from raydiff.cli.render import render
from raydiff.config import load_config
from raydiff.engine.cluster_file import load_cluster_file

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "configs" / "clusters"
SCRIPT = CLUSTERS / "slurm" / "raydiff.sbatch"


def test_every_yaml_file_of_configs_and_jobs_is_yaml() -> None:
    paths = [path for folder in ("configs", "jobs") for path in (ROOT / folder).rglob("*.yaml")]
    assert len(paths) > 15
    for path in paths:
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path


def test_the_cluster_job_names_a_cluster_file() -> None:
    config = load_config(ROOT / "jobs" / "cluster.yaml")
    assert config.engine.cluster is not None
    assert load_cluster_file(config.engine.cluster).is_split


# -- Kubernetes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_job() -> dict[str, Any]:
    text = (CLUSTERS / "kuberay" / "rayjob.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def test_the_ray_job_has_the_form_of_one(ray_job: dict[str, Any]) -> None:
    schema = json.loads((Path(__file__).parent / "rayjob.schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(ray_job, schema, cls=jsonschema.Draft202012Validator)


def test_the_schema_refuses_what_kuberay_would(ray_job: dict[str, Any]) -> None:
    schema = json.loads((Path(__file__).parent / "rayjob.schema.json").read_text("utf-8"))
    for key, wrong in (("backoffLimit", "3"), ("submissionMode", "Job"), ("shutdown", True)):
        job = {**ray_job, "spec": {**ray_job["spec"], key: wrong}}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(job, schema)


def test_its_command_is_one_that_raydiff_takes(ray_job: dict[str, Any]) -> None:
    check_render_command(shlex.split(ray_job["spec"]["entrypoint"])[1:])


def test_its_versions_are_those_of_the_package(ray_job: dict[str, Any]) -> None:
    docker = (CLUSTERS / "kuberay" / "Dockerfile").read_text(encoding="utf-8")
    version = ray_job["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"FROM rayproject/ray:{version}-py311\n" in docker
    pins = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"ray>={version.rpartition(".")[0]},<' in pins
    for _, pod in pods(ray_job):
        assert pod["containers"][0]["image"] == f"REGISTRY/raydiff:{__version__}"
    for source in re.findall(r"^COPY --chown=\S+ (.+) \S+$", docker, re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists(), name


def test_nobody_runs_code_there_without_the_token(ray_job: dict[str, Any]) -> None:
    assert ray_job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for _, pod in pods(ray_job):
        container = pod["containers"][0]
        assert container["securityContext"]["runAsNonRoot"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        # Secrets by reference alone: what is in `env` stands in the manifest.
        assert not any("KEY" in one["name"] or "TOKEN" in one["name"] for one in container["env"])
        assert container["envFrom"] == [{"secretRef": {"name": "raydiff-storage"}}]


def test_a_node_that_must_go_has_time_to_finish(ray_job: dict[str, Any]) -> None:
    for _, pod in pods(ray_job):
        environ = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
        drain_s = int(environ["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert pod["terminationGracePeriodSeconds"] > drain_s
        mounts = {one["name"]: one["mountPath"] for one in pod["containers"][0]["volumeMounts"]}
        assert mounts["shm"] == "/dev/shm"
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}


def test_its_nodes_have_room_for_the_workers_of_its_cluster_file(ray_job: dict[str, Any]) -> None:
    arguments = shlex.split(ray_job["spec"]["entrypoint"])
    layout = load_cluster_file(arguments[arguments.index("--cluster") + 1])
    groups = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    for role, placement in layout.by_role.items():
        fitting = [group for group in groups if has_room(group, placement)]
        assert fitting, role
        # The smallest cluster that the run can start with: every role, as often as it is needed.
        needed = 1 if placement.is_elastic else placement.num_workers
        assert sum(group["maxReplicas"] for group in fitting) >= needed


def has_room(group: dict[str, Any], placement: Any) -> bool:
    resources = group["template"]["spec"]["containers"][0]["resources"]
    has = {**resources["requests"], **resources["limits"]}
    return (
        int(has["cpu"]) >= placement.num_cpus
        and int(has.get("nvidia.com/gpu", 0)) >= placement.num_gpus
        and (placement.num_gpus > 0) == ("nvidia.com/gpu" in has)
        and int(has["memory"].removesuffix("Gi")) * 2**30 >= (placement.memory_bytes or 0)
        and placement.labels.items() <= group.get("labels", {}).items()
    )


def test_the_network_policy_guards_the_pods_of_the_ray_job(ray_job: dict[str, Any]) -> None:
    text = (CLUSTERS / "kuberay" / "networkpolicy.yaml").read_text(encoding="utf-8")
    policy = yaml.safe_load(text)
    assert policy["apiVersion"] == "networking.k8s.io/v1"
    assert policy["kind"] == "NetworkPolicy"
    spec = policy["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    for labels, _ in pods(ray_job):
        assert spec["podSelector"]["matchLabels"].items() <= labels.items()
    for rule in spec["ingress"]:
        assert rule["from"], "everyone may come in"
        assert all(set(peer) <= {"podSelector", "namespaceSelector"} for peer in rule["from"])
        ports = [port["port"] for port in rule.get("ports", ())]
        assert set(ports) <= {8265, 8080}
    name = ray_job["metadata"]["name"]
    assert {"ray.io/originated-from-cr-name": name} in [
        peer["podSelector"]["matchLabels"]
        for rule in spec["ingress"]
        for peer in rule["from"]
        if "podSelector" in peer
    ]


def pods(ray_job: dict[str, Any]) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """Return the labels and the spec of each kind of pod."""
    cluster = ray_job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    templates = [group["template"] for group in groups]
    return [(template["metadata"]["labels"], template["spec"]) for template in templates]


# -- Slurm -----------------------------------------------------------------------------------------

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
"""Runs the command, here, as the only node."""
RAY = """#!/usr/bin/env bash
printf '%s\\n' "$@" >ray.args
stat -c %a "$RAY_AUTH_TOKEN_PATH" >token.mode
cp "$RAY_AUTH_TOKEN_PATH" token.copy
echo "$RAY_AUTH_MODE" >auth.mode
while [[ $1 != -- ]]; do shift; done
shift
"$@"
"""
"""As `ray symmetric-run` on the head: runs what comes after `--`, and ends with its status."""
RAYDIFF = """#!/usr/bin/env bash
printf '%s\\n' "$@" >raydiff.args
trap 'sleep 0.3; exit 130' TERM
touch started
[[ -z ${WAIT:-} ]] || while true; do sleep 0.05; done
exit 1
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which Slurm's, Ray's and our commands are stand-ins that take note
    of what they are given: none of them can run here."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name, text in (("srun", SRUN), ("ray", RAY), ("raydiff", RAYDIFF)):
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    (tmp_path / "shared").mkdir()
    return {
        "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "SHARED_DIR": str(tmp_path / "shared"),
        "HEAD_ADDRESS": "10.0.0.7",
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "64",
        "SLURM_GPUS_ON_NODE": "8",
        "MANIFEST": "prompts with spaces.parquet",
        "MODEL": "sdxl",
        "OUT": "/shared/renders",
    }


def test_the_script_is_bash_and_asks_for_what_it_needs(tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert SCRIPT.stat().st_mode & stat.S_IXUSR
    run = subprocess.run(
        ["bash", str(SCRIPT)], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "MANIFEST: the manifest to render" in run.stderr


def test_it_starts_ray_with_options_that_ray_has_and_a_command_that_raydiff_has(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    run = subprocess.run(
        ["bash", str(SCRIPT), "--limit", "100"],
        env=slurm,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert run.returncode == 1, run.stderr  # raydiff's own
    arguments = (tmp_path / "ray.args").read_text().splitlines()
    assert arguments[0] == "symmetric-run"
    context = symmetric_run.make_context("symmetric-run", arguments[1:])
    assert context.params["min_nodes"] == 2
    assert context.params["address"] == "10.0.0.7:24567"
    separator = arguments.index("--")
    rest = arguments[5:separator]
    ray_start.make_context("start", ["--head", *rest])  # refuses what `ray start` does not have
    assert "--include-dashboard=false" in rest
    assert not any("--dashboard-host" in argument for argument in rest)
    command = (tmp_path / "raydiff.args").read_text().splitlines()
    params = check_render_command(command)
    assert params["source"] == "prompts with spaces.parquet"
    assert params["limit"] == 100
    assert command[command.index("--address") + 1] == "10.0.0.7:24567"


def test_its_token_is_random_private_and_gone_afterwards(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    tokens = set()
    for _ in range(2):
        subprocess.run(["bash", str(SCRIPT)], env=slurm, cwd=tmp_path, check=False, timeout=30)
        assert (tmp_path / "token.mode").read_text().strip() == "600"
        assert (tmp_path / "auth.mode").read_text().strip() == "token"
        tokens.add((tmp_path / "token.copy").read_text())
        assert list((tmp_path / "shared").iterdir()) == []
    assert len(tokens) == 2
    assert all(re.fullmatch(r"[0-9a-f]{64}", token) for token in tokens)


def test_before_the_time_is_up_the_driver_alone_is_told_and_its_status_kept(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    environ = {**slurm, "WAIT": "1"}
    process = subprocess.Popen(["bash", str(SCRIPT)], env=environ, cwd=tmp_path)
    try:
        until = time.monotonic() + 20
        while not (tmp_path / "started").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 130
    finally:
        process.kill()
    assert list((tmp_path / "shared").iterdir()) == []


def check_render_command(arguments: list[str]) -> dict[str, Any]:
    """Parse `render ...` as raydiff does; click raises for an option that there is not."""
    assert arguments[0] == "render"
    params: dict[str, Any] = render.make_context("render", arguments[1:]).params
    return params
