"""Original single files: every tensor finds its place, as in diffusers' own converters."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoderKL
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextConfig as TransformersCLIPTextConfig
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from raydiff.errors import ModelError
from raydiff.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from raydiff.models.clip import CLIPTextConfig, CLIPTextEncoder
from raydiff.models.unet import UNet, UNetConfig
from raydiff.weights.checkpoint import Checkpoint, open_checkpoint
from raydiff.weights.load import load_weights
from tests.weights.modules import meta_module
from tests.weights.original import (
    sd21_shapes,
    sdxl_shapes,
    write_header_only,
    write_random,
)

SMALL_SD21 = sd21_shapes(
    unet={"channels": 32, "mult": (1, 2, 4, 4), "depth": (1, 1, 1, 0), "context": 16},
    vae_channels=32,
    width=16,
    vocab=50,
)
SMALL_SDXL = sdxl_shapes(
    unet={"channels": 32, "mult": (1, 2, 4), "depth": (0, 2, 3), "context": 40, "added": 48},
    vae_channels=32,
    widths=(16, 24),
    layers=(2, 3),
    vocab=50,
)

FULL_SIZE = {
    "sd21": {
        "text_encoder": (372, 340_387_840),
        "unet": (686, 865_910_724),
        "vae": (248, 83_653_863),
    },
    "sdxl": {
        "text_encoder": (196, 123_060_480),
        "text_encoder_2": (517, 694_659_840),
        "unet": (1680, 2_567_463_684),
        "vae": (248, 83_653_863),
    },
}


def reference_modules(checkpoint: Checkpoint) -> dict[str, torch.nn.Module]:
    """diffusers' and transformers' modules, built from the configs that we detected."""
    with torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel.from_config(checkpoint.config("unet")),
            "vae": DiffusersAutoencoderKL.from_config(checkpoint.config("vae")),
        }
        for name in checkpoint.components:
            if name.startswith("text_encoder"):
                config = checkpoint.config(name)
                has_projection = "CLIPTextModelWithProjection" in config["architectures"]
                cls = CLIPTextModelWithProjection if has_projection else CLIPTextModel
                modules[name] = cls(TransformersCLIPTextConfig(**config))
    return modules


def our_modules(checkpoint: Checkpoint) -> dict[str, torch.nn.Module]:
    """raydiff's own modules, built from the same configs."""
    with torch.device("meta"):
        modules: dict[str, torch.nn.Module] = {
            "unet": UNet(UNetConfig.from_dict(checkpoint.config("unet"))),
            "vae": AutoencoderKL(AutoencoderKLConfig.from_dict(checkpoint.config("vae"))),
        }
        for name in checkpoint.components:
            if name.startswith("text_encoder"):
                config = CLIPTextConfig.from_dict(checkpoint.config(name))
                modules[name] = CLIPTextEncoder(config)
    return modules


def state_shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the module's tensors, text encoders' with the prefix of their files."""
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if isinstance(module, CLIPTextModel):
        return {f"text_model.{name.removeprefix('text_model.')}": s for name, s in shapes.items()}
    return shapes


@pytest.mark.parametrize("family", ["sd21", "sdxl"])
def test_full_size_files_have_the_published_tensors(tmp_path: Path, family: str) -> None:
    file = tmp_path / "full.safetensors"
    write_header_only(file, sd21_shapes() if family == "sd21" else sdxl_shapes())
    checkpoint = open_checkpoint(file)
    assert checkpoint.family == family
    for name, module in our_modules(checkpoint).items():
        sources = checkpoint.tensors(name)
        assert {key: source.shape for key, source in sources.items()} == state_shapes(module)
    counted = {}
    for name, module in reference_modules(checkpoint).items():
        tensors = checkpoint.tensors(name)
        assert {key: source.shape for key, source in tensors.items()} == state_shapes(module)
        counted[name] = (
            len(tensors),
            sum(torch.Size(source.shape).numel() for source in tensors.values()),
        )
    assert counted == FULL_SIZE[family]


def reference_tensors(family: str, file: dict[str, torch.Tensor], configs) -> dict:
    """What diffusers' converters make of an original file, by component."""
    unet_config = configs("unet")
    tensors = {
        "unet": convert_ldm_unet_checkpoint(file, unet_config),
        "vae": convert_ldm_vae_checkpoint(file, configs("vae")),
    }
    if family == "sd21":
        text_model = SimpleNamespace(config=SimpleNamespace(hidden_size=16))
        # Its own rule cuts the fused projection by the text projection's rows, here as wide.
        tensors["text_encoder"] = convert_open_clip_checkpoint(text_model, file)
    else:
        prefix = "conditioner.embedders.1.model."
        text_model = SimpleNamespace(config=SimpleNamespace(hidden_size=24))
        tensors["text_encoder"] = convert_ldm_clip_checkpoint(file)
        tensors["text_encoder"].pop("text_model.embeddings.position_ids")
        tensors["text_encoder_2"] = convert_open_clip_checkpoint(text_model, file, prefix=prefix)
    return tensors


