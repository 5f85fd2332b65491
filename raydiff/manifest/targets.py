"""What a model and a run make of a row: the values that it leaves open, and the model's own rules.
The row's value goes before the run's default, and that before the model's."""

import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from raydiff.config import RunConfig
from raydiff.errors import ConfigError, RowError
from raydiff.manifest.schema import COLUMNS, check_value, quoted
from raydiff.manifest.video_rules import (
    check_video_mode,
    subject,
    video_defaults,
    video_problems,
    video_size_multiple,
)
from raydiff.request import ModelInfo
from raydiff.video_codecs import VideoFormat, rate_problem
from raydiff.video_settings import VideoSettings

Values = Mapping[str, Any]

FAMILY_TITLES = {"sd21": "SD 2.1", "sdxl": "SDXL", "ltx2": "LTX-2"}

VIDEO_FIELDS = tuple(field.name for field in fields(VideoSettings))
IMAGE_FIELDS = ("strength",)
"""A clip that starts from an image has it as its first frame, whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A model, and what a row that names nothing else asks of it."""

    info: ModelInfo
    title: str
    size_multiple: int
    defaults: dict[str, Any]
    video_format: VideoFormat
    """Of the files that clips become."""

    def problems(self, values: Values) -> Iterator[str]:
        """Yield what is wrong with a row's values, each of which keeps its column's rule; and with
        the run's defaults where the row leaves them."""
        merged = {**self.defaults, **values}
        yield from self._size_problems(merged, values)
        yield from self._foreign_problems(values, values)
        if merged["sampler"] not in self.info.samplers:
            yield (
                f"{subject('sampler', values)} is {quoted(merged['sampler'])}; {self.title} offers "
                f"{', '.join(self.info.samplers)}. Choose one of these, or leave it null."
            )
        if self.info.video is None:
            yield from _strength_problems(merged, values)
        else:
            yield from video_problems(merged, self.info, values)
            problem = rate_problem(self.video_format, merged["frame_rate"])
            if problem is not None:
                yield f"{subject('frame_rate', values)} {problem}"

    def run_problems(self, run: Values) -> Iterator[str]:
        """Yield what is wrong with the run's defaults where every row is of this model."""
        yield from self._foreign_problems(run, ())
        yield from self.problems({})

    def video(self, merged: Values) -> VideoSettings | None:
        """Return the settings of a clip; None where the model makes images."""
        if self.info.video is None:
            return None
        return VideoSettings(**{name: merged[name] for name in VIDEO_FIELDS})

    def _size_problems(self, merged: Values, values: Container[str]) -> Iterator[str]:
        multiple = self.size_multiple
        is_one_stage = multiple == self.info.size_multiple
        whose = self.title if is_one_stage else f"{self.title} in two stages"
        for name in ("height", "width"):
            size = merged[name]
            if size % multiple:
                column = COLUMNS[name]
                below = size - size % multiple
                fitting = [n for n in (below, below + multiple) if column.low <= n <= column.high]
                yield (
                    f"{subject(name, values)} is {size}; {whose} needs a multiple of {multiple}. "
                    f"Use {' or '.join(map(str, fitting))}."
                )

    def _foreign_problems(self, given: Values, values: Container[str]) -> Iterator[str]:
        """Yield which of the values say something of clips to a model of images, or the reverse."""
        makes = "images" if self.info.video is None else "clips"
        foreign = _foreign_fields(self.info)
        for name, value in given.items():
            if name in foreign and (name, value) != ("num_frames", 1):  # an image is one frame
                shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
                yield (
                    f"{subject(name, values)} is {shown}; {self.title} makes {makes}. "
                    "Leave it null."
                )


def make_target(info: ModelInfo, config: RunConfig, run: Values) -> Target:
    """Return the target of a model under the run's defaults. Raises ConfigError where the model
    cannot do what the run's sections ask of its kind."""
    size_multiple = info.size_multiple
    of_model = {
        "model": info.name,
        "model_revision": info.revision,
        "height": info.default_height,
        "width": info.default_width,
        "num_inference_steps": info.default_num_inference_steps,
        "guidance_scale": info.default_guidance_scale,
        "guidance_rescale": 0.0,
        "sampler": info.default_sampler,
        "strength": info.default_strength,
        "negative_prompt": None,
        "seed": None,
        "init_image_sha256": None,
    }
    if info.video is not None:
        mode = config.ltx2.mode
        check_video_mode(info, mode)
        of_model |= video_defaults(info, mode) | {"text_encoder": config.ltx2.text_encoder}
        of_model["strength"] = None
        size_multiple = video_size_multiple(info, mode)
    foreign = _foreign_fields(info)
    of_run = {name: value for name, value in run.items() if name not in foreign}
    return Target(
        info=info,
        title=FAMILY_TITLES.get(info.family, info.family),
        size_multiple=size_multiple,
        defaults=of_model | of_run,
        video_format=config.output.video,
    )


def _foreign_fields(info: ModelInfo) -> tuple[str, ...]:
    """Return what says nothing to a model of this kind."""
    return VIDEO_FIELDS if info.video is None else IMAGE_FIELDS


def run_defaults(config: RunConfig) -> dict[str, Any]:
    """Return the defaults that the run sets, checked like a row's values. Raises ConfigError."""
    values, problems = check_values(
        {name: value for name, value in config.defaults if value is not None}
    )
    if problems:
        raise ConfigError(f"defaults: {' '.join(problems)}")
    return values


def check_values(given: Values) -> tuple[dict[str, Any], list[str]]:
    """Return the values that keep their column's rule, and what is wrong with the others."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in given.items():
        try:
            values[name] = check_value(name, value)
        except RowError as error:
            problems.append(str(error))
    return values, problems


def _strength_problems(merged: Values, values: Container[str]) -> Iterator[str]:
    """img2img runs the last int(steps * strength) steps, as the reference does: at least one."""
    steps, strength = merged["num_inference_steps"], merged["strength"]
    if "init_image" in values and int(steps * strength) < 1:
        least = math.ceil(1000 / steps) / 1000
        yield f"strength is {strength}; it leaves none of {steps} steps. Use {least} or more."
