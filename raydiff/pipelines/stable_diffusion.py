"""Stable Diffusion 2.1: prompts to 77-token embeddings, a UNet under per-row guidance, a VAE.

SDXL (sdxl.py) differs in its text encoders and adds conditioning; the rest is shared from here.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from raydiff.batching import padded_size
from raydiff.diffusion.denoise import DenoiseState, RowPlan
from raydiff.diffusion.noise import draw, row_generators
from raydiff.diffusion.schedule import ScheduleConfig
from raydiff.memory.profiles import Profile
from raydiff.memory.residency import Residency
from raydiff.models.autoencoder_kl import AutoencoderKL, Moments, sample
from raydiff.models.clip import CLIPTextEncoder
from raydiff.models.tiling import tiled_decode, tiled_encode
from raydiff.models.unet import UNet
from raydiff.pipelines.base import Pipeline, PromptEmbeds
from raydiff.pipelines.guided_unet import GuidedUNet
from raydiff.pipelines.init_image import load_init_image
from raydiff.pipelines.prompt_cache import EncodedPrompt, PromptCache
from raydiff.request import ModelInfo, RenderRequest
from raydiff.tokenizer import CLIPTokenizer

ENCODE_BATCH = 32
VAE_TILE = 512
VAE_TILE_OVERLAP = 64
"""Tiles of images too large to decode whole, in pixels."""

ATTENTION_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""cuDNN first: on Hopper its kernel runs 1.5x as fast as the flash kernel that torch prefers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """The loaded parts of one checkpoint."""

    unet: UNet
    vae: AutoencoderKL
    text_encoders: dict[str, CLIPTextEncoder]
    """By component name, in the order in which their outputs are concatenated."""
    tokenizers: dict[str, CLIPTokenizer]
    """By the name of the encoder that they feed."""
    schedule: ScheduleConfig
    has_zero_negative: bool
    """An absent negative prompt is a zero embedding (SDXL), not an encoded empty prompt."""


class StableDiffusionPipeline(Pipeline):
    """SD 2.1 (and the shared part of SDXL). Build it with `raydiff.load_pipeline`."""

    def __init__(
        self,
        *,
        info: ModelInfo,
        profile: Profile,
        components: Components,
        dtype: torch.dtype,
        vae_dtype: torch.dtype,
        is_compiled: bool,
    ) -> None:
        self.info = info
        self.profile = profile
        self.dtype = dtype
        self.vae_dtype = vae_dtype
        self.parts = components
        self.is_compiled = is_compiled
        modules = {"unet": components.unet, "vae": components.vae, **components.text_encoders}
        self._residency = Residency(modules, profile)
        self.device = self._residency.device_of("unet")
        self._prompts = PromptCache()
        self._unet: Callable[..., Tensor] = components.unet
        self._vae_decode: Callable[[Tensor], Tensor] = components.vae.decode
        if is_compiled:
            self._unet = torch.compile(components.unet, fullgraph=True, dynamic=False)
            self._vae_decode = torch.compile(components.vae.decode, fullgraph=True, dynamic=False)

    def max_batch_size(self, height: int, width: int) -> int:
        """Return the memory profile's batch size; if compiled, one that no padding enlarges."""
        size = super().max_batch_size(height, width)
        return 2 ** (size.bit_length() - 1) if self.is_compiled else size

    @torch.inference_mode()
    def encode(self, requests: Sequence[RenderRequest]) -> PromptEmbeds:
        """Encode the prompts and negative prompts of all requests, each distinct text once."""
        negatives = [self._negative_text(request) for request in requests]
        texts = [request.prompt for request in requests]
        encoded = self._prompts.get_or_encode(
            [*texts, *(text for text in negatives if text is not None)], self._encode_texts
        )
        positive = [encoded[text] for text in texts]
        zero = positive[0].zeros_like()
        negative = [zero if text is None else encoded[text] for text in negatives]
        return PromptEmbeds(
            prompt_embeds=torch.stack([row.embeds for row in positive]),
            negative_prompt_embeds=torch.stack([row.embeds for row in negative]),
            pooled_prompt_embeds=_stack_pooled(positive),
            negative_pooled_prompt_embeds=_stack_pooled(negative),
            warnings=tuple(
                _truncation_warning(prompt, negative_prompt)
                for prompt, negative_prompt in zip(positive, negative, strict=True)
            ),
        )

    @torch.inference_mode()
    def denoise(self, requests: Sequence[RenderRequest], embeds: PromptEmbeds) -> Tensor:
        """Sample latents (B, 4, h, w) float32 from each request's seed under its own settings."""
        generators = row_generators([request.seed for request in requests])
        # The posterior sample of an init image is drawn before the row's noise, as in diffusers.
        init_latents = self._encode_init_images(requests, generators)
        factor = self.parts.vae.config.downscale
        first = requests[0]
        shape = (
            self.parts.vae.config.latent_channels,
            first.height // factor,
            first.width // factor,
        )
        state = DenoiseState.start(
            [_row_plan(request) for request in requests],
            self.parts.schedule,
            noise=draw(generators, shape),
            init_latents=init_latents,
            generators=generators,
            device=self.device,
        )
        with self._residency.on_device("unet"), self._attention_backends():
            predict = GuidedUNet(
                self._unet,
                self.parts.unet,
                embeds,
                guidance_scales=[request.guidance_scale for request in requests],
                guidance_rescales=[request.guidance_rescale for request in requests],
                time_ids=self._time_ids(requests),
                is_sequential=self.profile.guidance == "sequential",
                has_fixed_sizes=self.is_compiled,
                dtype=self.dtype,
                device=self.device,
            )
            while not state.is_done:
                latents, timesteps, rows = state.model_input()
                state.step(predict(latents, timesteps, rows))
        return state.latents

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Decode latents (B, 4, h, w) to pixels (B, H, W, 3) uint8."""
        device = self._residency.device_of("vae")
        factor = self.parts.vae.config.downscale
        pixels_per_image = latents.shape[-2] * latents.shape[-1] * factor**2
        images_at_once = max(1, self.profile.vae_batch_pixels // pixels_per_image)
        decoded = []
        with self._residency.on_device("vae"):
            for chunk in torch.split(latents, images_at_once):
                raw = self.parts.vae.denormalize(chunk.to(device)).to(self.vae_dtype)
                decoded.append(_to_uint8(self._decode_raw(raw, pixels_per_image)).cpu())
        return torch.cat(decoded).numpy()

    def _decode_raw(self, raw: Tensor, pixels_per_image: int) -> Tensor:
        limit = self.profile.vae_tile_pixels
        if limit is not None and pixels_per_image > limit:
            return tiled_decode(self.parts.vae, raw, tile_size=VAE_TILE, overlap=VAE_TILE_OVERLAP)
        if not self.is_compiled:
            return self._vae_decode(raw)
        padding = padded_size(len(raw)) - len(raw)
        return self._vae_decode(torch.cat([raw, raw[-1:].expand(padding, -1, -1, -1)]))[: len(raw)]

    def _negative_text(self, request: RenderRequest) -> str | None:
        """Return the text to encode as the negative prompt; None stands for zeros."""
        if request.guidance_scale <= 1:
            return None
        if request.negative_prompt is None:
            return None if self.parts.has_zero_negative else ""
        return request.negative_prompt

    def _encode_texts(self, texts: Sequence[str]) -> list[EncodedPrompt]:
        encoded: list[EncodedPrompt] = []
        with self._residency.on_device(*self.parts.text_encoders):
            for start in range(0, len(texts), ENCODE_BATCH):
                encoded += self._encode_batch(texts[start : start + ENCODE_BATCH])
        return encoded

    def _encode_batch(self, texts: Sequence[str]) -> list[EncodedPrompt]:
        tokens = self.parts.tokenizers["text_encoder"].encode(list(texts))
        device = self._residency.device_of("text_encoder")
        output = self.parts.text_encoders["text_encoder"](
            torch.from_numpy(tokens.input_ids).to(device)
        )
        return [
            EncodedPrompt(embeds=embeds, pooled=None, is_truncated=is_truncated)
            for embeds, is_truncated in zip(
                output.last_hidden_state, tokens.is_truncated, strict=True
            )
        ]

    def _time_ids(self, requests: Sequence[RenderRequest]) -> Tensor | None:
        """SD 2.1 is not conditioned on sizes."""
        return None

    def _encode_init_images(
        self, requests: Sequence[RenderRequest], generators: Sequence[torch.Generator]
    ) -> list[Tensor | None]:
        """Return each img2img row's latents (1, 4, h, w) float32, sampled from its posterior."""
        rows: list[Tensor | None] = [None] * len(requests)
        if all(request.init_image is None for request in requests):
            return rows
        device = self._residency.device_of("vae")
        with self._residency.on_device("vae"):
            for row, request in enumerate(requests):
                if request.init_image is None:
                    continue
                pixels = load_init_image(request.init_image, request.height, request.width)
                rows[row] = self._sample_posterior(pixels.to(device), generators[row]).cpu()
        return rows

    def _sample_posterior(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        vae, limit = self.parts.vae, self.profile.vae_tile_pixels
        pixels = pixels.to(self.vae_dtype)
        if limit is not None and pixels.shape[-2] * pixels.shape[-1] > limit:
            moments = tiled_encode(vae, pixels, tile_size=VAE_TILE, overlap=VAE_TILE_OVERLAP)
        else:
            moments = vae.encode(pixels)
        moments = Moments(moments.mean.float(), moments.logvar.float())
        noise = draw([generator], tuple(moments.mean.shape[1:])).to(pixels.device)
        return vae.normalize(sample(moments, noise))

    def _attention_backends(self) -> AbstractContextManager[None]:
        if self.device.type == "cuda":
            return sdpa_kernel(ATTENTION_BACKENDS, set_priority=True)
        return nullcontext()


def _row_plan(request: RenderRequest) -> RowPlan:
    return RowPlan(
        sampler=request.sampler,
        num_inference_steps=request.num_inference_steps,
        strength=request.strength if request.task == "img2img" else None,
    )


def _stack_pooled(rows: Sequence[EncodedPrompt]) -> Tensor | None:
    pooled = [row.pooled for row in rows if row.pooled is not None]
    return torch.stack(pooled) if pooled else None


def _truncation_warning(prompt: EncodedPrompt, negative_prompt: EncodedPrompt) -> str | None:
    cut = [
        name
        for name, row in (("prompt", prompt), ("negative_prompt", negative_prompt))
        if row.is_truncated
    ]
    if not cut:
        return None
    return f"{' and '.join(cut)} cut to 77 tokens"


def _to_uint8(pixels: Tensor) -> Tensor:
    """Turn (B, 3, H, W) in -1..1 into (B, H, W, 3) uint8, rounded to the nearest level."""
    scaled = (pixels.float() / 2 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