@pytest.mark.parametrize(("family", "shapes"), [("sd21", SMALL_SD21), ("sdxl", SMALL_SDXL)])
def test_tensors_equal_those_of_diffusers_converters(
    tmp_path: Path, family: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    path = tmp_path / "small.safetensors"
    file = write_random(path, shapes)
    checkpoint = open_checkpoint(path)
    expected = reference_tensors(family, file, checkpoint.config)
    assert set(checkpoint.components) == set(expected)
    for component, tensors in expected.items():
        module = meta_module({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        load_weights(module, checkpoint, component, device="cpu", dtype=torch.float32)
        loaded = module.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("shapes", [SMALL_SD21, SMALL_SDXL])
def test_configs_are_read_from_shapes(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    path = tmp_path / "small.safetensors"
    write_header_only(path, shapes)
    checkpoint = open_checkpoint(path)
    for name, module in reference_modules(checkpoint).items():
        sources = checkpoint.tensors(name)
        assert {key: source.shape for key, source in sources.items()} == state_shapes(module)


@pytest.mark.parametrize("shapes", [SMALL_SD21, SMALL_SDXL])
def test_our_modules_are_filled_from_original_files(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]]
) -> None:
    path = tmp_path / "small.safetensors"
    write_random(path, shapes)
    checkpoint = open_checkpoint(path)
    for name, module in our_modules(checkpoint).items():
        load_weights(module, checkpoint, name, device="cpu", dtype=torch.bfloat16)
        assert all(tensor.dtype == torch.bfloat16 for tensor in module.state_dict().values())
        assert not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])


def test_skips_say_why(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    write_header_only(path, SMALL_SD21)
    skipped = open_checkpoint(path).skipped
    last_layer = [name for name in skipped if ".resblocks.23." in name]
    assert len(last_layer) == 12
    assert "24th never runs" in skipped[last_layer[0]]
    assert "cond_stage_model.model.text_projection" in skipped
    assert "training schedule" in skipped["sqrt_recipm1_alphas_cumprod"]


def test_all_layers_are_kept_where_the_last_was_dropped_before(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    write_header_only(
        path, {name: shape for name, shape in SMALL_SD21.items() if ".resblocks.23." not in name}
    )
    assert open_checkpoint(path).config("text_encoder")["num_hidden_layers"] == 23


def test_a_projection_of_sdxls_first_encoder_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    extra = {"conditioner.embedders.0.text_projection.weight": (16, 16)}
    write_header_only(path, SMALL_SDXL | extra)
    checkpoint = open_checkpoint(path)
    assert set(extra) <= set(checkpoint.skipped)
    assert "text_projection.weight" not in checkpoint.tensors("text_encoder")
    assert "text_projection.weight" in checkpoint.tensors("text_encoder_2")


def test_unknown_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    extra = {f"model.diffusion_model.input_blocks.1.7.x{n}": (3,) for n in range(12)}
    write_header_only(path, SMALL_SD21 | extra)
    with pytest.raises(ModelError, match=r"12 tensors are in no table of sd21: .*\.x9\. The file"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("first_stage_model.", "has no vae; use the complete checkpoint"),
        ("model.diffusion_model.input_blocks.0.0.", r"tensor conv_in.weight is missing"),
        ("cond_stage_model.model.positional", r"position_embedding.weight is missing"),
    ],
)
def test_incomplete_files_say_what_is_missing(tmp_path: Path, dropped: str, message: str) -> None:
    path = tmp_path / "small.safetensors"
    write_header_only(
        path, {name: shape for name, shape in SMALL_SD21.items() if not name.startswith(dropped)}
    )
    with pytest.raises(ModelError, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "Stable Diffusion 1.x"),
        ("conditioner.embedders.0.model.ln_final.bias", "the SDXL refiner"),
        ("lora_unet_down_blocks_0.lora_up.weight", "a LoRA"),
        ("something.else", "no known checkpoint"),
    ],
)
def test_other_files_are_named(tmp_path: Path, name: str, what: str) -> None:
    path = tmp_path / "other.safetensors"
    write_header_only(path, {name: (4,)})
    with pytest.raises(ModelError, match=f"{what}.*raydiff reads SD 2.1, SDXL base and LTX-2"):
        open_checkpoint(path)


