"""The mel front-end against transformers' NumPy one, which equals librosa's, and on pure tones."""

import math

import pytest
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from raydiff.errors import RowError
from raydiff.models.ltx2.mel import log_mel, mel_filters


def reference_filters(num_mels, sample_rate):
    return mel_filter_bank(
        513, num_mels, 0.0, sample_rate / 2, sample_rate, norm="slaney", mel_scale="slaney"
    )


@pytest.mark.parametrize(("num_mels", "sample_rate"), [(64, 16000), (20, 8000)])
def test_filters_are_slaneys_with_equal_area(num_mels, sample_rate):
    filters = mel_filters(num_mels, sample_rate)
    expected = torch.from_numpy(reference_filters(num_mels, sample_rate))
    torch.testing.assert_close(filters, expected.float(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("num_samples", [513, 4000, 4160])
def test_spectrogram_equals_transformers(num_samples):
    sound = torch.rand(2, 2, num_samples, generator=torch.Generator().manual_seed(0)) * 2 - 1
    out = log_mel(sound, sample_rate=16000, hop_length=160, num_mels=64)
    assert out.shape == (2, 2, num_samples // 160 + 1, 64)
    for row, expected_row in zip(out.flatten(0, 1), sound.flatten(0, 1), strict=True):
        expected = spectrogram(
            expected_row.double().numpy(),
            window_function(1024, "hann"),
            frame_length=1024,
            hop_length=160,
            power=1.0,
            mel_filters=reference_filters(64, 16000),
            mel_floor=1e-5,
            log_mel="log",
        )
        torch.testing.assert_close(row.T, torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


def test_silence_is_the_logarithm_of_the_floor():
    out = log_mel(torch.zeros(1, 2, 1600), sample_rate=16000, hop_length=160, num_mels=64)
    torch.testing.assert_close(out, torch.full((1, 2, 11, 64), math.log(1e-5)))


def test_a_tone_is_loudest_in_its_own_mel():
    step = (15 + 27 * math.log(8) / math.log(6.4)) / 65  # Slaney's mels from 0 to 8 kHz
    centres = [11 * step * 200 / 3, 1000 * 6.4 ** ((51 * step - 15) / 27)]
    time = torch.arange(4000) / 16000
    sound = torch.stack([torch.sin(2 * math.pi * hertz * time) for hertz in centres])
    out = log_mel(sound[None], sample_rate=16000, hop_length=160, num_mels=64)
    assert out[0, :, 12].argmax(-1).tolist() == [10, 50]


def test_sound_of_half_precision_is_transformed_in_single():
    sound = torch.rand(1, 1, 2000, generator=torch.Generator().manual_seed(1)).bfloat16()
    out = log_mel(sound, sample_rate=16000, hop_length=160, num_mels=64)
    expected = log_mel(sound.float(), sample_rate=16000, hop_length=160, num_mels=64)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)


def test_too_short_a_sound_is_refused():
    with pytest.raises(RowError, match="512 samples; a spectrogram needs more than 512"):
        log_mel(torch.zeros(1, 2, 512), sample_rate=16000, hop_length=160, num_mels=64)
