"""How fast one GPU makes clips: a full-size LTX-2 with random weights, from prompts to MP4 files, a
stage at a time, beside diffusers on the same weights in the same run. No checkpoint is needed, and
for the tiny network no GPU.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from raydiff.bench.random_modules import random_module
from raydiff.bench.timing import ForwardTimer, clean_gpu, timed
from raydiff.bench.video_job import Quality, Sampling, Scene, VideoBench, video_bench
from raydiff.bench.video_peer import bench_diffusers
from raydiff.config import OutputConfig
from raydiff.diffusion.flow_match import FlowMatchConfig
from raydiff.errors import ConfigError
from raydiff.gemma_tokenizer import GemmaTokenizer, write_tiny_gemma_tokenizer
from raydiff.memory.profiles import load_profile
from raydiff.models.ltx2.audio_vae import AudioVAEConfig
from raydiff.models.ltx2.transformer import MAX_COMPILED, LTX2Transformer, LTX2Velocity
from raydiff.models.ltx2.transformer_config import LTX2TransformerConfig
from raydiff.output.rendered import Rendered
from raydiff.output.video.writer import VideoWriter
from raydiff.output.writer import clip_of
from raydiff.pipelines.base import ATTENTION_BACKENDS
from raydiff.pipelines.ltx2.components import LTX2Components
from raydiff.pipelines.ltx2.load import prepare
from raydiff.pipelines.ltx2.modules import BUILDERS
from raydiff.pipelines.ltx2.pipeline import LTX2Pipeline
from raydiff.pipelines.quantize import quantize_blocks
from raydiff.pipelines.tiny_ltx2 import random_weight
from raydiff.request import RenderRequest, num_evaluations
from raydiff.weights.published_ltx2 import SCHEDULER

NUM_FORWARDS = 5
"""Forward passes whose median is a transformer's time."""


