"""Folders in diffusers layout, in all spellings that diffusers and transformers have written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raydiff.errors import ModelError
from raydiff.weights.checkpoint import Checkpoint, open_checkpoint
from raydiff.weights.load import load_weights
from tests.weights.folders import components, save_folder, save_small_files, write_json
from tests.weights.modules import meta_module

Tensors = dict[str, torch.Tensor]


def our_names(component: str, tensors: Tensors) -> Tensors:
    """transformers 5 drops `text_model.` from a CLIPTextModel's names; files and we have it."""
    if component == "text_encoder":
        return {f"text_model.{name.removeprefix('text_model.')}": t for name, t in tensors.items()}
    return tensors


def check(checkpoint: Checkpoint, saved: dict[str, Tensors], dtype: str = "F32") -> None:
    assert set(checkpoint.components) == set(saved)
    for component, tensors in saved.items():
        expected = our_names(component, tensors)
        sources = checkpoint.tensors(component)
        assert {name: source.shape for name, source in sources.items()} == {
            name: tuple(tensor.shape) for name, tensor in expected.items()
        }
        assert {source.dtype for source in sources.values()} == {dtype}
        module = meta_module({name: source.shape for name, source in sources.items()})
        load_weights(module, checkpoint, component, device="cpu", dtype=torch.float32)
        assert all(
            torch.equal(tensor, expected[name].float())
            for name, tensor in module.state_dict().items()
        )


@pytest.mark.parametrize("family", ["sd21", "sdxl"])
def test_a_folder_saved_by_diffusers(tmp_path: Path, family: str) -> None:
    saved = save_folder(tmp_path, family)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.family == family
    check(checkpoint, saved)
    assert checkpoint.config("unet")["cross_attention_dim"] == 16
    assert checkpoint.config("model_index")["safety_checker"] == [None, None]
    assert checkpoint.tokenizer_folder("text_encoder") == tmp_path / "tokenizer"
    if family == "sdxl":
        assert checkpoint.tokenizer_folder("text_encoder_2") == tmp_path / "tokenizer_2"


def test_fp16_and_plain_files_side_by_side(tmp_path: Path) -> None:
    saved = save_folder(tmp_path, "sd21", variants=(None, "fp16"))
    check(open_checkpoint(tmp_path), saved, "F16")
    plain = open_checkpoint(tmp_path, dtype="float32")
    assert {source.dtype for source in plain.tensors("unet").values()} == {"F32"}
    plain = open_checkpoint(tmp_path, variant="none")
    assert {source.dtype for source in plain.tensors("unet").values()} == {"F32"}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(tmp_path: Path, variant: str | None) -> None:
    modules = components("sdxl")
    for name, module in modules.items():
        module.save_pretrained(tmp_path / name, variant=variant, max_shard_size="20KB")
    save_small_files(tmp_path, "sdxl")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 3
    check(
        open_checkpoint(tmp_path), {name: module.state_dict() for name, module in modules.items()}
    )


def rewrite(path: Path, tensors: Tensors) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def test_old_attention_names_of_the_vae(tmp_path: Path) -> None:
    saved = save_folder(tmp_path, "sd21")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for new_name in [name for name in tensors if "mid_block.attentions" in name]:
        tensor = tensors.pop(new_name)
        name = new_name
        for new, spelled in old.items():
            name = name.replace(f".{new}.", f".{spelled}.")
        is_weight = name != new_name and tensor.ndim == 2
        # Some files kept the original's 1x1 convolution as well.
        tensors[name] = tensor[:, :, None, None] if is_weight and "decoder" in name else tensor
    assert sum(".proj_attn." in name for name in tensors) == 4
    rewrite(path, tensors)
    check(open_checkpoint(tmp_path), saved)


@pytest.mark.parametrize("has_prefix", [True, False])
def test_text_model_prefix_and_position_ids(tmp_path: Path, has_prefix: bool) -> None:
    saved = save_folder(tmp_path, "sdxl")
    for component in ("text_encoder", "text_encoder_2"):
        path = tmp_path / component / "model.safetensors"
        bare = {name.removeprefix("text_model."): t for name, t in load_file(path).items()}
        projection = bare.pop("text_projection.weight", None)
        bare["embeddings.position_ids"] = torch.arange(77)[None]
        tensors = {f"text_model.{n}": t for n, t in bare.items()} if has_prefix else bare
        if projection is not None:
            tensors["text_projection.weight"] = projection
        rewrite(path, tensors)
    checkpoint = open_checkpoint(tmp_path)
    check(checkpoint, saved)
    assert len(checkpoint.skipped) == 2
    assert set(checkpoint.skipped.values()) == {
        "the numbers 0..76, which the text encoder counts itself"
    }


def test_an_unknown_name_is_unexpected_when_it_is_loaded(tmp_path: Path) -> None:
    save_folder(tmp_path, "sd21")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    rewrite(path, tensors | {"encoder.mid_block.attentions.0.odd": torch.rand(3)})
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(ModelError, match=r"1 unexpected: encoder.mid_block.attentions.0.odd \[3\]"):
        load_weights(meta_module(shapes), checkpoint, "vae", device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "names the pipeline 'FluxPipeline'"),
        ("model_index.json", {"vae": [None, None]}, "model_index.json lists no vae"),
        ("unet/config.json", {"cross_attention_dim": 768}, r"Stable Diffusion 1\.x"),
        ("unet/config.json", {"in_channels": 9}, "9 input channels"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "and only SDXL, has text_time"),
    ],
)
def test_other_pipelines_are_refused(
    tmp_path: Path, file: str, change: dict[str, object], message: str
) -> None:
    save_folder(tmp_path, "sd21")
    values = json.loads((tmp_path / file).read_text())
    write_json(tmp_path / file, values | change)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(tmp_path)


def test_the_refiner_is_refused_by_name(tmp_path: Path) -> None:
    save_folder(tmp_path, "sdxl")
    index = json.loads((tmp_path / "model_index.json").read_text())
    write_json(
        tmp_path / "model_index.json",
        index | {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]},
    )
    with pytest.raises(ModelError, match="SDXL refiner"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["", "[1]", '{"a": ', "\x00"])
def test_broken_configs_are_named(tmp_path: Path, content: str) -> None:
    save_folder(tmp_path, "sd21")
    (tmp_path / "unet" / "config.json").write_text(content)
    with pytest.raises(
        ModelError, match=r"unet/config\.json: (not valid JSON|expected a JSON obj)"
    ):
        open_checkpoint(tmp_path)


def test_a_truncated_component_is_named_on_opening(tmp_path: Path) -> None:
    save_folder(tmp_path, "sd21")
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 10)
    with pytest.raises(ModelError, match=r"unet/diffusion_pytorch_model\.safetensors: .*promises"):
        open_checkpoint(tmp_path)
