"""The real renderer with tiny pipelines, in this process: stages, profiles, kept embeddings."""

import pickle
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raydiff.config import MemoryConfig, ModelConfig
from raydiff.engine.messages import Role, TextKey, texts_of
from raydiff.engine.renderers import PipelineRenderer
from raydiff.errors import ModelError
from raydiff.request import ModelInfo, RenderRequest, with_request_id
from raydiff.weights.resolve import resolve_model
from tests.weights.packaged import package_in


def request(info: ModelInfo, seed: int, **values: object) -> RenderRequest:
    fields = {
        "model": info.name,
        "model_revision": info.revision,
        "task": "txt2img",
        "prompt": "a lighthouse " * (1 + 40 * seed),
        "negative_prompt": None,
        "seed": seed,
        "height": 64,
        "width": 64,
        "num_inference_steps": 1,
        "guidance_scale": 2.0,
        "guidance_rescale": 0.0,
        "sampler": "ddim",
    }
    return with_request_id(RenderRequest(**{**fields, **values}))  # type: ignore[arg-type]


@pytest.fixture
def renderer(tiny_sd21: Path) -> PipelineRenderer:
    memory = MemoryConfig(profile="cpu_only")
    info = resolve_model(str(tiny_sd21))
    return PipelineRenderer(model=ModelConfig(name=info.name), memory=memory, preload=info)


def test_rows_are_rendered_and_described(renderer: PipelineRenderer, tiny_sd21: Path) -> None:
    renderer.start()
    info = resolve_model(str(tiny_sd21))
    requests = [request(info, seed) for seed in range(2)]
    assert renderer.max_batch_size(requests[0]) >= 1
    rendered = renderer.render(requests)
    assert [image.shape for image in rendered.pixels] == [(64, 64, 3)] * 2
    assert all(image.dtype == np.uint8 for image in rendered.pixels)
    assert not np.array_equal(rendered.pixels[0], rendered.pixels[1])
    assert (rendered.profile, rendered.dtype) == ("cpu_only", "float32")
    assert rendered.warnings[0] is None
    assert rendered.warnings[1] is not None
    assert rendered.denoise_s > 0
    assert rendered.peak_vram_bytes is None


def test_another_model_takes_the_place_of_the_last(
    renderer: PipelineRenderer, tiny_sd21: Path, tiny_sdxl: Path
) -> None:
    renderer.start()
    small, large = resolve_model(str(tiny_sd21)), resolve_model(str(tiny_sdxl))
    before = renderer.render([request(small, 0)]).pixels[0]
    assert renderer.render([request(large, 0)]).pixels[0].shape == (64, 64, 3)
    after = renderer.render([request(small, 0)]).pixels[0]
    assert np.array_equal(before, after)


def test_a_checkpoint_that_changed_is_refused(renderer: PipelineRenderer, tiny_sdxl: Path) -> None:
    info = resolve_model(str(tiny_sdxl))
    changed = request(info, 0, model_revision="local-of-yesterday")
    for _ in range(2):
        with pytest.raises(ModelError, match="files changed during the run"):
            renderer.render([changed])