def test_inpainting_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "inpaint.safetensors"
    name = "model.diffusion_model.input_blocks.0.0.weight"
    write_header_only(path, SMALL_SD21 | {name: (32, 9, 3, 3)})
    with pytest.raises(ModelError, match="9 input channels"):
        open_checkpoint(path)


def scheduler_of(path: Path) -> tuple[str, str, int]:
    checkpoint = open_checkpoint(path)
    scheduler = checkpoint.config("scheduler")
    sample_size = checkpoint.config("unet")["sample_size"]
    return scheduler["_class_name"], scheduler["prediction_type"], sample_size


@pytest.mark.parametrize(
    ("shapes", "metadata", "expected"),
    [
        (SMALL_SD21, {}, ("DDIMScheduler", "v_prediction", 96)),
        (
            SMALL_SD21,
            {"modelspec.architecture": "stable-diffusion-v2-512"},
            ("PNDMScheduler", "epsilon", 64),
        ),
        (
            SMALL_SD21,
            {
                "modelspec.architecture": "stable-diffusion-v2-512",
                "modelspec.prediction_type": "v",
            },
            ("DDIMScheduler", "v_prediction", 96),
        ),
        (SMALL_SDXL, {}, ("EulerDiscreteScheduler", "epsilon", 128)),
        (
            SMALL_SDXL,
            {"modelspec.prediction_type": "v"},
            ("EulerDiscreteScheduler", "v_prediction", 128),
        ),
        (SMALL_SDXL | {"v_pred": (0,)}, {}, ("EulerDiscreteScheduler", "v_prediction", 128)),
    ],
)
def test_prediction_type_of_single_files(
    tmp_path: Path,
    shapes: dict[str, tuple[int, ...]],
    metadata: dict[str, str],
    expected: tuple[str, str, int],
) -> None:
    path = tmp_path / "small.safetensors"
    write_random(path, shapes, metadata=metadata)
    assert scheduler_of(path) == expected


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ("{parameterization: v}", "v_prediction"),
        ("{parameterization: eps}", "epsilon"),
        ("{linear_start: 0.00085}", "epsilon"),
    ],
)
def test_a_config_beside_the_file_decides(tmp_path: Path, params: str, expected: str) -> None:
    path = tmp_path / "small.safetensors"
    write_random(path, SMALL_SD21, metadata={"modelspec.prediction_type": "v"})
    path.with_suffix(".yaml").write_text(f"model: {{params: {params}}}")
    assert scheduler_of(path)[1] == expected


@pytest.mark.parametrize(
    "text", ["", "model: 3", "model: {params: {parameterization: x0}}", "a: ["]
)
def test_a_wrong_config_beside_the_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "small.safetensors"
    write_header_only(path, SMALL_SD21)
    path.with_suffix(".yaml").write_text(text)
    with pytest.raises(ModelError, match=r"small\.yaml: .*(v or eps|v and eps)"):
        open_checkpoint(path)


def test_zero_terminal_snr_marker_reaches_the_scheduler(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    write_header_only(path, SMALL_SDXL | {"v_pred": (0,), "ztsnr": (0,)})
    scheduler = open_checkpoint(path).config("scheduler")
    assert scheduler["rescale_betas_zero_snr"] is True
