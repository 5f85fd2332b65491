"""SDXL: two text encoders side by side, and a UNet also conditioned on sizes and pooled text."""

from collections.abc import Sequence

import torch
from torch import Tensor

from raydiff.pipelines.prompt_cache import EncodedPrompt
from raydiff.pipelines.stable_diffusion import StableDiffusionPipeline
from raydiff.request import RenderRequest


class SDXLPipeline(StableDiffusionPipeline):
    """SDXL base. Build it with `raydiff.load_pipeline`."""

    def _encode_chunk(self, texts: Sequence[str]) -> list[EncodedPrompt]:
        """Concatenate both encoders' penultimate states; the second one's pooled text is kept."""
        states: list[Tensor] = []
        pooled: Tensor | None = None
        is_truncated = [False] * len(texts)
        for name, encoder in self.parts.text_encoders.items():
            tokens = self.parts.tokenizers[name].encode(list(texts))
            device = self._residency.device_of(name)
            output = encoder(torch.from_numpy(tokens.input_ids).to(device))
            states.append(output.penultimate)
            pooled = output.pooled
            is_truncated = [
                was or now for was, now in zip(is_truncated, tokens.is_truncated, strict=True)
            ]
        embeds = torch.cat(states, dim=-1)  # (B, 77, 768 + 1280)
        return [
            EncodedPrompt(
                embeds=embeds[row],
                pooled=None if pooled is None else pooled[row],
                is_truncated=is_truncated[row],
            )
            for row in range(len(texts))
        ]

    def _time_ids(self, requests: Sequence[RenderRequest]) -> Tensor:
        """Return (B, 6): original height and width, crop top and left, target height and width.

        The image is its own original and is not cropped, as diffusers has it by default.
        """
        return torch.tensor(
            [
                [request.height, request.width, 0, 0, request.height, request.width]
                for request in requests
            ]
        )
