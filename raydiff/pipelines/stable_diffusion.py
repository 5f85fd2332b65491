"""Stable Diffusion 2.1: prompts to 77-token embeddings, a UNet under per-row guidance, a VAE.

SDXL (sdxl.py) differs in its text encoders and adds conditioning; the rest is shared from here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from raydiff.diffusion.denoise import DenoiseState, RowPlan
from raydiff.diffusion.noise import draw, row_generators
from raydiff.diffusion.schedule import ScheduleConfig
from raydiff.errors import ConfigError, RowError
from raydiff.manifest.schema import quoted
from raydiff.memory.profiles import Profile
from raydiff.memory.residency import Residency
from raydiff.models.autoencoder_kl import AutoencoderKL, Moments, sample
from raydiff.models.clip import CLIPTextEncoder
from raydiff.models.tiling import tiled_encode
from raydiff.models.unet import UNet
from raydiff.pipelines.base import Decoded, Denoised, Pipeline, PromptEmbeds
from raydiff.pipelines.guided_unet import GuidedUNet
from raydiff.pipelines.init_image import load_init_image
from raydiff.pipelines.prompt_cache import EncodedPrompt, PromptCache
from raydiff.pipelines.vae_decoder import VAE_TILE, VAE_TILE_OVERLAP, VAEDecoder
from raydiff.request import BatchKey, ModelInfo, RenderRequest
from raydiff.tokenizer import CLIPTokenizer
from raydiff.weights.components import Stage

ENCODE_CHUNK = 8
"""Texts that a GPU encodes at once, always as many: its kernels, and so the last bits, go by it."""

M = TypeVar("M")


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """The loaded parts of one checkpoint: those of the stages that were asked for."""

    unet: UNet | None
    vae: AutoencoderKL | None
    text_encoders: dict[str, CLIPTextEncoder]
    """By component name, in the order in which their outputs are concatenated."""
    tokenizers: dict[str, CLIPTokenizer]
    """By the name of the encoder that they feed."""
    schedule: ScheduleConfig
    has_zero_negative: bool
    """An absent negative prompt is a zero embedding (SDXL), not an encoded empty prompt."""

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What is loaded, by component name; the UNet first."""
        modules: dict[str, nn.Module | None] = {"unet": self.unet, "vae": self.vae}
        loaded = {name: module for name, module in modules.items() if module is not None}
        return {**loaded, **self.text_encoders}


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
        modules = components.modules
        self._residency = Residency(modules, profile)
        self.device = self._residency.device_of(next(iter(modules)))
        self._prompts = PromptCache()
        if components.unet is not None:
            self._unet: Callable[..., Tensor] = components.unet
            if is_compiled:
                self._unet = torch.compile(components.unet, fullgraph=True, dynamic=False)
        if components.vae is not None:
            self._decoder = VAEDecoder(components.vae, self._residency, is_compiled=is_compiled)

    def max_batch_size(self, key: BatchKey) -> int:
        """Return the memory profile's batch size; if compiled, one that no padding enlarges."""
        size = super().max_batch_size(key)
        return 2 ** (size.bit_length() - 1) if self.is_compiled else size

    @torch.inference_mode()
    def encode(self, requests: Sequence[RenderRequest]) -> PromptEmbeds:
        """Encode the prompts and negative prompts of all requests, each distinct text once."""
        texts = [text for request in requests for text in self._texts(request)]
        return self.gather(requests, self._prompts.get_or_encode(texts, self._encode_texts))

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> list[EncodedPrompt]:
        """Encode texts into host memory; each gets what it would get alone."""
        return [encoded.on_host() for encoded in self._encode_texts(texts)]

    @torch.inference_mode()
    def gather(
        self, requests: Sequence[RenderRequest], encoded: Mapping[str, EncodedPrompt]
    ) -> PromptEmbeds:
        """Return what `encode` does, of texts that are encoded already."""
        for text in (text for request in requests for text in self._texts(request)):
            if text not in encoded:
                raise RowError(f"the embeddings of {quoted(text)} did not come with its row")
        positive = [encoded[request.prompt] for request in requests]
        negatives = [self._negative_text(request) for request in requests]
        zero = positive[0].zeros_like()
        negative = [zero if text is None else encoded[text] for text in negatives]
        return PromptEmbeds(
            prompt_embeds=torch.stack([row.embeds for row in positive]),
            negative_prompt_embeds=torch.stack([row.embeds for row in negative]),
            pooled_prompt_embeds=_stack_pooled(positive),
            negative_pooled_prompt_embeds=_stack_pooled(negative),
            warnings=tuple(map(_truncation_warning, positive, negative)),
        )

    @torch.inference_mode()
    def denoise_rows(self, requests: Sequence[RenderRequest], embeds: PromptEmbeds) -> Denoised:
        """Sample latents (4, h, w) float32 from each request's seed, and check them."""
        unet, vae = self._needed(self.parts.unet, "denoise"), self._vae("denoise")
        generators = row_generators([request.seed for request in requests])
        # The posterior sample of an init image is drawn before the row's noise, as in diffusers.
        init_latents = self._encode_init_images(requests, generators)
        factor = vae.config.downscale
        first = requests[0]
        shape = (vae.config.latent_channels, first.height // factor, first.width // factor)
        state = DenoiseState.start(
            [_row_plan(request) for request in requests],
            self.parts.schedule,
            noise=draw(generators, shape),
            init_latents=init_latents,
            generators=generators,
            device=self.device,
        )
        sums = [state.latents.sum(dim=(1, 2, 3))]
        with self._residency.on_device("unet"), self._attention_backends():
            predict = GuidedUNet(
                self._unet,
                unet,
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
                sums.append(state.latents.sum(dim=(1, 2, 3)))
        return Denoised(tuple(state.latents), self._latents_errors(torch.stack(sums)))

    @torch.inference_mode()
    def decode_rows(self, latents: Sequence[Tensor]) -> Decoded:
        """Decode latents (4, h, w) to pixels (H, W, 3) uint8, all of one size, and check them.

        Where they are not finite, or black of latents that are not, the VAE tries again in
        float32.
        """
        self._vae("decode")
        return self._decoder.decode(torch.stack(tuple(latents)), self.profile)

    def on_host(self, latents: Tensor) -> Tensor:
        """Return a copy of one row's latents in host memory."""
        return latents.to("cpu", copy=True)

    def denoise(self, requests: Sequence[RenderRequest], embeds: PromptEmbeds) -> Tensor:
        """Sample latents (B, 4, h, w) float32 from each request's seed under its own settings."""
        return torch.stack(tuple(self.denoise_rows(requests, embeds).latents))

    def decode(self, latents: Tensor) -> np.ndarray:
        """Decode latents (B, 4, h, w) to pixels (B, H, W, 3) uint8."""
        return np.asarray(self.decode_rows(tuple(latents)).pixels)

    def _latents_errors(self, sums: Tensor) -> tuple[str | None, ...]:
        """Say after which evaluation a row was not finite, from its sum after each: (E + 1, B)."""
        is_finite = sums.isfinite().cpu().numpy()
        remedy = "Try another guidance_scale or sampler, and check the checkpoint's files."
        if self.dtype != torch.float32:
            remedy = "Try --set model.dtype=float32."
        return tuple(
            None
            if row[-1]
            else f"NaN in latents after evaluation {row.argmin()} of the UNet in "
            f"{self.dtype_name}. {remedy}"
            for row in is_finite.T
        )

    def _texts(self, request: RenderRequest) -> list[str]:
        """Return what has to be encoded for a request."""
        negative = self._negative_text(request)
        return [request.prompt] if negative is None else [request.prompt, negative]

    def _negative_text(self, request: RenderRequest) -> str | None:
        """Return the text to encode as the negative prompt; None stands for zeros."""
        if request.guidance_scale <= 1:
            return None
        if request.negative_prompt is None:
            return None if self.parts.has_zero_negative else ""
        return request.negative_prompt

    def _encode_texts(self, texts: Sequence[str]) -> list[EncodedPrompt]:
        """Encode so that a text's embedding does not depend on those that it is encoded with."""
        if not self.parts.text_encoders:
            raise self._not_loaded("encode")
        is_on_gpu = self._residency.device_of("text_encoder").type == "cuda"
        size = ENCODE_CHUNK if is_on_gpu else 1
        encoded: list[EncodedPrompt] = []
        with self._residency.on_device(*self.parts.text_encoders):
            for start in range(0, len(texts), size):
                chunk = list(texts[start : start + size])
                padding = [chunk[-1]] * (size - len(chunk))
                encoded += self._encode_chunk(chunk + padding)[: len(chunk)]
        return encoded

    def _encode_chunk(self, texts: Sequence[str]) -> list[EncodedPrompt]:
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
        vae, limit = self._vae("denoise"), self.profile.vae_tile_pixels
        pixels = pixels.to(self.vae_dtype)
        if limit is not None and pixels.shape[-2] * pixels.shape[-1] > limit:
            moments = tiled_encode(vae, pixels, tile_size=VAE_TILE, overlap=VAE_TILE_OVERLAP)
        else:
            moments = vae.encode(pixels)
        moments = Moments(moments.mean.float(), moments.logvar.float())
        noise = draw([generator], tuple(moments.mean.shape[1:])).to(pixels.device)
        return vae.normalize(sample(moments, noise))

    def _vae(self, stage: Stage) -> AutoencoderKL:
        return self._needed(self.parts.vae, stage)

    def _needed(self, part: M | None, stage: Stage) -> M:
        if part is None:
            raise self._not_loaded(stage)
        return part

    def _not_loaded(self, stage: Stage) -> ConfigError:
        return ConfigError(
            f"{stage}: this pipeline has only {', '.join(self.parts.modules)}. "
            f"Load it with {stage!r} among its stages."
        )


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
    return f"{' and '.join(cut)} cut to {len(prompt.embeds)} tokens"
