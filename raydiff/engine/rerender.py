"""Images and clips of a run rendered again from their metadata alone, in this process, and compared
with what the run wrote."""

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydiff.config import MemoryConfig, ModelConfig
from raydiff.engine.recorded_run import recorded_config
from raydiff.engine.renderers import PipelineRenderer
from raydiff.errors import InputError, ModelError, OutputError, RowError
from raydiff.manifest.init_images import find_init_image
from raydiff.memory.gpus import visible_gpus
from raydiff.memory.profiles import compute_dtype
from raydiff.output.frames import Pixels, read_image
from raydiff.output.media_files import (
    describe_media,
    is_clip,
    is_frames_index,
    media_name,
    open_media,
)
from raydiff.output.metadata_schema import REQUEST_COLUMNS, VIDEO_COLUMNS
from raydiff.output.rendered import Rendered
from raydiff.output.similarity import FrameComparison, Similarity
from raydiff.output.video.audio import Audio, sound_snr
from raydiff.output.video.clip_reader import open_clip
from raydiff.output.writer import Writer
from raydiff.request import RenderRequest, with_request_id
from raydiff.video_settings import VideoSettings
from raydiff.weights.resolve import resolve_model

MAX_GREY_LEVELS = 1
MIN_FRAMES_PSNR = 30.0
MIN_SOUND_SNR = 10.0
"""What rounding on other hardware may change; more is another image or clip. A video's encoder
makes more of it (these are dB): a grey level of noise over the noise of random weights is 33."""

Row = Mapping[str, Any]
Place = tuple[str | Path, Row]
"""An output folder and a row of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rerendered:
    """An image or clip rendered again."""

    row_index: int
    request_id: str
    file_name: str
    sha256: str
    recorded_sha256: str
    similarity: Similarity | None
    """To the run's own image or frames; None where the files are equal."""
    sound_snr: float
    """dB by which the run's own sound is louder than what differs; infinite where nothing does, and
    for an image."""
    device: str
    recorded_device: str
    data: bytes
    """The new file; of a folder of frames its index."""
    is_clip: bool

    @property
    def is_equal(self) -> bool:
        """Whether it is the file that the run wrote, byte for byte."""
        return self.sha256 == self.recorded_sha256 and self.sound_snr == math.inf

    @property
    def is_near(self) -> bool:
        """Whether it differs by no more than another device's rounding makes of it."""
        if not self.is_clip:
            return self.max_abs <= MAX_GREY_LEVELS
        psnr = math.inf if self.similarity is None else self.similarity.psnr
        return psnr >= MIN_FRAMES_PSNR and self.sound_snr >= MIN_SOUND_SNR

    @property
    def max_abs(self) -> int:
        """Largest difference of a channel of a pixel to the run's own image, 0..255."""
        return 0 if self.similarity is None else self.similarity.max_abs


class Rerenderer:
    """Renders rows of one run again, one at a time; keeps the last model loaded."""

    def __init__(self, out: str | Path, *, model: str | None = None) -> None:
        """`model` is where the run's checkpoint is now, if it moved. Raises OutputError."""
        self._out = out
        self._config = recorded_config(out)
        self._moved_to = model
        self._renderer: PipelineRenderer | None = None
        self._device = ""
        self._renders: tuple[object, ...] = ()

    def render(self, row: Row) -> Rerendered:
        """Render the request of a metadata row, in a batch of the size that it was in, with as
        many CPU threads.

        Raises InputError where what it was made of is gone or has changed, MediaError where the
        file to compare with is gone, RowError where it cannot be rendered any more.
        """
        request = request_of(row)
        renderer = self._load(row)
        asked = replace(request, model=self._name(row))
        if row["num_threads"] is not None:
            torch.set_num_threads(row["num_threads"])
        batch = renderer.render([asked] * (row["batch_size"] or 1))
        if batch.errors[0] is not None:
            raise RowError(f"row {row['row_index']}: {batch.errors[0]}")
        made: list[Rerendered] = []
        for pixels, audio in _distinct(batch):
            made.append(self._compared(row, request, pixels, audio))
            if made[-1].is_equal:
                return made[-1]
        # Its frames were made here; the sound beside them is not what it was.
        same_file = [one for one in made if one.sha256 == one.recorded_sha256]
        return (same_file or made)[0]

    def _compared(
        self, row: Row, request: RenderRequest, pixels: Pixels, audio: Audio | None
    ) -> Rerendered:
        """Write what was rendered as the run would have, and compare it with what the run wrote."""
        with tempfile.TemporaryDirectory(prefix="raydiff-") as folder:
            # A file says which version wrote it.
            writer = Writer(folder, self._config.output, version=row["raydiff_version"])
            made = writer.save(request, pixels, audio)
            after = Path(folder), {"file_name": made.file_name, "size_bytes": made.size_bytes}
            similarity, snr = None, math.inf
            if made.sha256 != row["sha256"]:
                similarity = _compare_pixels((self._out, row), after)
            # An index of frames says nothing of the sound.
            is_known = similarity is None and not is_frames_index(made.file_name)
            if is_clip(made.file_name) and not is_known:
                snr = sound_snr(_sound(self._out, row), _sound(*after))
            data = (after[0] / made.file_name).read_bytes()
        return Rerendered(
            row_index=row["row_index"],
            request_id=request.request_id,
            file_name=describe_media(row) or "",
            sha256=made.sha256,
            recorded_sha256=row["sha256"],
            similarity=similarity,
            sound_snr=snr,
            device=self._device,
            recorded_device=row["device"],
            data=data,
            is_clip=request.video is not None,
        )

    def _load(self, row: Row) -> PipelineRenderer:
        """Return a renderer with the row's model under the row's profile and dtype."""
        wanted = (self._name(row), row["model_revision"], row["profile"], row["dtype"])
        if self._renderer is None or self._renders != wanted:
            self._renderer = None
            memory = self._config.memory.model_copy(update={"profile": row["profile"]})
            config = _with_dtype(self._config.model, memory, row["dtype"])
            info = resolve_model(
                self._name(row),
                revision=_pinned(row["model_revision"]),
                variant=config.variant,
                dtype=self._config.model.dtype,
            )
            if info.revision != row["model_revision"]:
                raise ModelError(
                    f"{info.name}: it is revision {info.revision} now; row {row['row_index']} was "
                    f"rendered with {row['model_revision']}. Put the old files back, or say where "
                    "they are: --model FOLDER."
                )
            renderer = PipelineRenderer(
                model=config, memory=memory, ltx2=self._config.ltx2, preload=info
            )
            self._device = renderer.start()
            self._renderer, self._renders = renderer, wanted
        return self._renderer

    def _name(self, row: Row) -> str:
        name: str = row["model"]
        is_runs_own = name == self._config.model.name
        return self._moved_to if is_runs_own and self._moved_to is not None else name


