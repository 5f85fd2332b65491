"""Lightricks' single files of LTX-2: names, shapes, configs and values under diffusers' names."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    LTX2VideoTransformer3DModel,
)
from diffusers.loaders.single_file_utils import (
    convert_ltx2_audio_vae_to_diffusers,
    convert_ltx2_transformer_to_diffusers,
    convert_ltx2_vae_to_diffusers,
)
from diffusers.pipelines.ltx2 import (
    LTX2LatentUpsamplerModel,
    LTX2TextConnectors,
    LTX2Vocoder,
    LTX2VocoderWithBWE,
)
from safetensors.torch import save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from raydiff.errors import ModelError
from raydiff.models.gemma3 import Gemma3Config, Gemma3TextEncoder
from raydiff.models.ltx2.audio_vae import AudioVAE, AudioVAEConfig
from raydiff.models.ltx2.connectors import LTX2Connectors, LTX2ConnectorsConfig
from raydiff.models.ltx2.transformer import LTX2Transformer
from raydiff.models.ltx2.transformer_config import LTX2TransformerConfig
from raydiff.models.ltx2.upsampler import LTX2Upsampler, LTX2UpsamplerConfig
from raydiff.models.ltx2.video_vae import LTX2VideoVAE
from raydiff.models.ltx2.video_vae_config import LTX2VideoVAEConfig
from raydiff.models.ltx2.vocoder import Vocoder, VocoderWithBWE
from raydiff.models.ltx2.vocoder_config import VocoderConfig, VocoderWithBWEConfig
from raydiff.request import VideoModel
from raydiff.weights.checkpoint import Checkpoint, open_checkpoint
from raydiff.weights.inspect import inspect_path
from raydiff.weights.load import load_weights
from raydiff.weights.resolve import resolve_model
from tests.weights.modules import meta_module
from tests.weights.original import write_header_only, write_random
from tests.weights.original_ltx2 import CONFIGS, ltx2_shapes, metadata, small_config, write_small

VERSIONS = ["2.0", "2.3"]

FULL_SIZE = {
    "2.0": {
        "connectors": (59, 1_431_475_200),
        "transformer": (3510, 18_876_174_592),
        "vae": (184, 1_222_479_601 + 256),  # with the latents' mean and std
        "audio_vae": (102, 53_248_146 + 256),
        "vocoder": (194, 55_592_802),
    },
    "2.3": {
        "connectors": (262, 3_172_227_584),
        "transformer": (4186, 18_988_838_144),
        "vae": (170, 726_105_969 + 256),
        "audio_vae": (102, 53_248_146 + 256),
        # with 400 filters of 12 taps, the mel matrix and two Fourier bases
        "vocoder": (1227, 128_537_448 + 400 * 12 + 64 * 257 + 2 * 514 * 512),
    },
}
"""Tensors and numbers of each component, as Lightricks published them."""


def reference_modules(checkpoint: Checkpoint) -> dict[str, torch.nn.Module]:
    """diffusers' modules, built from the configs that we read."""
    has_bwe = checkpoint.config("vocoder")["_class_name"] == "LTX2VocoderWithBWE"
    classes = {
        "connectors": LTX2TextConnectors,
        "transformer": LTX2VideoTransformer3DModel,
        "vae": AutoencoderKLLTX2Video,
        "audio_vae": AutoencoderKLLTX2Audio,
        "vocoder": LTX2VocoderWithBWE if has_bwe else LTX2Vocoder,
    }
    with torch.device("meta"):
        return {name: cls.from_config(checkpoint.config(name)) for name, cls in classes.items()}


