"""The renderer of a real run: a pipeline that stays loaded while its model is asked for."""

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from raydiff.config import LTX2Config, MemoryConfig, ModelConfig, ProfileName
from raydiff.engine.messages import Role, TextKey
from raydiff.engine.renderer import DenoisedBatch, EncodedTexts, Payload
from raydiff.errors import EngineError, ModelError, OutOfMemoryError
from raydiff.memory.profiles import poorer_profile
from raydiff.output.rendered import Rendered
from raydiff.pipelines.base import Pipeline
from raydiff.pipelines.embeds_store import EmbedsStore
from raydiff.pipelines.load import load_pipeline
from raydiff.pipelines.prompt_cache import EncodedPrompt
from raydiff.request import ModelInfo, RenderRequest, batch_key
from raydiff.weights.checkpoint import open_checkpoint
from raydiff.weights.components import STAGES, Stage, needed_by
from raydiff.weights.resolve import resolve_model

STAGES_OF_ROLE: dict[Role, tuple[Stage, ...]] = {
    "fused": STAGES,
    "encode": ("encode",),
    "denoise": ("denoise",),
    "denoise_decode": ("denoise", "decode"),
    "decode": ("decode",),
}


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
        ltx2: LTX2Config | None = None,
        preload: ModelInfo | None = None,
        embeds_in: str | None = None,
        role: Role = "fused",
    ) -> None:
        """`embeds_in`: the output folder where an `encode` worker keeps embeddings, if any."""
        self._model = model
        self._ltx2 = ltx2 or LTX2Config()
        self._memory = self._asked_memory = memory
        self._preload = preload
        self._stages = STAGES_OF_ROLE[role]
        self._needed = needed_by(self._stages, self._ltx2)
        self._store: EmbedsStore | None = None
        if embeds_in is not None and role == "encode":
            self._store = EmbedsStore(embeds_in)
        self._pipeline: Pipeline | None = None
        self._profile: ProfileName | None = None
        self._unusable: dict[str, ModelError] = {}

    def start(self) -> str:
        """Load the model that most rows want, and return the device's name.

        Called in the thread that renders: torch was imported before OMP_NUM_THREADS was set here.
        """
        if threads := os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(int(threads))
        if self._preload is not None:
            self._load(self._find_here(self._preload))
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"

    def max_batch_size(self, request: RenderRequest) -> int:
        """Ask the model's memory profile."""
        pipeline = self._resident(request.model, request.model_revision)
        return pipeline.max_batch_size(batch_key(request))

    def render(self, requests: Sequence[RenderRequest]) -> Rendered:
        """Encode, denoise and decode."""
        pipeline = self._of(requests)
        with _device_errors():
            return pipeline.render(requests)

    def encode(self, texts: Sequence[TextKey]) -> EncodedTexts:
        """Encode texts into host memory, or read what an earlier run has kept of them."""
        pipeline = self._resident(texts[0].model, texts[0].revision)
        wanted = [key.text for key in texts]
        stored: dict[str, EncodedPrompt] = {}
        if self._store is not None:
            stored = self._store.read(wanted, revision=texts[0].revision, dtype=pipeline.dtype)
        missing = [text for text in wanted if text not in stored]
        with _device_errors(), pipeline.fitting(f"{len(missing)} texts"):
            fresh = dict(zip(missing, pipeline.encode_texts(missing), strict=True))
        warning = None
        if self._store is not None:
            self._store.write(fresh, revision=texts[0].revision)
            if self._store.error is not None:
                warning = f"encoded prompts are not kept any more: {self._store.error}"
                self._store = None
        encoded = stored | fresh
        return EncodedTexts([encoded[text] for text in wanted], len(stored), warning)

    def render_encoded(
        self, requests: Sequence[RenderRequest], embeds: Mapping[TextKey, EncodedPrompt]
    ) -> Rendered:
        """Denoise and decode."""
        pipeline = self._of(requests)
        with _device_errors():
            return pipeline.render(requests, _by_text(embeds))

    def denoise(
        self, requests: Sequence[RenderRequest], embeds: Mapping[TextKey, EncodedPrompt]
    ) -> DenoisedBatch:
        """Return each request's latents in host memory."""
        pipeline = self._of(requests)
        with _device_errors(), pipeline.measured(requests) as costs:
            with costs.timed("encode"):
                gathered = pipeline.gather(requests, _by_text(embeds))
            with costs.timed("denoise"):
                denoised = pipeline.denoise_rows(requests, gathered)
            latents = [pipeline.on_host(row) for row in denoised.latents]
        return DenoisedBatch(
            latents=latents,
            warnings=gathered.warnings,
            errors=denoised.errors,
            encode_s=costs.seconds["encode"],
            denoise_s=costs.seconds["denoise"],
            peak_vram_bytes=costs.peak_vram_bytes,
            profile=pipeline.profile.name,
            dtype=pipeline.dtype_name,
        )

    def decode(self, requests: Sequence[RenderRequest], latents: Sequence[Payload]) -> Rendered:
        """Decode each request's latents."""
        pipeline = self._of(requests)
        with _device_errors(), pipeline.measured(requests) as costs, costs.timed("decode"):
            decoded = pipeline.decode_rows(latents)
        return pipeline.rendered(decoded, decoded.warnings, costs)

    def step_down(self) -> str | None:
        """Let the next poorer profile be loaded, or again the one that was asked for."""
        last = self._profile
        poorer = poorer_profile(last) if last is not None else None
        if poorer is None:
            if self._memory != self._asked_memory:
                self._memory = self._asked_memory
                self._unload()
            return None
        self._memory = self._memory.model_copy(update={"profile": poorer})
        self._unload()
        return f"one row alone is out of memory under profile {last}; it goes on with {poorer}"

    def _of(self, requests: Sequence[RenderRequest]) -> Pipeline:
        return self._resident(requests[0].model, requests[0].model_revision)

    def _resident(self, name: str, revision: str) -> Pipeline:
        """Return the model's pipeline, loaded in place of the last one if it is another."""
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

    def _find_here(self, info: ModelInfo) -> ModelInfo:
        """Find on this node, if it is another one, the checkpoint that the driver found."""
        if info.revision.startswith("local-") and Path(info.path).exists():
            self._resolve(info.path, info.revision)
            return info
        if self._is_whole_here(info):
            return info
        return self._resolve(info.name, info.revision)

    def _is_whole_here(self, info: ModelInfo) -> bool:
        """Whether this node's copy of a snapshot has what this worker's stages need of it."""
        model = self._model
        try:
            open_checkpoint(
                Path(info.path), variant=model.variant, dtype=model.dtype, needed=self._needed
            )
        except ModelError:
            return False
        return True

    def _resolve(self, name: str, revision: str) -> ModelInfo:
        """Find on this node the very checkpoint that the driver resolved."""
        pinned = None if revision.startswith("local-") else revision
        info = resolve_model(
            name,
            revision=pinned,
            variant=self._model.variant,
            dtype=self._model.dtype,
            needed=self._needed,
        )
        if info.revision != revision:
            raise ModelError(
                f"{name}: its files changed during the run: {revision} then, {info.revision} now. "
                "Leave a checkpoint alone while it is rendered from."
            )
        return info

    def _load(self, info: ModelInfo) -> Pipeline:
        self._unload()
        try:
            pipeline = load_pipeline(
                info,
                config=self._model,
                memory=self._memory,
                ltx2=self._ltx2,
                stages=self._stages,
            )
        except torch.OutOfMemoryError as error:
            if self._memory.profile != "auto":
                self._profile = self._memory.profile
            raise OutOfMemoryError(
                f"{info.name}: its weights do not fit the GPU: {str(error).splitlines()[0]} "
                "Use a profile that needs less memory."
            ) from error
        self._pipeline, self._profile = pipeline, pipeline.profile.name
        return pipeline

    def _unload(self) -> None:
        self._pipeline = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def _device_errors() -> Iterator[None]:
    """After an error of the device itself every later call of this process fails too."""
    try:
        yield
    except torch.AcceleratorError as error:
        raise EngineError(f"the GPU failed: {str(error).splitlines()[0]}") from error


def _by_text(embeds: Mapping[TextKey, EncodedPrompt]) -> dict[str, EncodedPrompt]:
    """A batch is of one model, so that its texts alone tell them apart."""
    return {key.text: encoded for key, encoded in embeds.items()}
