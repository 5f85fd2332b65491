"""Shape of an LTX-2 vocoder, as a diffusers `vocoder/config.json` tells it.

2.0 has one network, at 24 kHz; 2.3 has two of them, at 16 kHz and from there to 48 kHz.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any, Literal

from raydiff.errors import ModelError
from raydiff.models.options import check_options, check_positive

_INTEGERS = (
    "in_channels",
    "hidden_channels",
    "out_channels",
    "upsample_kernel_sizes",
    "upsample_factors",
    "resnet_kernel_sizes",
    "resnet_dilations",
    "antialias_ratio",
    "antialias_kernel_size",
    "output_sampling_rate",
)

_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("leaky_relu", "snakebeta"),
    "final_act_fn": ("tanh", "clamp", None),
    "final_bias": (True, False),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class VocoderConfig:
    """Shape of one network; names and defaults are diffusers' own, of LTX-2.0."""

    in_channels: int = 128
    """Sound channels times mel bins."""
    hidden_channels: int = 1024
    out_channels: int = 2
    upsample_kernel_sizes: tuple[int, ...] = (16, 15, 8, 4, 4)
    upsample_factors: tuple[int, ...] = (6, 5, 2, 2, 2)
    resnet_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resnet_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    act_fn: Literal["leaky_relu", "snakebeta"] = "leaky_relu"
    leaky_relu_negative_slope: float = 0.1
    antialias: bool = False
    """Whether activations run at a higher rate."""
    antialias_ratio: int = 2
    antialias_kernel_size: int = 12
    final_act_fn: Literal["tanh", "clamp"] | None = "tanh"
    final_bias: bool = True
    output_sampling_rate: int = 24000

    def __post_init__(self) -> None:
        for name in _INTEGERS:
            value = getattr(self, name)
            for item in value if name == "resnet_dilations" else (value,):
                check_positive("vocoder", name, item)
        self._check_lengths("upsample_kernel_sizes", "upsample_factors")
        self._check_lengths("resnet_kernel_sizes", "resnet_dilations")
        self._check_kernel_sizes()
        if self.antialias != (self.act_fn == "snakebeta"):
            raise ModelError(
                f"vocoder config: act_fn is {self.act_fn} and antialias {self.antialias}; only "
                "snakebeta with anti-aliasing and leaky_relu without can be run. "
                "Check vocoder/config.json."
            )
        if self.hidden_channels % 2 ** len(self.upsample_factors):
            raise ModelError(
                f"vocoder config: hidden_channels is {self.hidden_channels}; each of the "
                f"{len(self.upsample_factors)} upsample_factors halves it. Use a multiple of "
                f"{2 ** len(self.upsample_factors)} in vocoder/config.json."
            )

    def _check_lengths(self, name: str, other: str) -> None:
        lengths = len(getattr(self, name)), len(getattr(self, other))
        if lengths[0] != lengths[1]:
            raise ModelError(
                f"vocoder config: {name} has {lengths[0]} values and {other} {lengths[1]}; the "
                "counts must be equal. Check vocoder/config.json."
            )

    def _check_kernel_sizes(self) -> None:
        for size, factor in zip(self.upsample_kernel_sizes, self.upsample_factors, strict=True):
            if size < factor or (size - factor) % 2:
                raise ModelError(
                    f"vocoder config: upsample_kernel_sizes has {size} for a factor of {factor}; "
                    "it must be the factor plus an even number, or the sound's length is not the "
                    "spectrogram's times the factors. Check vocoder/config.json."
                )
        for size in self.resnet_kernel_sizes:
            if size % 2 == 0:
                raise ModelError(
                    f"vocoder config: resnet_kernel_sizes has {size}; only odd sizes can be run. "
                    "Check vocoder/config.json."
                )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VocoderConfig":
        """Read the config.json of one network (LTX-2.0); ModelError for what we do not run."""
        options = {f.name: f.name for f in fields(cls)}
        accepted = {**_ACCEPTED, "_class_name": ("LTX2Vocoder",)}
        check_options("vocoder", config, known=options, accepted=accepted)
        return cls(**_fields(config, options))

    @property
    def samples_per_frame(self) -> int:
        """Samples that one mel frame becomes: 240."""
        return prod(self.upsample_factors)


FIRST_23 = VocoderConfig(
    hidden_channels=1536,
    upsample_kernel_sizes=(11, 4, 4, 4, 4, 4),
    upsample_factors=(5, 2, 2, 2, 2, 2),
    act_fn="snakebeta",
    antialias=True,
    final_act_fn=None,
    final_bias=False,
    output_sampling_rate=16000,
)
"""LTX-2.3's first network: what a config with two of them means by an option that it leaves out."""

