"""fp8 copies of LTX-2 checkpoints, made through the command and loaded again."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from raydiff.errors import ModelError, OutputError
from raydiff.models.fp8_linear import FP8_MAX, Fp8Linear, use_fp8_linears
from raydiff.models.ltx2.transformer import LTX2Transformer
from raydiff.models.ltx2.transformer_config import LTX2TransformerConfig
from raydiff.pipelines.quantize import layers_to_quantize, quantize
from raydiff.weights.checkpoint import Checkpoint, open_checkpoint
from raydiff.weights.fp8 import Fp8Layer, fp8_layers
from raydiff.weights.load import load_weights
from tests.cli.command import cli
from tests.models.ltx2.test_transformer import SIZE, normal
from tests.parity.ltx2_reference import reference_pipeline
from tests.weights.original import write_header_only
from tests.weights.original_ltx2 import CONFIGS, ltx2_shapes, metadata, write_small
from tests.weights.test_original_files import SMALL_SD21

LINEARS = 12
"""Of one block, those that video tokens go through: four of self attention, two of each attention
to the text and to the sound, two of the sound's attention to them, two of the feed-forward."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LTX-2.3 folder in bf16, its transformer in shards."""
    home = tmp_path_factory.mktemp("bf16")
    pipe = reference_pipeline("2.3", home / "tokenizer").to(torch.bfloat16)
    pipe.save_pretrained(home / "model", max_shard_size="100KB")
    return home / "model"


def transformer(checkpoint: Checkpoint, *, is_fp8: bool) -> LTX2Transformer:
    with torch.device("meta"):
        config = LTX2TransformerConfig.from_dict(checkpoint.config("transformer"))
        module = LTX2Transformer(config)
    if is_fp8:
        use_fp8_linears(module, fp8_layers(checkpoint.tensors("transformer")))
    return load_weights(module, checkpoint, "transformer", device="cpu", dtype=torch.float32)


@torch.no_grad()
def velocity(module: LTX2Transformer) -> torch.Tensor:
    config = module.config
    context = module.precompute_context(
        normal(2, 7, config.caption_channels or config.dim, seed=5),
        normal(2, 7, config.caption_channels or config.audio_dim, seed=6),
        latent_size=SIZE,
        num_audio_tokens=5,
        frame_rates=[24.0, 24.0],
    )
    out = module(
        normal(2, SIZE.num_frames * SIZE.height * SIZE.width, config.in_channels, seed=1),
        normal(2, 5, config.audio_in_channels, seed=2),
        context,
        sigmas=torch.tensor([0.9, 0.4]),
    )
    return torch.cat([out.video.flatten(), out.audio.flatten()])


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


@pytest.mark.parametrize("scales", ["rowwise", "tensorwise"])
def test_a_folder_goes_to_fp8_and_loads(folder: Path, tmp_path: Path, scales: str) -> None:
    target = tmp_path / "fp8"
    options = [] if scales == "rowwise" else ["--scales", scales]
    run = cli("models", "quantize", folder, "--out", target, *options, cwd=tmp_path)
    assert f"{3 * LINEARS} layers are in fp8" in run.stdout
    checkpoint, original = open_checkpoint(target), open_checkpoint(folder)
    layers = fp8_layers(checkpoint.tensors("transformer"))
    assert len(layers) == 3 * LINEARS
    kind = Fp8Layer(has_row_scales=scales == "rowwise", has_input_scale=False)
    assert set(layers.values()) == {kind}
    for component in original.components:
        if component != "transformer":
            ours, theirs = checkpoint.tensors(component), original.tensors(component)
            assert {name: t.offset for name, t in ours.items()} == {
                name: t.offset for name, t in theirs.items()
            }
    full = velocity(transformer(original, is_fp8=False))
    folded = velocity(transformer(checkpoint, is_fp8=False))
    fp8 = transformer(checkpoint, is_fp8=True)
    assert sum(isinstance(module, Fp8Linear) for module in fp8.modules()) == 3 * LINEARS
    assert error(folded, full) < 0.05
    assert error(velocity(fp8), folded) < 1e-5
    fp8.prepare_for_inference()
    assert error(velocity(fp8), folded) < 1e-5


