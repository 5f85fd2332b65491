"""Cluster files: those that ship, and what is said of wrong ones."""

from pathlib import Path

import pytest

from raydiff.config_files import config_names
from raydiff.engine.cluster_file import ROLES, load_cluster_file
from raydiff.errors import ConfigError


@pytest.mark.parametrize("name", config_names("clusters"))
def test_every_cluster_file_that_ships_is_valid_and_says_what_it_is(name: str) -> None:
    layout = load_cluster_file(name)
    assert layout.description
    roles = list(layout.by_role)
    assert roles == sorted(roles, key=ROLES.index)


def test_the_encoders_of_cpu_encoders_take_no_gpu_and_its_denoisers_are_elastic() -> None:
    layout = load_cluster_file("cpu-encoders")
    encode, denoise = layout.by_role["encode"], layout.by_role["denoise_decode"]
    assert layout.is_split
    assert (encode.num_gpus, encode.num_cpus, encode.num_threads) == (0, 4, 4)
    assert encode.memory_bytes == 8 * 2**30
    assert encode.labels == {"raydiff/stage": "encode"}
    assert not encode.is_elastic
    assert denoise.is_elastic
    assert denoise.num_gpus == 1


def test_a_file_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "stages:\n"
        "  fused:\n"
        "    count: 3\n"
        "    threads: 2\n"
        "    resources: {GPU: 1, memory: 1.5GiB, fast_disk: 0.5}\n"
        "    labels: {ray.io/accelerator-type: 'in(H100, H200)', spot: '!yes'}\n"
    )
    fused = load_cluster_file(str(path)).by_role["fused"]
    assert not load_cluster_file(str(path)).is_split
    assert (fused.num_workers, fused.num_cpus, fused.num_gpus, fused.num_threads) == (3, 1, 1, 2)
    assert fused.memory_bytes == 3 * 2**29
    assert fused.custom_resources == {"fast_disk": 0.5}


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("{encode: {count: 1}}", "stages: encode is not a whole run. Give fused, or encode + "),
        ("{fused: {count: 1}, encode: {count: 1}}", "fused + encode is not a whole run"),
        ("{}", "stages: nothing is not a whole run"),
        ("{fuse: {count: 1}}", 'stages.fuse: unknown key; did you mean "fused"?'),
        ("{fused: {coun: 1}}", 'stages.fused.coun: unknown key; did you mean "count"?'),
        ("{fused: {}}", "stages.fused: give either count"),
        ("{fused: {count: 1, max: 2}}", "stages.fused: give either count"),
        ("{fused: {count: 0}}", "stages.fused.count: 0:"),
        ("{fused: 3}", "stages.fused: 3: this is a section"),
        ("{fused: {count: 1, resources: {GPU: 0.5}}}", "GPU: 0.5: a worker uses one GPU, alone"),
        ("{fused: {count: 1, resources: {gpu: 1}}}", "Write it in capitals"),
        ("{fused: {count: 1, resources: {CPU: lots}}}", "CPU: 'lots' is no amount"),
        ("{fused: {count: 1, resources: {memory: 3x}}}", "memory: '3x' is no amount of memory"),
        ("{fused: {count: 1, labels: {zone: 'in(a'}}}", "zone: 'in(a' is no selector"),
        ("{fused: {count: 1, labels: {'a b': x}}}", "'a b' is no label key"),
    ],
)
def test_what_is_said_of_a_wrong_file(tmp_path: Path, stages: str, said: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(f"stages: {stages}\n")
    with pytest.raises(ConfigError) as raised:
        load_cluster_file(str(path))
    assert str(raised.value).startswith(f"cluster file {path}: ")
    assert said in str(raised.value)


def test_a_file_without_stages_says_so(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("description: nothing\n")
    with pytest.raises(ConfigError, match="stages: is missing"):
        load_cluster_file(str(path))


def test_a_name_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match='did you mean "cpu-encoders"'):
        load_cluster_file("cpu-encoder")
    with pytest.raises(ConfigError, match=r"cluster file nowhere.yaml: No such file"):
        load_cluster_file("nowhere.yaml")
