"""mini-ltx2's clips: what they show, how they sound, and that the analysis tells them apart."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from raydiff.gemma_tokenizer import GemmaTokenizer, write_tiny_gemma_tokenizer
from raydiff.mini.ltx2.captions import clip_caption, clip_words
from raydiff.mini.ltx2.dataset import CHOICES, make_clips
from raydiff.mini.ltx2.draw import (
    HOP_LENGTH,
    NUM_MEL_FRAMES,
    SAMPLE_RATE,
    TONES,
    draw_clips,
    draw_sounds,
    on_the_way,
    table,
)
from raydiff.mini.ltx2.measure import listen, score_clip
from raydiff.mini.ltx2.recipe import MAX_TOKENS, MEL_BINS
from raydiff.mini.ltx2.scenes import (
    CANVAS,
    NUM_FRAMES,
    STEPS,
    ClipScene,
    is_held_out,
    sample_clip_scene,
    sample_way,
)
from raydiff.mini.ltx2.train_audio import mels
from raydiff.mini.scenes import SHAPES
from raydiff.mini.show import to_uint8
from raydiff.output.video.audio import Audio

Drawn = tuple[list[ClipScene], NDArray[np.uint8], NDArray[np.float32]]


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    rng = np.random.default_rng(5)
    scenes = [sample_clip_scene(rng) for _ in range(60)]
    tables = torch.from_numpy(np.stack([table(one, sample_way(one, rng), rng) for one in scenes]))
    frames = to_uint8(draw_clips(tables).transpose(1, 2).flatten(0, 1))
    clips = frames.reshape(len(scenes), NUM_FRAMES, CANVAS, CANVAS, 3)
    return scenes, clips, draw_sounds(tables).numpy()


def heard(samples: NDArray[np.float32]) -> Audio:
    return Audio(samples=samples, sample_rate=SAMPLE_RATE)


def test_a_drawn_clip_is_what_its_scene_says(drawn: Drawn) -> None:
    for scene, frames, samples in zip(*drawn, strict=True):
        assert score_clip(scene, frames, heard(samples)).is_right, scene


def test_a_clip_of_another_scene_is_wrong_in_what_differs(drawn: Drawn) -> None:
    names = {"color": "color", "shape": "shape", "direction": "direction"}
    names |= {"background": "background", "tone": "shape"}
    for scene, other, frames, samples in zip(drawn[0], drawn[0][1:], *drawn[1:], strict=False):
        score = score_clip(other, frames, heard(samples))
        for name, of_scene in names.items():
            same = getattr(scene, of_scene) == getattr(other, of_scene)
            assert getattr(score, name) is same, (name, scene, other)


def test_silence_noise_and_no_sound_have_no_tone(drawn: Drawn) -> None:
    scene, frames, samples = drawn[0][0], drawn[1][0], drawn[2][0]
    noise = np.random.default_rng(0).normal(0, 0.2, samples.shape).astype(np.float32)
    high = np.sin(2 * np.pi * 3000 * np.arange(samples.shape[1]) / SAMPLE_RATE)
    for other in (np.zeros_like(samples), noise, np.stack([high, high]).astype(np.float32)):
        assert listen(heard(other), NUM_FRAMES).shape is None
    assert not score_clip(scene, frames, None).tone


def test_sound_comes_from_where_the_shape_is(drawn: Drawn) -> None:
    moving = [index for index, one in enumerate(drawn[0]) if STEPS[one.direction][0]]
    for index in moving:
        places = listen(heard(drawn[2][index]), NUM_FRAMES).places[1:-1]
        steps = np.diff(places) * STEPS[drawn[0][index].direction][0]
        assert (steps > 0).all()


def test_swapped_channels_are_heard(drawn: Drawn) -> None:
    index = next(i for i, one in enumerate(drawn[0]) if one.direction == "left")
    swapped = score_clip(drawn[0][index], drawn[1][index], heard(drawn[2][index][::-1].copy()))
    assert swapped.pan is False
    assert swapped.tone


def test_a_vocoder_can_go_on_with_every_tone() -> None:
    assert {*TONES} == {*SHAPES}
    assert all(hertz % (SAMPLE_RATE / HOP_LENGTH) == 0 for hertz in TONES.values())


def test_spectrograms_have_the_size_that_the_latents_stand_for(drawn: Drawn) -> None:
    spectra = mels(torch.from_numpy(drawn[2][:2]))
    assert spectra.shape == (2, 2, NUM_MEL_FRAMES, MEL_BINS)


def test_a_clip_begins_where_another_is_on_its_way() -> None:
    clips = make_clips(4).tables
    later = draw_clips(on_the_way(clips, torch.full((4,), 0.5)), 1)
    torch.testing.assert_close(later[:, :, 0], draw_clips(clips)[:, :, NUM_FRAMES // 2])


def test_no_clip_to_train_on_is_held_out_and_all_is_said() -> None:
    clips = make_clips(300)
    again = make_clips(300)
    assert torch.equal(clips.tables, again.tables)
    assert clips.captions == again.captions
    scenes = [
        ClipScene(**{name: CHOICES[name][at] for name, at in zip(CHOICES, row, strict=True)})
        for row in clips.labels.tolist()
    ]
    assert not any(map(is_held_out, scenes))
    assert all(scene.color in clips.captions[4 * at] for at, scene in enumerate(scenes))
    rng = np.random.default_rng(0)
    held_out = sum(is_held_out(sample_clip_scene(rng)) for _ in range(2000))
    assert held_out / 2000 == pytest.approx(1 / 8, abs=0.05)


def test_every_word_is_a_token(tmp_path: object) -> None:
    folder = f"{tmp_path}/tokenizer"
    write_tiny_gemma_tokenizer(folder, clip_words(), max_length=MAX_TOKENS)
    tokenizer = GemmaTokenizer.from_folder(folder)
    rng = np.random.default_rng(1)
    texts = [clip_caption(sample_clip_scene(rng), rng) for _ in range(300)]
    tokens = tokenizer.encode(texts)
    words = [1 + len(text.replace(",", " ,").split()) for text in texts]
    assert list(tokens.lengths) == words
    assert max(words) <= MAX_TOKENS - 7