def bench_video(
    scene: Scene, samplings: Sequence[Sampling], *, has_peer: bool
) -> Iterator[VideoBench]:
    """Measure diffusers, if `has_peer` and it is installed, then raydiff; one result at a time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not scene.is_tiny:
        raise ConfigError(
            "bench video measures a GPU, and torch sees none; run `raydiff doctor`, or add --tiny"
        )
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = MAX_COMPILED  # the peer's too
    modules = random_modules(scene, device)
    flops = forward_flops(scene)
    if has_peer and find_spec("diffusers") is not None:
        yield from bench_diffusers(scene, samplings, modules, flops, device)
    with clean_gpu(), tempfile.TemporaryDirectory(prefix="raydiff-bench-") as folder:
        pipeline = _pipeline(scene, modules, device, Path(folder))
        modules.clear()  # Fused layers have taken the place of some.
        quality = _quantize(scene, pipeline) if scene.dtype == "fp8" else None
        writer = VideoWriter(folder, OutputConfig())
        for sampling in samplings:
            yield _measure(scene, sampling, pipeline, writer, flops, quality)


def random_modules(scene: Scene, device: torch.device) -> dict[str, nn.Module]:
    """Return all components in bfloat16, the vocoder in float32, their weights drawn on the
    device."""
    modules = {}
    for name, config in scene.configs.items():
        dtype = torch.float32 if name == "vocoder" else torch.bfloat16
        modules[name] = random_module(BUILDERS[name], config, dtype, device)
        for buffer_name, buffer in modules[name].named_buffers():
            buffer.copy_(random_weight(buffer_name, buffer.cpu().float()))
    return modules


def forward_flops(scene: Scene) -> int:
    """Count the operations of one forward pass of one clip, on the meta device."""
    config = LTX2TransformerConfig.from_dict(scene.configs["transformer"])
    with torch.device("meta"):
        transformer = LTX2Transformer(config)
        counter = FlopCounterMode(display=False)
        one = replace(scene, batch_size=1)
        inputs = ForwardInputs(one, transformer, torch.device("meta"), torch.float32)
        with counter, sdpa_kernel(SDPBackend.MATH):
            inputs.run(transformer)
    return int(counter.get_total_flops())


class ForwardInputs:
    """What one forward pass of a batch of clips takes, of random numbers."""

    def __init__(
        self, scene: Scene, transformer: LTX2Transformer, device: torch.device, dtype: torch.dtype
    ) -> None:
        config, size = transformer.config, scene.latent_size
        num_rows, num_tokens = scene.batch_size, size.num_frames * size.height * size.width

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype)

        self._video = random(num_rows, num_tokens, config.in_channels)
        self._audio = random(num_rows, scene.num_audio_tokens, config.audio_in_channels)
        self._sigmas = torch.full((num_rows,), 0.7, device=device)
        with torch.inference_mode():
            self._context = transformer.precompute_context(
                random(num_rows, scene.max_tokens, config.caption_channels or config.dim),
                random(num_rows, scene.max_tokens, config.caption_channels or config.audio_dim),
                latent_size=size,
                num_audio_tokens=scene.num_audio_tokens,
                frame_rates=[scene.frame_rate] * num_rows,
            )

    @torch.inference_mode()
    def run(self, transformer: LTX2Transformer) -> LTX2Velocity:
        """Return the velocities that the transformer predicts."""
        velocity: LTX2Velocity = transformer(
            self._video, self._audio, self._context, sigmas=self._sigmas
        )
        return velocity

    def seconds(self, transformer: LTX2Transformer) -> float:
        """Return the median time of a pass, after one that compiles."""
        self.run(transformer)
        return median(timed(self.run, transformer)[0] for _ in range(NUM_FORWARDS))


def _pipeline(
    scene: Scene, modules: dict[str, nn.Module], device: torch.device, folder: Path
) -> LTX2Pipeline:
    write_tiny_gemma_tokenizer(folder / "tokenizer", max_length=scene.max_tokens)
    parts: dict[str, Any] = dict(modules)
    components = LTX2Components(
        **parts,
        refine_transformer=None,
        tokenizer=GemmaTokenizer.from_folder(folder / "tokenizer"),
        audio_config=AudioVAEConfig.from_dict(scene.configs["audio_vae"]),
        schedule=FlowMatchConfig.from_dict(SCHEDULER),
        num_text_embeds=scene.max_tokens,
    )
    profile = load_profile("full_gpu" if device.type == "cuda" else "cpu_only")
    prepare(components, profile)
    return LTX2Pipeline(
        info=scene.info,
        components=components,
        profile=profile,
        dtype=torch.bfloat16,
        is_compiled=scene.is_compiled,
    )


def _quantize(scene: Scene, pipeline: LTX2Pipeline) -> Quality:
    """Put the transformer into fp8, and compare one forward pass before and after."""
    transformer = pipeline.parts.needed(pipeline.parts.transformer, "denoise")
    with sdpa_kernel(ATTENTION_BACKENDS, set_priority=True):
        inputs = ForwardInputs(scene, transformer, pipeline.device, pipeline.dtype)
        seconds, expected = inputs.seconds(transformer), inputs.run(transformer)
        quantize_blocks(transformer)
        torch.compiler.reset()
        fp8_seconds, rough = inputs.seconds(transformer), inputs.run(transformer)
    errors = [
        float((ours.float() - own.float()).norm() / own.float().norm())
        for ours, own in zip(rough, expected, strict=True)
    ]
    return Quality(error=max(errors), speed_up=seconds / fp8_seconds)


def _measure(
    scene: Scene,
    sampling: Sampling,
    pipeline: LTX2Pipeline,
    writer: VideoWriter,
    flops: int,
    quality: Quality | None,
) -> VideoBench:
    transformer = pipeline.parts.needed(pipeline.parts.transformer, "denoise")
    short = Sampling(num_steps=2, guidance=sampling.guidance)
    warm_up_s, _ = timed(pipeline.render, short.requests(scene, 0))
    timer = ForwardTimer(transformer, lambda arguments, _: len(arguments[0]))
    rendered, write_s = [], []
    for batch in range(1, scene.num_batches + 1):
        requests = sampling.requests(scene, batch)
        with timer.running():
            clips = pipeline.render(requests)
        if any(clips.errors):
            raise RuntimeError(f"random weights gave no clip: {clips.errors}")
        rendered.append(clips)
        write_s.append(timed(_write, writer, requests, clips)[0])
    return video_bench(
        scene,
        sampling,
        renderer="raydiff",
        nfe=num_evaluations(requests[0]),
        encode_s=median(clips.encode_s for clips in rendered),
        denoise_s=median(clips.denoise_s for clips in rendered),
        decode_s=median(clips.decode_s for clips in rendered),
        write_s=median(write_s),
        timer=timer,
        flops=flops,
        warm_up_s=warm_up_s,
        quality=quality,
    )


def _write(writer: VideoWriter, requests: Sequence[RenderRequest], clips: Rendered) -> None:
    for request, frames, sound in zip(requests, clips.pixels, clips.audio, strict=True):
        if request.video is not None:
            writer.save(clip_of(request, request.video, sound, {}), [frames])
