"""Shape of an LTX-2 vocoder, as a diffusers `vocoder/config.json` tells it.

2.0 has one network, at 24 kHz; 2.3 has two of them, at 16 kHz and from there to 48 kHz.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod
from typing import Any, Literal

from raydiff.errors import ModelError
from raydiff.models.ltx2.options import check_options, check_positive

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
        names = [f.name for f in fields(cls)]
        accepted = {**_ACCEPTED, "_class_name": ("LTX2Vocoder",)}
        check_options("vocoder", config, known=names, accepted=accepted)
        return cls(**{name: _tuples(config[name]) for name in names if name in config})

    @property
    def samples_per_frame(self) -> int:
        """Samples that one mel frame becomes: 240."""
        return prod(self.upsample_factors)


_OPTIONS_23: dict[str, Any] = {
    "in_channels": 128,
    "hidden_channels": 1536,
    "out_channels": 2,
    "upsample_kernel_sizes": (11, 4, 4, 4, 4, 4),
    "upsample_factors": (5, 2, 2, 2, 2, 2),
    "act_fn": "snakebeta",
    "antialias": True,
    "final_act_fn": None,
    "final_bias": False,
}
"""What a config with two networks means by an option that it leaves out (diffusers' defaults)."""

_OPTIONS_23_BWE = {
    **_OPTIONS_23,
    "hidden_channels": 512,
    "upsample_kernel_sizes": (12, 11, 4, 4, 4),
    "upsample_factors": (6, 5, 2, 2, 2),
}

_SPECTROGRAM_23 = {"filter_length": 512, "hop_length": 80, "num_mel_channels": 64}

_RATES_23 = {"input_sampling_rate": 16000, "output_sampling_rate": 48000}


@dataclass(frozen=True, kw_only=True, slots=True)
class VocoderWithBWEConfig:
    """Two networks: the second adds the frequencies that the first one's sampling rate cannot hold
    (bandwidth extension), as it reads them off a spectrogram of the first one's sound."""

    vocoder: VocoderConfig
    bwe: VocoderConfig
    filter_length: int
    """Samples of one Fourier transform, all of them earlier than the mel frame's end."""
    hop_length: int
    num_mel_channels: int

    def __post_init__(self) -> None:
        for name in _SPECTROGRAM_23:
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
        sizes = {
            "bwe_upsample_factors' product": (
                self.bwe.samples_per_frame,
                self.hop_length * self.ratio,
                "hop_length times the sampling rates' ratio",
            ),
            "bwe_in_channels": (
                self.bwe.in_channels,
                self.vocoder.out_channels * self.num_mel_channels,
                "out_channels times num_mel_channels",
            ),
            "bwe_out_channels": (
                self.bwe.out_channels,
                self.vocoder.out_channels,
                "out_channels",
            ),
        }
        for name, (value, expected, meaning) in sizes.items():
            if value != expected:
                raise ModelError(
                    f"vocoder config: {name} is {value}; it must be {meaning}, {expected}. "
                    "Check vocoder/config.json."
                )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VocoderWithBWEConfig":
        """Read the config.json of two networks (LTX-2.3); ModelError for what we do not run."""
        names = [f.name for f in fields(VocoderConfig) if f.name != "output_sampling_rate"]
        spectrogram = {**_SPECTROGRAM_23, **_chosen(config, _SPECTROGRAM_23)}
        accepted = {
            "_class_name": ("LTX2VocoderWithBWE",),
            "window_length": (spectrogram["filter_length"],),
            **{prefix + name: _ACCEPTED[name] for name in _ACCEPTED for prefix in ("", "bwe_")},
        }
        known = (*names, *(f"bwe_{name}" for name in names), *_SPECTROGRAM_23, *_RATES_23)
        check_options("vocoder", config, known=known, accepted=accepted)
        rates = {**_RATES_23, **_chosen(config, _RATES_23)}
        first = {name: config[name] for name in names if name in config}
        second = {name: config[f"bwe_{name}"] for name in names if f"bwe_{name}" in config}
        return cls(
            vocoder=VocoderConfig.from_dict(
                {
                    **_OPTIONS_23,
                    **first,
                    "output_sampling_rate": rates["input_sampling_rate"],
                }
            ),
            bwe=VocoderConfig.from_dict(
                {
                    **_OPTIONS_23_BWE,
                    **second,
                    "output_sampling_rate": rates["output_sampling_rate"],
                }
            ),
            **spectrogram,
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


def _chosen(config: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in names if name in config}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
