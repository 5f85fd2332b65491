"""LTX-2 folders that diffusers wrote, in shards; and what loading a large one takes of the host."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raydiff.errors import ModelError
from raydiff.models.gemma3 import Gemma3Config, Gemma3TextEncoder
from raydiff.models.ltx2.upsampler import LTX2Upsampler, LTX2UpsamplerConfig
from raydiff.weights.checkpoint import open_checkpoint
from raydiff.weights.folder import choose_files
from raydiff.weights.inspect import inspect_path
from raydiff.weights.load import load_weights
from tests.parity.ltx2_reference import reference_pipeline, reference_upsampler
from tests.weights.test_ltx2_single_file import VERSIONS, our_modules

LANGUAGE_MODEL = "model.language_model."


@pytest.mark.parametrize("version", VERSIONS)
def test_a_sharded_folder_of_diffusers(tmp_path: Path, version: str) -> None:
    reference = reference_pipeline(version, tmp_path / "tokenizer")
    folder = tmp_path / "model"
    reference.save_pretrained(folder, max_shard_size="50KB")
    upsampler = reference_upsampler(version)
    upsampler.save_pretrained(folder / "latent_upsampler")
    for component in ("transformer", "text_encoder"):
        assert len(list((folder / component).glob("*-of-*.safetensors"))) > 1
    save_file({"x": torch.ones(1)}, folder / "text_encoder" / "diffusion_pytorch_model.safetensors")

    checkpoint = open_checkpoint(folder)
    assert checkpoint.family == "ltx2"
    modules = our_modules(checkpoint)
    expected = {name: getattr(reference, name).state_dict() for name in modules}
    with torch.device("meta"):
        text_config = Gemma3Config.from_dict(checkpoint.config("text_encoder"))
        modules["text_encoder"] = Gemma3TextEncoder(text_config)
        upsampler_config = LTX2UpsamplerConfig.from_dict(checkpoint.config("latent_upsampler"))
        modules["latent_upsampler"] = LTX2Upsampler(upsampler_config)
    expected["latent_upsampler"] = upsampler.state_dict()
    expected["text_encoder"] = {
        name.removeprefix(LANGUAGE_MODEL): tensor
        for name, tensor in reference.text_encoder.state_dict().items()
        if name.startswith(LANGUAGE_MODEL)
    }
    assert set(checkpoint.components) == set(modules)
    for name, module in modules.items():
        load_weights(module, checkpoint, name, device="cpu", dtype=torch.float32)
        loaded = module.state_dict()
        assert set(loaded) == set(expected[name])
        assert all(torch.equal(loaded[key], tensor) for key, tensor in expected[name].items())
    assert set(checkpoint.skipped.values()) == {"image half of Gemma 3"}
    assert checkpoint.config("scheduler")["shift_terminal"] == 0.1
    assert (checkpoint.tokenizer_folder("text_encoder") / "tokenizer.json").is_file()
    assert {part.name for part in inspect_path(folder).components} == set(modules)


def test_a_missing_shard_and_a_missing_component_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    reference_pipeline("2.0", tmp_path / "tokenizer").save_pretrained(
        folder, max_shard_size="200KB"
    )
    shard = sorted((folder / "transformer").glob("*-of-*.safetensors"))[1]
    shard.rename(tmp_path / "shard")
    with pytest.raises(ModelError, match=rf"transformer/{shard.name} missing"):
        open_checkpoint(folder)
    (tmp_path / "shard").rename(shard)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vocoder": [None, None]}))
    with pytest.raises(ModelError, match="lists no vocoder"):
        open_checkpoint(folder)


def test_prompts_encoded_elsewhere_need_no_text_encoder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    reference_pipeline("2.0", tmp_path / "tokenizer").save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    nothing = {"text_encoder": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index | nothing))
    assert "text_encoder" not in open_checkpoint(folder).components


SHARDS = [f"diffusion_pytorch_model-0000{n}-of-00008.safetensors" for n in range(1, 9)]
GEMMA_SHARDS = [f"model-{n:05}-of-00011.safetensors" for n in range(1, 12)]
SINGLE = "diffusion_pytorch_model.safetensors"

LIGHTRICKS = [
    "README.md",
    "ltx-2-19b-dev.safetensors",
    "ltx-2-19b-dev-fp8.safetensors",
    "ltx-2-19b-distilled-lora-384.safetensors",
    "ltx-2-spatial-upscaler-x2-1.0.safetensors",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer.model",
    "tokenizer/tokenizer_config.json",
    "text_encoder/config.json",
    "text_encoder/generation_config.json",
    *[f"text_encoder/{name}" for name in GEMMA_SHARDS],
    "text_encoder/model.safetensors.index.json",
    # A second copy of the same weights.
    "text_encoder/diffusion_pytorch_model-00001-of-00012.safetensors",
    "text_encoder/diffusion_pytorch_model.safetensors.index.json",
    *[f"transformer/{name}" for name in ("config.json", *SHARDS)],
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    *[
        f"{component}/{name}"
        for component in ("connectors", "vae", "audio_vae", "vocoder", "latent_upsampler")
        for name in ("config.json", SINGLE)
    ],
]
"""The files of Lightricks/LTX-2 on the Hub."""


def test_of_lightricks_repository_each_weight_is_taken_once() -> None:
    diffusers = ("transformer", "vae", "audio_vae")
    index = {name: ["diffusers", "Class"] for name in diffusers}
    index |= {name: ["ltx2", "Class"] for name in ("connectors", "vocoder")}
    index |= {name: ["transformers", "Class"] for name in ("text_encoder", "tokenizer")}

    def read(name: str) -> dict[str, object]:
        if name == "model_index.json":
            return {"_class_name": "LTX2Pipeline", **index}
        shards = GEMMA_SHARDS if name.startswith("text_encoder") else SHARDS
        return {"weight_map": {str(n): shard for n, shard in enumerate(shards)}}

    chosen = choose_files("repo", LIGHTRICKS, read, variant="auto", dtype="auto")
    assert chosen.weights == {
        "text_encoder": tuple(f"text_encoder/{name}" for name in GEMMA_SHARDS),
        "transformer": tuple(f"transformer/{name}" for name in SHARDS),
        **{
            name: (f"{name}/{SINGLE}",)
            for name in ("connectors", "vae", "audio_vae", "vocoder", "latent_upsampler")
        },
    }
    assert not any(name.startswith("ltx-2") for name in chosen.names)
    assert "tokenizer/tokenizer.json" in chosen.names
    assert "tokenizer/tokenizer.model" not in chosen.names


MEASURE = """
import json, sys
import psutil, torch
from pathlib import Path
from torch import nn
from raydiff.weights.checkpoint import Checkpoint, component_sources
from raydiff.weights.load import load_weights