def test_a_packaged_checkpoint_is_found_where_another_nodes_package_lies(
    tiny_sd21: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = package_in(tmp_path / "there" / "raydiff", monkeypatch)
    shutil.copytree(tiny_sd21, package / "mini" / "weights" / "mini-sd21")
    info = resolve_model("mini-sd21")
    here = package_in(package.rename(tmp_path / "raydiff"), monkeypatch)
    assert not Path(info.path).exists()

    def made(**arguments: Any) -> PipelineRenderer:
        memory = MemoryConfig(profile="cpu_only")
        return PipelineRenderer(model=ModelConfig(name=info.name), memory=memory, **arguments)

    preloaded, later = made(preload=info), made()
    preloaded.start()
    later.start()
    pixels = [one.render([request(info, 0)]).pixels[0] for one in (preloaded, later)]
    assert np.array_equal(*pixels)
    config = here / "mini" / "weights" / "mini-sd21" / "unet" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(ModelError, match="mini-sd21: its files changed during the run"):
        made(preload=info).start()


def test_a_snapshot_with_other_stages_weights_is_completed_first(
    tiny_sd21: Path, tmp_path: Path
) -> None:
    snapshot = tmp_path / "snapshot"
    shutil.copytree(tiny_sd21, snapshot, ignore=shutil.ignore_patterns("diffusion_pytorch_model*"))
    info = replace(
        resolve_model(str(tiny_sd21)), name="org/model", path=str(snapshot), revision="0" * 40
    )

    def start(role: Role) -> PipelineRenderer:
        memory = MemoryConfig(profile="cpu_only")
        made = PipelineRenderer(
            model=ModelConfig(name=info.name), memory=memory, preload=info, role=role
        )
        made.start()
        return made

    encoded = start("encode").encode([TextKey(info.name, info.revision, "a lighthouse")])
    assert len(encoded.embeds) == 1
    with pytest.raises(ModelError, match="org/model: not in the Hub's cache"):
        start("denoise")


# -- stages ----------------------------------------------------------------------------------------


def of_role(folder: Path, role: Role, **arguments: object) -> PipelineRenderer:
    """Return a renderer of the role, with its model loaded."""
    info = resolve_model(str(folder))
    made = PipelineRenderer(
        model=ModelConfig(name=info.name),
        memory=MemoryConfig(profile="cpu_only"),
        preload=info,
        role=role,
        **arguments,  # type: ignore[arg-type]
    )
    made.start()
    return made


def sent(value: Any) -> Any:
    """Return what arrives at another worker."""
    return pickle.loads(pickle.dumps(value))


def mixed(folder: Path, tmp_path: Path) -> list[RenderRequest]:
    """Return rows with and without guidance, negative prompts and an init image."""
    info = resolve_model(str(folder))
    pixels = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "init.png")
    image = {"task": "img2img", "init_image": str(tmp_path / "init.png"), "strength": 0.6}
    return [
        request(info, 0, num_inference_steps=3),
        request(info, 1, num_inference_steps=2, guidance_scale=1.0),
        request(info, 2, num_inference_steps=4, negative_prompt="blurry", sampler="dpmpp_2m"),
        request(info, 3, num_inference_steps=4, negative_prompt="", **image),
    ]


def all_texts(requests: Sequence[RenderRequest]) -> list[TextKey]:
    return list(dict.fromkeys(text for one in requests for text in texts_of(one)))