def test_the_index_of_shards_has_the_scales(folder: Path, tmp_path: Path) -> None:
    quantize(folder, tmp_path / "fp8")
    transformer_folder = tmp_path / "fp8" / "transformer"
    name = "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads((transformer_folder / name).read_text())
    stored = {
        key: file.name
        for file in transformer_folder.glob("*.safetensors")
        for key in load_file(file)
    }
    assert index["weight_map"] == stored
    size_bytes = sum(
        tensor.nbytes
        for file in transformer_folder.glob("*.safetensors")
        for tensor in load_file(file).values()
    )
    assert index["metadata"]["total_size"] == size_bytes


def test_a_single_file_keeps_its_names_and_config(tmp_path: Path) -> None:
    source, target = tmp_path / "ltx-2-dev.safetensors", tmp_path / "ltx-2-dev-fp8.safetensors"
    tensors = write_small(source, "2.0")
    report = quantize(source, target, scales="tensorwise")
    with safe_open(target, framework="pt") as file:
        layers = json.loads(file.metadata()["_quantization_metadata"])["layers"]
    stored = load_file(target)
    assert report.num_layers == len(layers) == 2 * LINEARS
    assert set(stored) == set(tensors) | {f"{layer}.weight_scale" for layer in layers}
    for key, tensor in tensors.items():
        layer = key.removesuffix(".weight")
        if layer not in layers:
            assert torch.equal(stored[key], tensor)
            continue
        scale = stored[f"{layer}.weight_scale"]
        assert scale.shape == ()
        assert scale == tensor.abs().max() / FP8_MAX
        assert stored[key].dtype == torch.float8_e4m3fn
        assert error(stored[key].float() * scale, tensor) < 0.04
    assert open_checkpoint(target).config("vae") == open_checkpoint(source).config("vae")


@pytest.mark.parametrize(("version", "num_layers"), [("2.0", 44 * LINEARS), ("2.3", 44 * LINEARS)])
def test_the_first_and_last_two_of_48_blocks_stay(
    tmp_path: Path, version: str, num_layers: int
) -> None:
    path = tmp_path / "full.safetensors"
    config = CONFIGS[version]
    write_header_only(path, ltx2_shapes(config), metadata(config, version))
    layers = layers_to_quantize(open_checkpoint(path))
    assert len(layers) == num_layers
    assert {int(name.split(".")[1]) for name in layers} == set(range(2, 46))
    left_out = ("gate", ".audio_ff", ".audio_attn")
    assert not any(part in name for part in left_out for name in layers)


def test_what_cannot_be_quantised_is_named(tmp_path: Path) -> None:
    source = tmp_path / "sd21.safetensors"
    write_header_only(source, SMALL_SD21)
    target = tmp_path / "fp8.safetensors"
    with pytest.raises(ModelError, match="this is sd21; raydiff quantises LTX-2's"):
        quantize(source, target)
    source = tmp_path / "ltx2.safetensors"
    write_small(source, "2.0")
    quantize(source, target)
    with pytest.raises(ModelError, match="in fp8 already"):
        quantize(target, tmp_path / "again.safetensors")
    with pytest.raises(OutputError, match="exists already"):
        quantize(source, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fp8.safetensors",
        "ltx2.safetensors",
        "sd21.safetensors",
    ]


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "ltx2.safetensors"
    write_small(source, "2.0")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"could not be made: .*file"):
        quantize(source, tmp_path / "file" / "fp8.safetensors")

    def stop(num_bytes: int, total_bytes: int) -> None:
        if num_bytes > total_bytes / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "fp8.safetensors", on_progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "ltx2.safetensors"]