def peak_bytes():
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in text.splitlines() if "VmHWM" in line).split()[1])

files = sorted(Path(sys.argv[1]).glob("*.safetensors"))
sources = {"transformer": component_sources("transformer", files, {})}
checkpoint = Checkpoint(path=Path(sys.argv[1]), family="ltx2", configs={}, sources=sources)
shapes = {name: source.shape for name, source in sources["transformer"].items()}
with torch.device("meta"):
    module = nn.Module()
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.empty(shape)))
torch.ones(1 << 22).to(torch.bfloat16).to("meta")  # its code comes into memory on first use
Path("/proc/self/clear_refs").write_text("5")
before = psutil.Process().memory_info().rss
load_weights(module, checkpoint, "transformer", device="meta", dtype=torch.bfloat16)
print(peak_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_host_holds_one_tensor_of_what_goes_to_a_device(tmp_path: Path) -> None:
    """The meta device stands for a GPU: what is placed there takes no memory of the host."""
    rows, columns, num_shards, per_shard = 4096, 1024, 4, 12  # 48 tensors of 8 MB: 403 MB
    weight = torch.zeros(rows, columns, dtype=torch.bfloat16)
    for shard in range(num_shards):
        tensors = {f"w{shard}_{index}": weight.clone() for index in range(per_shard)}
        save_file(tensors, tmp_path / f"{shard}.safetensors")
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 3 * weight.nbytes