@pytest.mark.parametrize("family", ["tiny_sd21", "tiny_sdxl"])
def test_split_and_fused_are_equal_byte_for_byte(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    rows = mixed(folder, tmp_path)
    fused = of_role(folder, "fused").render(rows)
    texts = all_texts(rows)
    encoded = of_role(folder, "encode").encode(texts[::-1])
    embeds = sent(dict(zip(texts[::-1], encoded.embeds, strict=True)))
    assert encoded.num_from_disk == 0
    two = of_role(folder, "denoise_decode").render_encoded(rows, embeds)
    denoised = of_role(folder, "denoise").denoise(rows, embeds)
    three = of_role(folder, "decode").decode(rows, sent(denoised.latents))
    for other in (two, three):
        assert other.errors == fused.errors == (None,) * 4
        for ours, theirs in zip(fused.pixels, other.pixels, strict=True):
            assert np.array_equal(ours, theirs)
    assert two.warnings == denoised.warnings == fused.warnings
    assert fused.warnings[1] is not None
    assert (denoised.profile, denoised.dtype, denoised.peak_vram_bytes) == (
        "cpu_only", "float32", None,
    )  # fmt: skip
    assert [one.nbytes for one in denoised.latents] == [4 * 8 * 8 * 4] * 4
    assert three.denoise_s == 0 < denoised.denoise_s
    assert three.decode_s > 0


# -- kept embeddings -------------------------------------------------------------------------------


@pytest.fixture
def texts(tiny_sdxl: Path) -> list[TextKey]:
    info = resolve_model(str(tiny_sdxl))
    return [TextKey(info.name, info.revision, text) for text in ("a cat", "", "red " * 100)]


def is_equal(left: Any, right: Any) -> bool:
    return bool(
        (left.embeds == right.embeds).all()
        and (left.pooled == right.pooled).all()
        and left.embeds.dtype == right.embeds.dtype
        and left.is_truncated == right.is_truncated
    )


def test_kept_embeddings_are_read_by_a_later_run(
    tiny_sdxl: Path, tmp_path: Path, texts: list[TextKey]
) -> None:
    fresh = of_role(tiny_sdxl, "encode", embeds_in=str(tmp_path)).encode(texts[:2])
    assert (fresh.num_from_disk, fresh.warning) == (0, None)
    files = sorted(tmp_path.rglob("*.*"))
    assert len(files) == 2
    assert all(file.parent == tmp_path / "embeds" / file.name[:2] for file in files)
    assert all(file.suffix == ".safetensors" for file in files)
    later = of_role(tiny_sdxl, "encode", embeds_in=str(tmp_path)).encode(texts)
    assert later.num_from_disk == 2
    assert all(map(is_equal, fresh.embeds, later.embeds))
    assert later.embeds[2].is_truncated  # type: ignore[attr-defined]
    again = of_role(tiny_sdxl, "encode", embeds_in=str(tmp_path)).encode(texts[::-1])
    assert again.num_from_disk == 3
    assert all(map(is_equal, again.embeds, later.embeds[::-1]))


def test_embeddings_of_another_dtype_or_revision_are_not_taken(
    tiny_sdxl: Path, tmp_path: Path, texts: list[TextKey]
) -> None:
    of_role(tiny_sdxl, "encode", embeds_in=str(tmp_path)).encode(texts[:1])
    info = resolve_model(str(tiny_sdxl))
    rough = PipelineRenderer(
        model=ModelConfig(name=info.name, dtype="bfloat16"),
        memory=MemoryConfig(),
        preload=info,
        embeds_in=str(tmp_path),
        role="encode",
    )
    assert rough.encode(texts[:1]).num_from_disk == 0
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_damaged_embeddings_are_encoded_again(
    tiny_sdxl: Path, tmp_path: Path, texts: list[TextKey]
) -> None:
    renderer = of_role(tiny_sdxl, "encode", embeds_in=str(tmp_path))
    whole = renderer.encode(texts)
    first, second, third = sorted(tmp_path.rglob("*.safetensors"))
    rng = random.Random(4)
    for _ in range(20):
        first.write_bytes(first.read_bytes()[: rng.randrange(first.stat().st_size)])
        flipped = bytearray(second.read_bytes())
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        second.write_bytes(flipped)
        third.write_bytes(second.read_bytes())  # another text's
        again = renderer.encode(texts)
        assert again.num_from_disk == 0
        assert all(map(is_equal, whole.embeds, again.embeds))
    assert renderer.encode(texts).num_from_disk == 3


def test_a_disk_that_keeps_nothing_is_told_once(
    tiny_sdxl: Path, tmp_path: Path, texts: list[TextKey]
) -> None:
    (tmp_path / "embeds").write_text("in the way")
    renderer = of_role(tiny_sdxl, "encode", embeds_in=str(tmp_path))
    first, second = renderer.encode(texts), renderer.encode(texts)
    assert first.warning is not None
    assert first.warning.startswith("encoded prompts are not kept any more: ")
    assert str(tmp_path / "embeds") in first.warning
    assert second.warning is None
    assert all(map(is_equal, first.embeds, second.embeds))


def test_only_encode_workers_keep_embeddings(tiny_sd21: Path, tmp_path: Path) -> None:
    rows = [request(resolve_model(str(tiny_sd21)), 0)]
    of_role(tiny_sd21, "fused", embeds_in=str(tmp_path)).render(rows)
    assert list(tmp_path.iterdir()) == []


# -- memory profiles -------------------------------------------------------------------------------


def test_profiles_step_down_to_the_poorest_and_back(tiny_sdxl: Path) -> None:
    """The GPU profiles' policies, with every component on the CPU."""
    info = resolve_model(str(tiny_sdxl))
    devices = {"text_encoder": "cpu", "unet": "cpu", "vae": "cpu"}
    memory = MemoryConfig.model_validate({"profile": "full_gpu", "devices": devices})
    renderer = PipelineRenderer(model=ModelConfig(name=info.name), memory=memory, preload=info)
    renderer.start()
    row = request(info, 0)
    first = renderer.render([row])
    assert first.profile == "full_gpu"
    for poorer in ("balanced", "gpu_poor", "extreme"):
        said = renderer.step_down()
        assert said is not None
        assert said.endswith(f"it goes on with {poorer}")
        rendered = renderer.render([row])
        assert rendered.profile == poorer
        assert np.abs(rendered.pixels[0].astype(int) - first.pixels[0]).max() <= 1
    assert renderer.step_down() is None
    assert renderer.render([row]).profile == "full_gpu"


def test_cpu_only_has_nothing_poorer(renderer: PipelineRenderer) -> None:
    renderer.start()
    assert renderer.step_down() is None
    assert renderer.render([request(renderer._pipeline.info, 0)]).profile == "cpu_only"  # type: ignore[union-attr]


def test_the_renderer_computes_with_the_threads_of_its_worker(
    tiny_sd21: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    try:
        PipelineRenderer(model=ModelConfig(name=str(tiny_sd21)), memory=MemoryConfig()).start()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
