"""The renderer of a real run: a pipeline that stays loaded while its model is asked for."""

import gc
from collections.abc import Sequence

import torch

from raydiff.config import MemoryConfig, ModelConfig
from raydiff.engine.messages import Role
from raydiff.engine.renderer import RenderedBatch
from raydiff.errors import EngineError, ModelError
from raydiff.pipelines.base import Pipeline
from raydiff.pipelines.load import load_pipeline
from raydiff.request import ModelInfo, RenderRequest
from raydiff.weights.resolve import resolve_model


class PipelineRenderer:
    """Keeps one model resident. The scheduler keeps a worker's batches to one model where it can.

    One, because a memory profile is chosen by what is free: beside a second model it would be a
    poorer one for the rest of the run.
    """

    def __init__(
        self,
        *,
        model: ModelConfig,
        memory: MemoryConfig,
        preload: ModelInfo | None = None,
        role: Role = "fused",
    ) -> None:
        self._model = model
        self._memory = memory
        self._preload = preload
        self._pipeline: Pipeline | None = None
        self._unusable: dict[str, ModelError] = {}

    def start(self) -> str:
        """Load the model that most rows want, and return the device's name."""
        if self._preload is not None:
            self._load(self._preload)
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"

    def max_batch_size(self, request: RenderRequest) -> int:
        """Ask the model's memory profile."""
        return self._resident(request).max_batch_size(request.height, request.width)

    def render(self, requests: Sequence[RenderRequest]) -> RenderedBatch:
        """Encode, denoise and decode."""
        pipeline = self._resident(requests[0])
        try:
            rendered = pipeline.render(requests)
        except torch.AcceleratorError as error:
            # After an error of the device itself every later call of this process fails too.
            raise EngineError(f"the GPU failed: {str(error).splitlines()[0]}") from error
        return RenderedBatch(
            pixels=rendered.pixels,
            warnings=rendered.warnings,
            encode_s=rendered.encode_s,
            denoise_s=rendered.denoise_s,
            decode_s=rendered.decode_s,
            peak_vram_bytes=rendered.peak_vram_bytes,
            profile=pipeline.profile.name,
            dtype=pipeline.dtype_name,
        )

    def _resident(self, request: RenderRequest) -> Pipeline:
        """Return the request's pipeline, loaded in place of the last one if it is another."""
        name, revision = request.model, request.model_revision
        pipeline = self._pipeline
        if pipeline is not None and (pipeline.info.name, pipeline.info.revision) == (
            name,
            revision,
        ):
            return pipeline
        if name in self._unusable:
            raise self._unusable[name]
        try:
            return self._load(self._resolve(name, revision))
        except ModelError as error:
            self._unusable[name] = error
            raise

    def _resolve(self, name: str, revision: str) -> ModelInfo:
        """Find on this node the very checkpoint that the driver resolved."""
        pinned = None if revision.startswith("local-") else revision
        info = resolve_model(
            name, revision=pinned, variant=self._model.variant, dtype=self._model.dtype
        )
        if info.revision != revision:
            raise ModelError(
                f"{name}: its files changed during the run: {revision} then, {info.revision} now. "
                "Leave a checkpoint alone while it is rendered from."
            )
        return info

    def _load(self, info: ModelInfo) -> Pipeline:
        self._pipeline = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._pipeline = load_pipeline(info, config=self._model, memory=self._memory)
        return self._pipeline
