"""Names to models, and what is read of a model before it is loaded."""

import json
import os
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from raydiff.cli import main
from raydiff.errors import ModelError
from raydiff.request import SAMPLERS
from raydiff.weights.aliases import alias_names, read_alias
from raydiff.weights.resolve import SCHEDULER_SAMPLERS, default_sampler, resolve_model
from tests.weights.folders import save_folder, write_json
from tests.weights.original import write_random
from tests.weights.test_original_files import SMALL_SDXL

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def test_a_local_folder(tmp_path: Path) -> None:
    saved = save_folder(tmp_path / "model", "sdxl")
    info = resolve_model(str(tmp_path / "model"))
    assert info.name == str(tmp_path / "model")
    assert info.path == str((tmp_path / "model").resolve())
    assert info.family == "sdxl"
    assert info.tasks == ("txt2img", "img2img")
    # sample_size 8, and a VAE of two levels halves once.
    assert (info.default_height, info.default_width, info.size_multiple) == (16, 16, 8)
    assert info.default_num_inference_steps == 50
    assert (info.default_guidance_scale, info.default_strength) == (5.0, 0.3)
    assert info.default_sampler == "euler"
    assert info.num_parameters == {
        name: sum(tensor.numel() for tensor in tensors.values()) for name, tensors in saved.items()
    }


def test_defaults_of_sd21(tmp_path: Path) -> None:
    save_folder(tmp_path, "sd21")
    write_json(
        tmp_path / "scheduler" / "scheduler_config.json",
        {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
    )
    info = resolve_model(str(tmp_path))
    assert (info.default_guidance_scale, info.default_strength) == (7.5, 0.8)
    assert info.default_sampler == "dpmpp_2m_sde"


def test_relative_and_home_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(tmp_path / "model", "sd21")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    revisions = {resolve_model(name).revision for name in ("model", "./model", "~/model")}
    assert len(revisions) == 1


def test_a_single_file(tmp_path: Path) -> None:
    file = tmp_path / "xl.safetensors"
    write_random(file, SMALL_SDXL)
    for name in ("tokenizer", "tokenizer_2"):
        write_json(tmp_path / name / "vocab.json", {})
    info = resolve_model(str(file))
    assert (info.family, info.path, info.default_sampler) == ("sdxl", str(file), "euler")
    assert (info.default_height, info.default_width) == (1024, 1024)
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / "renamed.safetensors"
    shutil.copy(file, moved)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tmp_path / name, moved.parent / name)
    assert resolve_model(str(moved)).revision == info.revision
    moved.with_suffix(".yaml").write_text("model: {params: {parameterization: v}}")
    assert resolve_model(str(moved)).revision != info.revision


def test_the_revision_is_the_content_not_the_place(tmp_path: Path) -> None:
    save_folder(tmp_path / "a", "sd21")
    revision = resolve_model(str(tmp_path / "a")).revision
    assert revision.startswith("local-")
    assert len(revision) == len("local-") + 32
    shutil.copytree(tmp_path / "a", tmp_path / "b" / "c")
    for file in (tmp_path / "b" / "c").rglob("*"):
        os.utime(file, (1, 1))
    (tmp_path / "b" / "c" / "README.md").write_text("not part of the model")
    (tmp_path / "b" / "c" / "unet" / "other.bin").write_bytes(b"nor this")
    assert resolve_model(str(tmp_path / "b" / "c")).revision == revision


@pytest.mark.parametrize(
    "file", ["tokenizer/merges.txt", "scheduler/scheduler_config.json", "unet/config.json"]
)
def test_the_revision_sees_every_small_file(tmp_path: Path, file: str) -> None:
    save_folder(tmp_path, "sd21")
    revision = resolve_model(str(tmp_path)).revision
    path = tmp_path / file
    path.write_text(path.read_text() + "\n")
    assert resolve_model(str(tmp_path)).revision != revision