def _distinct(batch: Rendered) -> Iterator[tuple[Pixels, Audio | None]]:
    """Yield what a batch of copies of one request became, each outcome once.

    Threads share the sums of a batch out by its rows, so that a row's last bits may depend on its
    place among them; which place it had in the run is not recorded.
    """
    seen: list[tuple[Pixels, Audio | None]] = []
    for pixels, audio in zip(batch.pixels, batch.audio, strict=True):
        if not any(
            np.array_equal(pixels, other) and sound_snr(audio, sound) == math.inf
            for other, sound in seen
        ):
            seen.append((pixels, audio))
            yield pixels, audio


def _compare_pixels(before: Place, after: Place) -> Similarity:
    """Return how near the pixels of a run's file and a new one are. Raises OutputError."""
    row = before[1]
    comparison = FrameComparison()
    with _frames(*before) as olds, _frames(*after) as news:
        for old, new in zip_longest(olds, news):
            if old is None or new is None or old.shape != new.shape:
                raise OutputError(
                    f"{describe_media(row)}: its size or length is not what the metadata says: "
                    f"{row['width']}x{row['height']}. The file was changed."
                )
            comparison.add(old, new)
    return comparison.result()


@contextmanager
def _frames(out: str | Path, row: Row) -> Iterator[Iterator[Pixels]]:
    """Give the frames of a row's file; an image is one."""
    if is_clip(media_name(row)):
        with open_clip(out, row) as clip:
            yield clip.frames()
    else:
        with open_media(out, row) as file:
            yield iter([np.asarray(read_image(file))])


def _sound(out: str | Path, row: Row) -> Audio | None:
    with open_clip(out, row) as clip:
        return clip.sound()


def request_of(row: Row) -> RenderRequest:
    """Return the request that a metadata row was rendered for. Raises InputError."""
    if row["status"] != "completed":
        raise InputError(
            f"row {row['row_index']} is {row['status']}: {row['error']}. There is no file to make "
            "again; `raydiff retry-failed` tries such rows once more."
        )
    values = {name: row[name] for name in REQUEST_COLUMNS}
    request = with_request_id(RenderRequest(**values, video=_video(row)))
    if request.request_id != row["request_id"]:
        raise InputError(
            f"row {row['row_index']}: its request_id is {row['request_id']}; its columns give "
            f"{request.request_id} in this version. Use raydiff {row['raydiff_version']}."
        )
    if request.init_image is not None:
        _check_init_image(request, row["row_index"])
    return request


def _video(row: Row) -> VideoSettings | None:
    if row["num_frames"] is None:
        return None
    values = {name: row[name] for name in VIDEO_COLUMNS}
    return VideoSettings(**{**values, "stg_blocks": tuple(row["stg_blocks"])})


def _check_init_image(request: RenderRequest, row_index: int) -> None:
    folder, _, name = str(request.init_image).rpartition("/")
    try:
        _, sha256 = find_init_image(name, folder or "/")
    except RowError as error:
        raise InputError(f"row {row_index}: {error}") from None
    if sha256 != request.init_image_sha256:
        raise InputError(
            f"row {row_index}: init_image {request.init_image} has the sha256 {sha256}; it had "
            f"{request.init_image_sha256}. Put the old file back."
        )


def _with_dtype(model: ModelConfig, memory: MemoryConfig, dtype: str) -> ModelConfig:
    """Return the run's model section, with the dtype named where `auto` is another one here."""
    gpu = next(iter(visible_gpus()), None)
    if compute_dtype(model.dtype, memory, gpu) == dtype:
        return model
    return model.model_copy(update={"dtype": dtype})


def _pinned(revision: str) -> str | None:
    return None if revision.startswith("local-") else revision
