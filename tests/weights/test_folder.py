"""The choice of files, over the listings of the real repositories."""

from typing import Any

import pytest

from raydiff.config import LTX2Config
from raydiff.errors import ModelError
from raydiff.weights.components import Needed, needed_by
from raydiff.weights.folder import choose_files

TOKENIZER = ["merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"]


def listed(folder: str, *names: str) -> list[str]:
    return [f"{folder}/{name}" for name in names]


def weights(folder: str, stem: str) -> list[str]:
    """Every spelling of the same weights that the Hub's repositories carry."""
    bin_stem = stem.replace("diffusion_", "") if stem == "model" else stem
    bin_stem = "pytorch_model" if stem == "model" else bin_stem
    return listed(
        folder,
        "config.json",
        f"{stem}.safetensors",
        f"{stem}.fp16.safetensors",
        f"{bin_stem}.bin",
        f"{bin_stem}.fp16.bin",
        "model.onnx",
        "model.onnx_data",
        "openvino_model.bin",
        "openvino_model.xml",
        "flax_model.msgpack",
    )


SD21 = [
    ".gitattributes",
    "README.md",
    "model_index.json",
    "v2-1_768-ema-pruned.ckpt",
    "v2-1_768-ema-pruned.safetensors",
    "v2-1_768-nonema-pruned.ckpt",
    "feature_extractor/preprocessor_config.json",
    "scheduler/scheduler_config.json",
    *weights("text_encoder", "model"),
    *listed("tokenizer", *TOKENIZER),
    *weights("unet", "diffusion_pytorch_model"),
    *weights("vae", "diffusion_pytorch_model"),
]

SDXL = [
    ".gitattributes",
    "01.png",
    "LICENSE.md",
    "model_index.json",
    "sd_xl_base_1.0.safetensors",
    "sd_xl_base_1.0_0.9vae.safetensors",
    "sd_xl_offset_example-lora_1.0.safetensors",
    "scheduler/scheduler_config.json",
    *weights("text_encoder", "model"),
    *weights("text_encoder_2", "model"),
    *listed("tokenizer", *TOKENIZER),
    *listed("tokenizer_2", *TOKENIZER),
    *weights("unet", "diffusion_pytorch_model"),
    *weights("vae", "diffusion_pytorch_model"),
    *listed("vae_1_0", "config.json", "diffusion_pytorch_model.safetensors"),
    *listed("vae_decoder", "config.json", "model.onnx"),
    *listed("vae_encoder", "config.json", "model.onnx"),
]

REFINER = [
    name
    for name in SDXL
    if not name.startswith(("text_encoder/", "tokenizer/", "vae_decoder", "vae_encoder"))
]

SD21_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SDXL_INDEX = SD21_INDEX | {
    "_class_name": "StableDiffusionXLPipeline",
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}
REFINER_INDEX = SDXL_INDEX | {"text_encoder": [None, None], "tokenizer": [None, None]}


def chosen(
    names: list[str],
    index: dict[str, Any],
    *,
    variant: Any = "auto",
    dtype: str = "auto",
    files: dict[str, Any] | None = None,
    needed: Needed | None = None,
) -> dict[str, tuple[str, ...]]:
    read = ({"model_index.json": index} | (files or {})).__getitem__
    result = choose_files("org/name", names, read, variant=variant, dtype=dtype, needed=needed)
    assert set(result.names) <= set(names)
    return result.weights | {"small": result.small}


def test_sd21_in_fp16_is_just_these_files() -> None:
    assert chosen(SD21, SD21_INDEX) == {
        "text_encoder": ("text_encoder/model.fp16.safetensors",),
        "unet": ("unet/diffusion_pytorch_model.fp16.safetensors",),
        "vae": ("vae/diffusion_pytorch_model.fp16.safetensors",),
        "small": (
            "model_index.json",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            *listed("tokenizer", *TOKENIZER),
            "unet/config.json",
            "vae/config.json",
        ),
    }


@pytest.mark.parametrize("variant", ["auto", "fp16"])
def test_weights_that_no_stage_needs_may_be_missing(variant: str) -> None:
    encode = needed_by(["encode"], LTX2Config())
    names = [name for name in SD21 if not name.startswith(("unet/diff", "vae/diff"))]
    files = chosen(names, SD21_INDEX, variant=variant, needed=encode)
    assert files["text_encoder"] == ("text_encoder/model.fp16.safetensors",)
    assert files["unet"] == files["vae"] == ()
    assert {"unet/config.json", "vae/config.json"} <= set(files["small"])
    names.remove("vae/config.json")
    with pytest.raises(ModelError, match=r"vae/config\.json is missing"):
        chosen(names, SD21_INDEX, needed=encode)
    decode = needed_by(["decode"], LTX2Config())
    with pytest.raises(ModelError, match="vae has only pickle weights"):
        chosen([*names, "vae/config.json"], SD21_INDEX, needed=decode)