def test_the_revision_sees_every_tensor(tmp_path: Path) -> None:
    save_folder(tmp_path, "sd21")
    path = tmp_path / UNET_FILE
    tensors = load_file(path)
    revisions = {resolve_model(str(tmp_path)).revision}
    for name in list(tensors)[::9]:
        save_file(tensors | {name: tensors[name] + 0.5}, path)
        revisions.add(resolve_model(str(tmp_path)).revision)
    assert len(revisions) == 1 + len(list(tensors)[::9])


def test_the_revision_is_of_the_weights_that_are_used(tmp_path: Path) -> None:
    save_folder(tmp_path, "sd21", variants=(None, "fp16"))
    name = str(tmp_path)
    half = resolve_model(name).revision
    assert resolve_model(name, dtype="bfloat16").revision == half
    assert resolve_model(name, dtype="float32").revision != half
    assert resolve_model(name, variant="none").revision != half


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sdx", r"model 'sdx': no such folder, .*did you mean \"sdxl\"\? aliases: ltx2, .*sd21"),
        ("", r"\.: no model_index\.json"),
        ("a/b/c", "or give a Hub id such as stabilityai/stable-diffusion-xl-base-1.0"),
        ("../secret", "no such folder"),
        ("x" * 5000, r"^model 'x{200}\.\.\.': no such folder"),
        ("a\0b", "no such folder"),
        ("line\nbreak", "no such folder"),
        ("none/such.safetensors", r"none/such\.safetensors: no such file"),
        ("model.ckpt", r"model\.ckpt: refused, a \.ckpt file is a pickle .*save_file"),
        ("/models/unet.bin", "refused"),
        (".", r"\.: no model_index\.json; expected a pipeline folder"),
    ],
)
def test_names_of_nothing(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=message):
        resolve_model(name)


def test_a_pickle_that_exists_is_refused_as_well(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a": torch.rand(2)}, path)
    with pytest.raises(ModelError, match="refused"):
        resolve_model(str(path))


def test_a_local_model_takes_no_revision(tmp_path: Path) -> None:
    save_folder(tmp_path, "sd21")
    with pytest.raises(ModelError, match="a local checkpoint has no revision 'main'"):
        resolve_model(str(tmp_path), revision="main")


def test_a_folder_named_like_an_alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(tmp_path / "sdxl", "sd21")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("sdxl").family == "sd21"


def test_a_default_size_that_cannot_be_read(tmp_path: Path) -> None:
    save_folder(tmp_path, "sd21")
    write_json(tmp_path / "vae" / "config.json", {"sample_size": 16})
    with pytest.raises(ModelError, match="block_out_channels None; the default size"):
        resolve_model(str(tmp_path))


def test_every_sampler_is_some_schedulers_default() -> None:
    config = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
    samplers = {default_sampler({"_class_name": name}) for name in SCHEDULER_SAMPLERS}
    assert samplers | {default_sampler(config)} == set(SAMPLERS)
    assert all(hasattr(diffusers, name) for name in SCHEDULER_SAMPLERS)


def test_every_alias_is_listed() -> None:
    listed = CliRunner().invoke(main, ["models", "list"])
    assert listed.exit_code == 0
    for name in alias_names():
        assert f"{name}: {read_alias(name).description}" in listed.output
    values = json.loads(CliRunner().invoke(main, ["models", "list", "--json"]).output)
    assert [alias["name"] for alias in values] == alias_names()
    assert {alias["family"] for alias in values} == {"sd21", "sdxl", "ltx2"}


def test_every_alias_is_complete() -> None:
    for name in alias_names():
        alias = read_alias(name)
        assert alias.name == name
        assert (alias.repo is None) == (alias.folder is not None)
        assert alias.repo is None or alias.repo.count("/") == 1
        assert alias.family in ("sd21", "sdxl", "ltx2")
        assert alias.description
        assert alias.licence
