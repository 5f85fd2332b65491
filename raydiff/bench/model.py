"""How fast one GPU renders: full-size models with random weights, eager and compiled, in stages,
beside diffusers with the same shapes in the same run. No checkpoint is needed."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from raydiff.bench.random_modules import random_module, randomise
from raydiff.bench.timing import clean_gpu, timed
from raydiff.config import MemoryConfig, ProfileName
from raydiff.diffusion.schedule import ScheduleConfig
from raydiff.errors import ConfigError
from raydiff.memory.gpus import visible_gpus
from raydiff.memory.profiles import resolve_profile
from raydiff.memory.residency import resting_device
from raydiff.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from raydiff.models.clip import CLIPTextConfig, CLIPTextEncoder
from raydiff.models.unet import UNet, UNetConfig
from raydiff.output.rendered import Rendered
from raydiff.pipelines.stable_diffusion import Components, StableDiffusionPipeline
from raydiff.pipelines.stable_diffusion_load import FAMILIES, prepare
from raydiff.request import ModelInfo, RenderRequest
from raydiff.tokenizer import CLIPTokenizer, write_tiny_tokenizer
from raydiff.weights.published import PUBLISHED

Mode = Literal["eager", "compiled"]

NATIVE_SIZE = {"sd21": 768, "sdxl": 1024}
PROMPT = "a photograph of a lighthouse on a cliff at dusk, batch {batch}, number {index}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelBench:
    """One measured way to render one batch; times are medians over the counted batches."""

    renderer: str
    """`raydiff` or `diffusers`."""
    family: str
    mode: Mode
    dtype: str
    batch_size: int
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    images_per_s: float
    encode_s: float | None
    denoise_s: float | None
    decode_s: float | None
    unet_tflop_per_s: float | None
    """Arithmetic of the UNet alone (2 per multiply-add) over the denoising time; diffusers' has
    its encoding in it."""
    peak_vram_bytes: int
    warm_up_s: float
    """First batch: compilation and autotuning included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every renderer is asked for."""

    family: str
    batch_size: int
    size: int
    num_inference_steps: int
    guidance_scale: float
    num_batches: int
    profile: ProfileName = "full_gpu"

    def prompts(self, batch: int) -> list[str]:
        """Return one prompt per image that no other batch has, so that each must be encoded."""
        return [PROMPT.format(batch=batch, index=index) for index in range(self.batch_size)]

    def requests(self, batch: int) -> list[RenderRequest]:
        """Return a batch as requests with seeds 0, 1, 2, ..."""
        return [
            RenderRequest(
                model=self.family,
                model_revision="random",
                task="txt2img",
                prompt=prompt,
                negative_prompt="",
                seed=seed,
                height=self.size,
                width=self.size,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                guidance_rescale=0.0,
                sampler="euler" if self.family == "sdxl" else "ddim",
            )
            for seed, prompt in enumerate(self.prompts(batch))
        ]


def bench_model(job: Job, modes: Sequence[Mode], *, has_peer: bool) -> Iterator[ModelBench]:
    """Measure raydiff, then diffusers if `has_peer`, in each mode; one result at a time."""
    if not torch.cuda.is_available():
        raise ConfigError("bench model measures a GPU, and torch sees none; run `raydiff doctor`")
    flops = unet_flops(job)
    for mode in modes:
        yield _bench_raydiff(job, mode, flops)
        if has_peer:
            yield _bench_diffusers(job, mode, flops)


def unet_flops(job: Job) -> int:
    """Count the operations of one UNet forward pass of one row, on the meta device."""
    config = UNetConfig.from_dict(PUBLISHED[job.family]["unet"])
    with torch.device("meta"):
        unet = UNet(config)
        sample = torch.empty(1, 4, job.size // 8, job.size // 8)
        timesteps = torch.empty(1)
        embeds = torch.empty(1, 77, config.cross_attention_dim)
        added: tuple[torch.Tensor, ...] = ()
        if job.family == "sdxl":
            added = (torch.empty(1, 1280), torch.empty(1, 6))
        counter = FlopCounterMode(display=False)
        with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            unet(sample, timesteps, unet.precompute_context(embeds, *added))
    return int(counter.get_total_flops())


def random_pipeline(
    family: str, profile_name: ProfileName, *, is_compiled: bool
) -> StableDiffusionPipeline:
    """Build a full-size pipeline in bfloat16, its weights drawn on the GPU."""
    published = PUBLISHED[family]
    torch.manual_seed(0)
    dtype = torch.bfloat16
    encoders = {
        name: random_module(CLIPTextEncoder, CLIPTextConfig.from_dict(config), dtype)
        for name, config in published.items()
        if name.startswith("text_encoder")
    }
    unet = random_module(UNet, UNetConfig.from_dict(published["unet"]), dtype)
    vae = random_module(AutoencoderKL, AutoencoderKLConfig.from_dict(published["vae"]), dtype)
    profile = resolve_profile(MemoryConfig(profile=profile_name), family, {}, visible_gpus()[0])
    for name, module in {**encoders, "unet": unet, "vae": vae}.items():
        module.to(resting_device(name, profile))
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_tokenizer(Path(folder), "!")
        tokenizer = CLIPTokenizer.from_folder(Path(folder))
    components = Components(
        unet=unet,
        vae=vae,
        text_encoders=encoders,
        tokenizers=dict.fromkeys(encoders, tokenizer),
        schedule=ScheduleConfig.from_dict(published["scheduler"]),
        has_zero_negative=False,
    )
    prepare(components, profile)
    return FAMILIES[family](
        info=_info(family),
        profile=profile,
        components=components,
        dtype=dtype,
        vae_dtype=dtype,
        is_compiled=is_compiled,
    )


def _info(family: str) -> ModelInfo:
    size = NATIVE_SIZE[family]
    return ModelInfo(
        name=family,
        family=family,
        path="",
        revision="random",
        tasks=("txt2img",),
        default_height=size,
        default_width=size,
        size_multiple=8,
        default_num_inference_steps=50,
        default_guidance_scale=7.5,
        default_strength=0.8,
        default_sampler="euler",
        num_parameters={},
    )


def _bench_raydiff(job: Job, mode: Mode, flops: int) -> ModelBench:
    with clean_gpu():
        pipeline = random_pipeline(job.family, job.profile, is_compiled=mode == "compiled")

        def render(batch: int) -> tuple[float, Rendered]:
            return timed(lambda: pipeline.render(job.requests(batch)))

        warm_up_s, _ = render(0)
        timed = [render(1 + batch) for batch in range(job.num_batches)]
        seconds = [elapsed_s for elapsed_s, _ in timed]
        rendered = [batch for _, batch in timed]
        denoise_s = median(batch.denoise_s for batch in rendered)
        return ModelBench(
            renderer="raydiff",
            mode=mode,
            images_per_s=job.batch_size / median(seconds),
            encode_s=median(batch.encode_s for batch in rendered),
            denoise_s=denoise_s,
            decode_s=median(batch.decode_s for batch in rendered),
            unet_tflop_per_s=_unet_tflops(job, flops, denoise_s),
            peak_vram_bytes=max(batch.peak_vram_bytes or 0 for batch in rendered),
            warm_up_s=warm_up_s,
            **_shape(job),
        )


def _bench_diffusers(job: Job, mode: Mode, flops: int) -> ModelBench:
    with clean_gpu():
        pipe = _diffusers_pipeline(job.family)
        if mode == "compiled":
            pipe.unet.to(memory_format=torch.channels_last)
            pipe.vae.to(memory_format=torch.channels_last)
            pipe.unet = torch.compile(pipe.unet, fullgraph=True, dynamic=False)
            pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True, dynamic=False)
        arguments = {
            "negative_prompt": [""] * job.batch_size,
            "height": job.size,
            "width": job.size,
            "num_inference_steps": job.num_inference_steps,
            "guidance_scale": job.guidance_scale,
        }

        def render(batch: int, output_type: str = "np") -> float:
            generators = [torch.Generator("cpu").manual_seed(i) for i in range(job.batch_size)]
            prompts = job.prompts(batch)
            elapsed_s, _ = timed(
                lambda: pipe(prompts, **arguments, generator=generators, output_type=output_type)
            )
            return elapsed_s

        warm_up_s = render(0)
        seconds = [render(1 + batch) for batch in range(job.num_batches)]
        latent_s = render(0, "latent")  # encode and denoise, without the VAE
        return ModelBench(
            renderer="diffusers",
            mode=mode,
            images_per_s=job.batch_size / median(seconds),
            encode_s=None,
            denoise_s=latent_s,
            decode_s=median(seconds) - latent_s,
            unet_tflop_per_s=_unet_tflops(job, flops, latent_s),
            peak_vram_bytes=torch.cuda.max_memory_reserved(),
            warm_up_s=warm_up_s,
            **_shape(job),
        )


def _diffusers_pipeline(family: str) -> Any:
    """Build the same pipeline from diffusers' classes and configs, random weights in bfloat16."""
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise ConfigError(f"the peer needs diffusers and transformers: {error}") from None
    published = PUBLISHED[family]
    parts: dict[str, Any] = {}
    with torch.device("meta"):
        for name, config in published.items():
            if name.startswith("text_encoder"):
                builder = getattr(transformers, config["architectures"][0])
                parts[name] = builder(transformers.CLIPTextConfig.from_dict(config))
        parts["unet"] = diffusers.UNet2DConditionModel.from_config(published["unet"])
        parts["vae"] = diffusers.AutoencoderKL.from_config(published["vae"])
    for name, module in parts.items():
        module = module.to(torch.bfloat16).to_empty(device="cuda").eval()
        randomise(module)
        for buffer_name, buffer in module.named_buffers():
            if buffer_name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1], device="cuda").expand(buffer.shape))
        parts[name] = module
    scheduler = getattr(diffusers, published["scheduler"]["_class_name"])
    parts["scheduler"] = scheduler.from_config(published["scheduler"])
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_tokenizer(Path(folder), "!")
        for name in [name for name in parts if name.startswith("text_encoder")]:
            tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, pad_token="!")
            parts[name.replace("text_encoder", "tokenizer")] = tokenizer
    if family == "sdxl":
        pipe = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipe = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unet_tflops(job: Job, flops: int, denoise_s: float) -> float:
    rows = job.batch_size * (2 if job.guidance_scale > 1 else 1)
    return flops * rows * job.num_inference_steps / denoise_s / 1e12


def _shape(job: Job) -> dict[str, Any]:
    return {
        "family": job.family,
        "dtype": "bfloat16",
        "batch_size": job.batch_size,
        "height": job.size,
        "width": job.size,
        "num_inference_steps": job.num_inference_steps,
        "guidance_scale": job.guidance_scale,
    }