def our_modules(checkpoint: Checkpoint) -> dict[str, torch.nn.Module]:
    """raydiff's own modules, built from the same configs."""
    config = checkpoint.config
    with torch.device("meta"):
        has_bwe = config("vocoder")["_class_name"] == "LTX2VocoderWithBWE"
        return {
            "connectors": LTX2Connectors(LTX2ConnectorsConfig.from_dict(config("connectors"))),
            "transformer": LTX2Transformer(LTX2TransformerConfig.from_dict(config("transformer"))),
            "vae": LTX2VideoVAE(LTX2VideoVAEConfig.from_dict(config("vae"))),
            "audio_vae": AudioVAE(AudioVAEConfig.from_dict(config("audio_vae"))),
            "vocoder": VocoderWithBWE(VocoderWithBWEConfig.from_dict(config("vocoder")))
            if has_bwe
            else Vocoder(VocoderConfig.from_dict(config("vocoder"))),
        }


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("version", VERSIONS)
def test_full_size_files_have_the_published_tensors(tmp_path: Path, version: str) -> None:
    file = tmp_path / "full.safetensors"
    config = CONFIGS[version]
    write_header_only(file, ltx2_shapes(config), metadata(config, version))
    checkpoint = open_checkpoint(file)
    assert checkpoint.family == "ltx2"
    references, counted = reference_modules(checkpoint), {}
    for name, module in our_modules(checkpoint).items():
        tensors = checkpoint.tensors(name)
        found = {key: source.shape for key, source in tensors.items()}
        assert found == shapes_of(module)
        assert found == shapes_of(references[name])
        counted[name] = (len(tensors), sum(math.prod(shape) for shape in found.values()))
    assert counted == FULL_SIZE[version]
    assert {name.rpartition(".")[2] for name in checkpoint.skipped} == {
        "channel",
        "mean-of-stds",
        "mean-of-stds_over_std-of-means",
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_our_modules_are_filled_from_single_files(tmp_path: Path, version: str) -> None:
    path = tmp_path / "small.safetensors"
    write_small(path, version)
    checkpoint = open_checkpoint(path)
    for name, module in our_modules(checkpoint).items():
        load_weights(module, checkpoint, name, device="cpu", dtype=torch.bfloat16)
        tensors = [*module.parameters(), *module.buffers()]
        assert all(tensor.dtype == torch.bfloat16 for tensor in tensors)
        assert not any(tensor.is_meta for tensor in tensors)


def test_tensors_equal_those_of_diffusers_converters(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    file = write_small(path, "2.0")
    checkpoint = open_checkpoint(path)
    converters = {
        "transformer": ("model.diffusion_model.", convert_ltx2_transformer_to_diffusers),
        "vae": ("vae.", convert_ltx2_vae_to_diffusers),
        "audio_vae": ("audio_vae.", convert_ltx2_audio_vae_to_diffusers),
    }
    for component, (prefix, convert) in converters.items():
        theirs = convert({name: t for name, t in file.items() if name.startswith(prefix)})
        module = meta_module({name: tuple(tensor.shape) for name, tensor in theirs.items()})
        load_weights(module, checkpoint, component, device="cpu", dtype=torch.float32)
        loaded = module.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in theirs.items())


def test_names_that_only_2_3_has_keep_their_values(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    file = write_small(path, "2.3")
    checkpoint = open_checkpoint(path)
    pairs = {
        "transformer": {
            "prompt_adaln.linear.weight": "model.diffusion_model.prompt_adaln_single.linear.weight",
            "transformer_blocks.1.audio_to_video_attn.to_gate_logits.bias": (
                "model.diffusion_model.transformer_blocks.1.audio_to_video_attn.to_gate_logits.bias"
            ),
            "transformer_blocks.0.audio_a2v_cross_attn_scale_shift_table": (
                "model.diffusion_model.transformer_blocks.0.scale_shift_table_a2v_ca_audio"
            ),
        },
        "connectors": {
            "audio_text_proj_in.bias": "text_embedding_projection.audio_aggregate_embed.bias",
            "audio_connector.transformer_blocks.0.attn1.norm_k.weight": (
                "model.diffusion_model.audio_embeddings_connector.transformer_1d_blocks.0"
                ".attn1.k_norm.weight"
            ),
        },
        "vae": {
            "decoder.up_blocks.3.upsamplers.0.conv.conv.bias": (
                "vae.decoder.up_blocks.7.conv.conv.bias"
            ),
            "decoder.up_blocks.3.resnets.1.conv2.conv.bias": (
                "vae.decoder.up_blocks.8.res_blocks.1.conv2.conv.bias"
            ),
        },
        "vocoder": {
            "bwe_generator.resnets.2.acts1.1.downsample.filter": (
                "vocoder.bwe_generator.resblocks.2.acts1.1.downsample.lowpass.filter"
            ),
            "vocoder.act_out.downsample.filter": (
                "vocoder.vocoder.act_post.downsample.lowpass.filter"
            ),
            "vocoder.conv_in.bias": "vocoder.vocoder.conv_pre.bias",
        },
    }
    modules = our_modules(checkpoint)
    for component, names in pairs.items():
        module = modules[component]
        load_weights(module, checkpoint, component, device="cpu", dtype=torch.float32)
        loaded = module.state_dict()
        for ours, theirs in names.items():
            assert torch.equal(loaded[ours], file[theirs])


@pytest.mark.parametrize("version", VERSIONS)
def test_options_that_no_shape_shows_come_from_the_metadata(tmp_path: Path, version: str) -> None:
    path = tmp_path / "small.safetensors"
    config = small_config(version)
    config["transformer"] |= {
        "av_ca_timestep_scale_multiplier": 250.0,
        "positional_embedding_max_pos": [15, 1024, 512],
        "positional_embedding_theta": 5000.0,
        "connector_positional_embedding_max_pos": [64],
    }
    config["audio_vae"]["preprocessing"]["stft"]["hop_length"] = 128
    write_header_only(path, ltx2_shapes(config), metadata(config, version))
    checkpoint = open_checkpoint(path)
    transformer = LTX2TransformerConfig.from_dict(checkpoint.config("transformer"))
    assert transformer.cross_timestep_scale_multiplier == 250
    assert transformer.has_double_precision_rope
    assert (transformer.max_seconds, transformer.base_height, transformer.base_width) == (
        15,
        1024,
        512,
    )
    assert transformer.rope_theta == 5000
    assert transformer.audio_hop_length == 128
    connectors = LTX2ConnectorsConfig.from_dict(checkpoint.config("connectors"))
    assert connectors.rope_base_length == 64
    assert connectors.num_hidden_states == 49
    assert connectors.has_projection_for_each == (version == "2.3")
    vae = LTX2VideoVAEConfig.from_dict(checkpoint.config("vae"))
    assert vae.decoder_spatial_padding_mode == ("zeros" if version == "2.3" else "reflect")
    assert checkpoint.config("scheduler")["shift_terminal"] == 0.1


def test_a_file_without_its_config_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    write_header_only(path, ltx2_shapes(small_config("2.0")))
    with pytest.raises(ModelError, match="its metadata has no `config`"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("transformer", {"share_ff": True}, "share_ff of the transformer is True; raydiff runs F"),
        ("transformer", {"num_attention_heads": None}, "'transformer' .*lacks"),
        ("vae", {"_class_name": "CausalDiffusionVAE"}, "video decoder is a CausalDiffusionVAE"),
        ("vae", {"decoder_blocks": [["attn", {}]]}, "'vae' .*lacks 'attn'"),
        ("audio_vae", {"model": {}}, "'audio_vae' .*lacks 'params'"),
    ],
)
def test_configs_that_cannot_be_run_are_named(
    tmp_path: Path, section: str, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "small.safetensors"
    config = small_config("2.0")
    shapes = ltx2_shapes(config)
    config[section] |= changes
    write_header_only(path, shapes, metadata(config, "2.0"))
    with pytest.raises(ModelError, match=message):
        open_checkpoint(path)


def test_unknown_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    config = small_config("2.0")
    extra = {"model.diffusion_model.transformer_blocks.0.attn3.to_q.weight": (4, 4)}
    write_header_only(path, ltx2_shapes(config) | extra, metadata(config, "2.0"))
    with pytest.raises(ModelError, match=r"1 tensors are in no table of ltx2: .*attn3"):
        open_checkpoint(path)


def test_the_text_encoder_and_the_upsampler_stand_beside(tmp_path: Path) -> None:
    path = tmp_path / "ltx-2-19b-dev.safetensors"
    write_small(path, "2.0")
    assert "text_encoder" not in open_checkpoint(path).components
    gemma = Gemma3ForCausalLM(small_gemma())
    gemma.save_pretrained(tmp_path / "text_encoder", max_shard_size="20KB")
    assert (tmp_path / "text_encoder" / "model.safetensors.index.json").is_file()
    upsampler = LTX2LatentUpsamplerModel(16, mid_channels=32, num_blocks_per_stage=1)
    save_file(upsampler.state_dict(), tmp_path / "ltx-2-spatial-upscaler-x2-1.0.safetensors")
    other = LTX2LatentUpsamplerModel(8, mid_channels=32, use_rational_resampler=False)
    save_file(other.state_dict(), tmp_path / "ltx-2.3-spatial-upscaler-x2-1.1.safetensors")
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        encoder = Gemma3TextEncoder(Gemma3Config.from_dict(checkpoint.config("text_encoder")))
        ours = LTX2Upsampler(LTX2UpsamplerConfig.from_dict(checkpoint.config("latent_upsampler")))
    load_weights(encoder, checkpoint, "text_encoder", device="cpu", dtype=torch.float32)
    load_weights(ours, checkpoint, "latent_upsampler", device="cpu", dtype=torch.float32)
    for name, tensor in gemma.model.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor)
    for name, tensor in upsampler.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
    with pytest.raises(ModelError, match=r"tokenizer: no such folder; put Gemma 3's there"):
        checkpoint.tokenizer_folder("text_encoder")
    (tmp_path / "tokenizer").mkdir()
    assert checkpoint.tokenizer_folder("text_encoder") == tmp_path / "tokenizer"


@pytest.mark.parametrize("kind", ["spatial", "temporal", "both"])
def test_an_upsamplers_config_is_read_from_its_shapes(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "ltx-2.3-22b-dev.safetensors"
    write_small(path, "2.3")
    options = {
        "spatial_upsample": kind != "temporal",
        "temporal_upsample": kind != "spatial",
        "use_rational_resampler": False,
    }
    upsampler = LTX2LatentUpsamplerModel(16, mid_channels=32, num_blocks_per_stage=2, **options)
    save_file(upsampler.state_dict(), tmp_path / "ltx-2.3-spatial-upscaler-x2-1.0.safetensors")
    config = open_checkpoint(path).config("latent_upsampler")
    with torch.device("meta"):
        ours = LTX2Upsampler(LTX2UpsamplerConfig.from_dict(config))
    assert shapes_of(ours) == shapes_of(upsampler)
    assert {name: config[name] for name in options} == options


def test_two_upsamplers_beside_a_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ltx-2-19b-dev.safetensors"
    write_small(path, "2.0")
    for number in (0, 1):
        name = f"ltx-2-spatial-upscaler-x2-1.{number}.safetensors"
        write_random(tmp_path / name, {"initial_conv.weight": (2, 2, 3, 3, 3)})
    with pytest.raises(ModelError, match="2 upsamplers stand beside"):
        open_checkpoint(path)


def test_another_file_in_the_upsamplers_place_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ltx-2-19b-dev.safetensors"
    write_small(path, "2.0")
    write_random(tmp_path / "ltx-2-spatial-upscaler-x2-1.0.safetensors", {"weight": (2, 2)})
    with pytest.raises(ModelError, match="not a latent upsampler"):
        open_checkpoint(path)


def test_inspect_lists_the_components(tmp_path: Path) -> None:
    path = tmp_path / "full.safetensors"
    config = CONFIGS["2.3"]
    write_header_only(path, ltx2_shapes(config), metadata(config, "2.3"))
    report = inspect_path(path)
    assert (report.layout, report.family) == ("single file", "ltx2")
    counted = {part.name: (part.num_tensors, part.num_parameters) for part in report.components}
    assert counted == FULL_SIZE["2.3"]


@pytest.mark.parametrize(("version", "steps", "stg_block"), [("2.0", 40, 29), ("2.3", 30, 28)])
def test_what_a_run_must_know_of_it(
    tmp_path: Path, version: str, steps: int, stg_block: int
) -> None:
    path = tmp_path / "ltx-2-19b-dev.safetensors"
    write_header_only(path, ltx2_shapes(CONFIGS[version]), metadata(CONFIGS[version], version))
    info = resolve_model(str(path))
    assert (info.family, info.tasks, info.samplers) == ("ltx2", ("txt2vid", "img2vid"), ("euler",))
    assert (info.default_height, info.default_width, info.size_multiple) == (512, 768, 32)
    assert (info.default_num_inference_steps, info.default_guidance_scale) == (steps, 3.0)
    assert info.default_sampler == "euler"
    assert info.video == VideoModel(
        num_layers=48,
        default_stg_block=stg_block,
        spatial_downscale=32,
        temporal_downscale=8,
        has_upsampler=False,
    )
    assert info.num_parameters == {
        name: num_parameters for name, (_, num_parameters) in FULL_SIZE[version].items()
    }
    write_small(path, version)
    small, vae = resolve_model(str(path)), open_checkpoint(path).config("vae")
    assert small.video is not None
    assert small.video.default_stg_block == small.video.num_layers - 1
    config = LTX2VideoVAEConfig.from_dict(vae)
    assert small.video.spatial_downscale == small.size_multiple == config.spatial_downscale
    assert small.video.temporal_downscale == config.temporal_downscale


def test_its_revision_sees_what_stands_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "ltx-2-19b-dev.safetensors"
    write_small(path, "2.0")
    alone = resolve_model(str(path)).revision
    torch.manual_seed(0)
    folder = tmp_path / "text_encoder"
    Gemma3ForCausalLM(small_gemma()).save_pretrained(folder)
    (tmp_path / "tokenizer").mkdir()
    revisions = {alone, resolve_model(str(path)).revision}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    revisions.add(resolve_model(str(path)).revision)
    assert len(revisions) == 3


def small_gemma() -> Gemma3TextConfig:
    return Gemma3TextConfig(
        vocab_size=40,
        hidden_size=20,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )


def test_gemma_names_of_every_publisher_are_ours(tmp_path: Path) -> None:
    gemma = Gemma3ForCausalLM(small_gemma()).model.state_dict()
    path = tmp_path / "ltx-2-19b-dev.safetensors"
    write_small(path, "2.0")
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(small_gemma().to_dict()))
    expected = set(gemma)
    for prefix in ("", "model.", "language_model.model.", "model.language_model."):
        extra = {
            f"{'model.' if prefix == 'model.language_model.' else ''}{name}": torch.zeros(2)
            for name in (
                "vision_tower.vision_model.embeddings.patch_embedding.bias",
                "multi_modal_projector.mm_input_projection_weight",
            )
        }
        head = "language_model.lm_head.weight" if "language" in prefix else "lm_head.weight"
        tensors = {f"{prefix}{name}": tensor for name, tensor in gemma.items()}
        save_file(tensors | extra | {head: torch.zeros(2)}, folder / "model.safetensors")
        checkpoint = open_checkpoint(path)
        assert set(checkpoint.tensors("text_encoder")) == expected
        assert len([name for name in checkpoint.skipped if name.startswith("text_encoder.")]) == 3
