"""What `raydiff bench video` asks of every renderer, and what it tells of each."""

import tempfile
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal

from raydiff.bench.timing import ForwardTimer, peak_vram_bytes
from raydiff.gemma_tokenizer import write_tiny_gemma_tokenizer
from raydiff.manifest.video_rules import video_defaults
from raydiff.models.ltx2.audio_vae import AudioVAEConfig
from raydiff.models.ltx2.rope import LatentSize
from raydiff.models.ltx2.video_vae_config import LTX2VideoVAEConfig
from raydiff.pipelines.save_ltx2 import gemma_config
from raydiff.pipelines.tiny_ltx2 import CONFIGS, GEMMA, MAX_TOKENS
from raydiff.request import ModelInfo, RenderRequest, VideoModel, with_request_id
from raydiff.video_settings import NUM_DISTILLED_STEPS, VideoMode, VideoSettings
from raydiff.weights.published_ltx2 import PUBLISHED_LTX2, LTX2Version

Guidance = Literal["none", "cfg", "full"]
DType = Literal["bf16", "fp8"]

PROMPT = (
    "a lighthouse at dusk, waves roll in, gulls cry, {steps} steps, guidance {guidance}, "
    "batch {batch}, number {index}"
)

UNGUIDED = {
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
}
"""Of `cfg`, which has negative prompts alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Which network makes clips of which shape, and how."""

    version: LTX2Version = "2.0"
    is_tiny: bool = False
    height: int = 512
    width: int = 768
    num_frames: int = 121
    frame_rate: float = 24.0
    batch_size: int = 1
    num_batches: int = 1
    dtype: DType = "bf16"
    is_compiled: bool = True

    @property
    def configs(self) -> dict[str, dict[str, Any]]:
        """The components' configs."""
        if not self.is_tiny:
            return PUBLISHED_LTX2[self.version]
        return {"text_encoder": gemma_config(GEMMA, tiny_vocab_size()), **CONFIGS[self.version]}

    @property
    def max_tokens(self) -> int:
        """What texts are padded to."""
        return MAX_TOKENS if self.is_tiny else 1024

    @property
    def latent_size(self) -> LatentSize:
        """The size of a clip's video latents."""
        vae = LTX2VideoVAEConfig.from_dict(self.configs["vae"])
        return LatentSize(
            (self.num_frames - 1) // vae.temporal_downscale + 1,
            self.height // vae.spatial_downscale,
            self.width // vae.spatial_downscale,
        )

    @property
    def num_audio_tokens(self) -> int:
        """Latent frames of a clip's sound."""
        config = AudioVAEConfig.from_dict(self.configs["audio_vae"])
        return config.num_latents(self.num_frames, self.frame_rate)

    @property
    def info(self) -> ModelInfo:
        """What requests take from a checkpoint."""
        num_layers = self.configs["transformer"]["num_layers"]
        return ModelInfo(
            name=f"ltx{self.version}",
            family="ltx2",
            path="",
            revision="random",
            tasks=("txt2vid",),
            default_height=self.height,
            default_width=self.width,
            size_multiple=32,
            default_num_inference_steps=40,
            default_guidance_scale=3.0,
            default_strength=1.0,
            default_sampler="euler",
            num_parameters={},
            samplers=("euler",),
            video=VideoModel(
                num_layers=num_layers,
                default_stg_block=min(29, num_layers - 1),
                spatial_downscale=32,
                temporal_downscale=8,
                has_upsampler=True,
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How many steps a clip takes, and which passes each of them has."""

    num_steps: int
    guidance: Guidance
    """cfg: under the negative prompt too. full: and perturbed, and with streams apart."""

    @property
    def mode(self) -> VideoMode:
        """Distilled checkpoints' own schedule where the steps are theirs."""
        is_distilled = self.guidance == "none" and self.num_steps == NUM_DISTILLED_STEPS
        return "distilled" if is_distilled else "one_stage"

    def prompts(self, scene: Scene, batch: int) -> list[str]:
        """Return one prompt per clip that no other batch has, so that each must be encoded."""
        return [
            PROMPT.format(steps=self.num_steps, guidance=self.guidance, batch=batch, index=index)
            for index in range(scene.batch_size)
        ]

    def requests(self, scene: Scene, batch: int) -> list[RenderRequest]:
        """Return a batch of clips with seeds 0, 1, 2, ..."""
        info = scene.info
        values = video_defaults(info, self.mode) | {
            "num_frames": scene.num_frames,
            "frame_rate": scene.frame_rate,
            "text_encoder": "gemma3",
        }
        if self.guidance != "full":
            values |= UNGUIDED
        if self.guidance == "none":
            values |= {"guidance_scale": 1.0, "audio_guidance_scale": 1.0}
        settings = VideoSettings(
            **{field.name: values[field.name] for field in fields(VideoSettings)}
        )
        return [
            with_request_id(
                RenderRequest(
                    model=info.name,
                    model_revision=info.revision,
                    task="txt2vid",
                    prompt=prompt,
                    negative_prompt="",
                    seed=seed,
                    height=scene.height,
                    width=scene.width,
                    num_inference_steps=self.num_steps,
                    guidance_scale=values["guidance_scale"],
                    guidance_rescale=values["guidance_rescale"],
                    sampler="euler",
                    video=settings,
                )
            )
            for seed, prompt in enumerate(self.prompts(scene, batch))
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoBench:
    """One measured way to make a batch of clips; times are medians over the counted batches, and
    seconds of the whole batch unless they say otherwise."""

    renderer: str
    """`raydiff` or `diffusers`."""
    version: LTX2Version
    is_compiled: bool
    dtype: DType
    batch_size: int
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance: Guidance
    nfe: int
    """Forward passes of one clip."""
    encode_s: float
    denoise_s: float
    step_s: float
    """Denoising by its steps."""
    forward_s: float
    """The transformer alone, by clip and forward pass."""
    transformer_tflop_per_s: float
    """Arithmetic of its linear layers and attentions, 2 per multiply-add."""
    decode_s: float
    write_s: float | None
    """MP4 with sound, one clip after another; None for diffusers."""
    total_s: float
    peak_vram_bytes: int | None
    warm_up_s: float
    """First batch, of two steps: compilation and autotuning included."""
    fp8_error: float | None = None
    """Of one forward pass against bf16, ‖fp8 - bf16‖ / ‖bf16‖, the worse of picture and sound."""
    fp8_speed_up: float | None = None
    """How many times as fast one forward pass is as in bf16, in the same run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """What fp8 changed."""

    error: float
    speed_up: float


def video_bench(
    scene: Scene,
    sampling: Sampling,
    *,
    renderer: str,
    nfe: int,
    encode_s: float,
    denoise_s: float,
    decode_s: float,
    write_s: float | None,
    timer: ForwardTimer,
    flops: int,
    warm_up_s: float,
    quality: Quality | None = None,
) -> VideoBench:
    """Return the result of measured stages; `flops` are one clip's in one forward pass."""
    return VideoBench(
        renderer=renderer,
        version=scene.version,
        is_compiled=scene.is_compiled,
        dtype=scene.dtype if renderer == "raydiff" else "bf16",
        batch_size=scene.batch_size,
        height=scene.height,
        width=scene.width,
        num_frames=scene.num_frames,
        num_inference_steps=sampling.num_steps,
        guidance=sampling.guidance,
        nfe=nfe,
        encode_s=encode_s,
        denoise_s=denoise_s,
        step_s=denoise_s / sampling.num_steps,
        forward_s=timer.seconds / timer.num_rows,
        transformer_tflop_per_s=flops * timer.num_rows / timer.seconds / 1e12,
        decode_s=decode_s,
        write_s=write_s,
        total_s=encode_s + denoise_s + decode_s + (write_s or 0.0),
        peak_vram_bytes=peak_vram_bytes(),
        warm_up_s=warm_up_s,
        fp8_error=None if quality is None else quality.error,
        fp8_speed_up=None if quality is None else quality.speed_up,
    )


@cache
def tiny_vocab_size() -> int:
    """Return the size of the vocabulary that texts have here."""
    with tempfile.TemporaryDirectory() as folder:
        return write_tiny_gemma_tokenizer(folder)


def samplings(num_steps: int | None, guidance: Guidance | None) -> list[Sampling]:
    """Return what was asked for; without any choice, distilled clips and guided ones."""
    if num_steps is None and guidance is None:
        return [samplings(None, "none")[0], samplings(None, "cfg")[0]]
    if guidance is None:
        guidance = "none" if num_steps == NUM_DISTILLED_STEPS else "cfg"
    if num_steps is None:
        num_steps = NUM_DISTILLED_STEPS if guidance == "none" else 40
    return [Sampling(num_steps=num_steps, guidance=guidance)]