DIALECTS = ["Lightricks", "ComfyUI", "older ComfyUI", "rows without an axis", "a plain cast"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_published_dialects_give_the_same_weights(tmp_path: Path, dialect: str) -> None:
    source = tmp_path / "ltx2.safetensors"
    tensors = write_small(source, "2.0")
    config = metadata_of(source)
    layer = "model.diffusion_model.transformer_blocks.1.attn1.to_q"
    ours = "transformer_blocks.1.attn1.to_q"
    weight = tensors[f"{layer}.weight"]
    scale = weight.abs().max() / FP8_MAX
    if dialect == "rows without an axis":
        scale = weight.abs().amax(dim=1) / FP8_MAX
    if dialect == "a plain cast":
        scale = torch.ones(())
    rows = scale[:, None] if scale.ndim else scale
    tensors[f"{layer}.weight"] = (weight / rows).to(torch.float8_e4m3fn)
    beside = {
        "Lightricks": {"weight_scale": scale, "input_scale": torch.tensor(0.02)},
        "ComfyUI": {
            "weight_scale": scale[None],
            "comfy_quant": torch.zeros(30, dtype=torch.uint8),
        },
        "older ComfyUI": {"scale_weight": scale[None], "scale_input": torch.tensor([0.02])},
        "rows without an axis": {"weight_scale": scale},
        "a plain cast": {},
    }[dialect]
    tensors |= {f"{layer}.{word}": value for word, value in beside.items()}
    if dialect == "older ComfyUI":
        marker = "model.diffusion_model.scaled_fp8"
        tensors[marker] = torch.zeros(2).to(torch.float8_e4m3fn)
    save_file(tensors, source, metadata=config)
    checkpoint = open_checkpoint(source)
    found = fp8_layers(checkpoint.tensors("transformer"))
    assert found == {
        ours: Fp8Layer(
            has_row_scales=scale.ndim > 0,
            has_input_scale=dialect in ("Lightricks", "older ComfyUI"),
        )
    }
    expected = tensors[f"{layer}.weight"].float() * rows
    assert error(expected, weight) < 0.04
    folded = transformer(checkpoint, is_fp8=False).get_parameter(f"{ours}.weight")
    assert torch.equal(folded, expected)
    fp8 = transformer(checkpoint, is_fp8=True).get_submodule(ours)
    assert isinstance(fp8, Fp8Linear)
    assert torch.equal(fp8.full_weight(), expected)
    if fp8.input_scale is not None:
        assert fp8.input_scale.dtype == torch.float32
        assert fp8.input_scale.item() == pytest.approx(0.02)


def test_scales_of_blocks_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "ltx2.safetensors"
    tensors = write_small(source, "2.0")
    config = metadata_of(source)
    layer = "model.diffusion_model.transformer_blocks.1.attn1.to_q"
    tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{layer}.weight_scale"] = torch.ones(2, 2)
    save_file(tensors, source, metadata=config)
    with pytest.raises(ModelError, match=r"weight_scale has shape \[2, 2\]"):
        open_checkpoint(source)


def test_other_quantised_formats_are_refused_by_name(tmp_path: Path) -> None:
    source = tmp_path / "ltx2.safetensors"
    tensors = write_small(source, "2.0")
    config = metadata_of(source)
    layer = "model.diffusion_model.transformer_blocks.1.attn1.to_q"
    tensors[f"{layer}.weight"] = torch.zeros(32, 16, dtype=torch.uint8)
    tensors[f"{layer}.weight_scale"] = torch.ones(32, 2).to(torch.float8_e4m3fn)
    tensors[f"{layer}.weight_scale_2"] = torch.ones(())
    save_file(tensors, source, metadata=config)
    with pytest.raises(ModelError, match=r"1 weights are U8 \(NVFP4 or int8\)"):
        open_checkpoint(source)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, str] = file.metadata()
    return found