@pytest.mark.parametrize("choice", [{"dtype": "float32"}, {"variant": "none"}])
def test_plain_files_when_asked_for(choice: dict[str, str]) -> None:
    files = chosen(SDXL, SDXL_INDEX, **choice)
    del files["small"]
    assert files == {
        "text_encoder": ("text_encoder/model.safetensors",),
        "text_encoder_2": ("text_encoder_2/model.safetensors",),
        "unet": ("unet/diffusion_pytorch_model.safetensors",),
        "vae": ("vae/diffusion_pytorch_model.safetensors",),
    }


def test_fp16_can_be_asked_for_with_float32() -> None:
    files = chosen(SDXL, SDXL_INDEX, variant="fp16", dtype="float32")
    assert files["unet"] == ("unet/diffusion_pytorch_model.fp16.safetensors",)


def test_the_refiner_has_no_first_text_encoder() -> None:
    files = chosen(REFINER, REFINER_INDEX, dtype="float16")
    assert set(files) == {"text_encoder_2", "unet", "vae", "small"}
    assert not any(name.startswith("tokenizer/") for name in files["small"])


def test_a_component_without_fp16_is_taken_plain() -> None:
    names = [name for name in SD21 if name != "vae/diffusion_pytorch_model.fp16.safetensors"]
    files = chosen(names, SD21_INDEX)
    assert files["vae"] == ("vae/diffusion_pytorch_model.safetensors",)
    assert files["unet"] == ("unet/diffusion_pytorch_model.fp16.safetensors",)


def test_fp16_only_serves_float32_too_but_not_variant_none() -> None:
    names = [name for name in SD21 if not name.endswith("model.safetensors")]
    files = chosen(names, SD21_INDEX, dtype="float32")
    assert files["unet"] == ("unet/diffusion_pytorch_model.fp16.safetensors",)
    with pytest.raises(ModelError, match=r"has fp16 weights only; set model\.variant to auto"):
        chosen(names, SD21_INDEX, variant="none")


def test_fp16_where_there_is_none() -> None:
    names = [name for name in SD21 if ".fp16." not in name]
    with pytest.raises(ModelError, match=r"has no fp16 weight files; leave model\.variant"):
        chosen(names, SD21_INDEX, variant="fp16")


@pytest.mark.parametrize(
    "index_name",
    [
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.safetensors.fp16.index.json",
    ],
)
def test_shards_are_those_of_the_index(index_name: str) -> None:
    shards = [f"diffusion_pytorch_model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]
    stale = [f"diffusion_pytorch_model.fp16-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    names = [name for name in SD21 if not name.startswith("unet/diffusion_pytorch")]
    names += listed("unet", index_name, *shards, *stale)
    index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}
    files = chosen(names, SD21_INDEX, files={f"unet/{index_name}": index})
    assert files["unet"] == tuple(listed("unet", *shards))
    assert f"unet/{index_name}" in files["small"]


def test_weights_of_another_library_are_left_alone() -> None:
    names = [
        *SD21,
        "text_encoder/diffusion_pytorch_model.fp16.safetensors",
        "unet/model.safetensors",
    ]
    assert chosen(names, SD21_INDEX)["text_encoder"] == ("text_encoder/model.fp16.safetensors",)


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("model_index.json", "no model_index.json; expected a pipeline folder"),
        ("vae/config.json", "lists vae, but vae/config.json is missing"),
        ("scheduler/", "the folder scheduler/ is missing or empty"),
        ("tokenizer/", "the folder tokenizer/ is missing or empty"),
    ],
)
def test_missing_parts_are_named(dropped: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        chosen([name for name in SD21 if not name.startswith(dropped)], SD21_INDEX)


def test_pickle_as_the_only_weights_is_refused() -> None:
    names = [name for name in SD21 if not name.endswith(".safetensors")]
    with pytest.raises(
        ModelError, match=r"only pickle weights \(.*pytorch_model.*refused.*save_file"
    ):
        chosen(names, SD21_INDEX)


def test_a_missing_shard_is_named() -> None:
    names = [name for name in SD21 if not name.startswith("unet/diffusion_pytorch")]
    index_name = "unet/diffusion_pytorch_model.safetensors.index.json"
    shard = "diffusion_pytorch_model-00001-of-00002.safetensors"
    index = {"weight_map": {"a": shard, "b": shard.replace("00001-", "00002-")}}
    names += [index_name, f"unet/{shard}"]
    with pytest.raises(ModelError, match=r"lists 2 shards, unet/.*00002-of-00002.*missing"):
        chosen(names, SD21_INDEX, files={index_name: index})