SECOND_23 = replace(
    FIRST_23,
    hidden_channels=512,
    upsample_kernel_sizes=(12, 11, 4, 4, 4),
    upsample_factors=(6, 5, 2, 2, 2),
    output_sampling_rate=48000,
)

_FIRST_OPTIONS = {
    **{f.name: f.name for f in fields(VocoderConfig)},
    "output_sampling_rate": "input_sampling_rate",
}
"""By field, the option of a config with two networks."""

_SECOND_OPTIONS = {
    **{f.name: f"bwe_{f.name}" for f in fields(VocoderConfig)},
    "output_sampling_rate": "output_sampling_rate",
}

_SPECTROGRAM_OPTIONS = ("filter_length", "hop_length", "num_mel_channels")

_WINDOW_LENGTH = 512
"""Where a config leaves it out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VocoderWithBWEConfig:
    """Two networks: the second adds the frequencies that the first one's sampling rate cannot hold
    (bandwidth extension), as it reads them off a spectrogram of the first one's sound."""

    vocoder: VocoderConfig = FIRST_23
    bwe: VocoderConfig = SECOND_23
    filter_length: int = 512
    """Samples that one frame of that spectrogram is made of, up to the frame's end."""
    hop_length: int = 80
    num_mel_channels: int = 64

    def __post_init__(self) -> None:
        for name in _SPECTROGRAM_OPTIONS:
            check_positive("vocoder", name, getattr(self, name))
        rates = self.vocoder.output_sampling_rate, self.bwe.output_sampling_rate
        if rates[1] % rates[0]:
            raise ModelError(
                f"vocoder config: output_sampling_rate is {rates[1]}; it must be a multiple of "
                f"input_sampling_rate, {rates[0]}. Check vocoder/config.json."
            )
        if self.hop_length > self.filter_length:
            raise ModelError(
                f"vocoder config: hop_length is {self.hop_length}; it must be no more than "
                f"filter_length, {self.filter_length}. Check vocoder/config.json."
            )
        channels = self.vocoder.out_channels
        self._check_equal(
            "bwe_upsample_factors' product",
            self.bwe.samples_per_frame,
            "hop_length times the sampling rates' ratio",
            self.hop_length * self.ratio,
        )
        self._check_equal(
            "bwe_in_channels",
            self.bwe.in_channels,
            "out_channels times num_mel_channels",
            channels * self.num_mel_channels,
        )
        self._check_equal("bwe_out_channels", self.bwe.out_channels, "out_channels", channels)

    def _check_equal(self, name: str, value: int, meaning: str, expected: int) -> None:
        if value != expected:
            raise ModelError(
                f"vocoder config: {name} is {value}; it must be {meaning}, {expected}. "
                "Check vocoder/config.json."
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VocoderWithBWEConfig":
        """Read the config.json of two networks (LTX-2.3); ModelError for what we do not run."""
        options = {"filter_length": cls().filter_length, "window_length": _WINDOW_LENGTH, **config}
        accepted = {
            "_class_name": ("LTX2VocoderWithBWE",),
            "window_length": (options["filter_length"],),
            **{prefix + name: _ACCEPTED[name] for name in _ACCEPTED for prefix in ("", "bwe_")},
        }
        known = (*_FIRST_OPTIONS.values(), *_SECOND_OPTIONS.values(), *_SPECTROGRAM_OPTIONS)
        check_options("vocoder", options, known=known, accepted=accepted)
        return cls(
            vocoder=replace(FIRST_23, **_fields(config, _FIRST_OPTIONS)),
            bwe=replace(SECOND_23, **_fields(config, _SECOND_OPTIONS)),
            **{name: config[name] for name in _SPECTROGRAM_OPTIONS if name in config},
        )

    @property
    def ratio(self) -> int:
        """Samples of the result for each of the first network's: 3."""
        return self.output_sampling_rate // self.vocoder.output_sampling_rate

    @property
    def output_sampling_rate(self) -> int:
        """Samples in a second of the result."""
        return self.bwe.output_sampling_rate

    @property
    def samples_per_frame(self) -> int:
        """Samples that one mel frame becomes: 480."""
        return self.vocoder.samples_per_frame * self.ratio


def _fields(config: Mapping[str, Any], options: Mapping[str, str]) -> dict[str, Any]:
    """The fields that `config` gives a value, by the names that their options have there."""
    return {field: _tuples(config[option]) for field, option in options.items() if option in config}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
