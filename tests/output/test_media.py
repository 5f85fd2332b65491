"""Encoded images: the pixels come back, the request is inside, the bytes are always the same."""

import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

from raydiff.config import OutputConfig
from raydiff.errors import OutputError
from raydiff.output.media import encode_image, read_image_metadata

HARD_TEXT = 'a \x00 b\nc "quoted" \\ 山 é 🏔️ &amp; ../../etc/passwd \u202e'
METADATA = {"prompt": HARD_TEXT, "negative_prompt": None, "seed": 2**63 - 1, "guidance_scale": 7.5}


def smooth_image(height: int, width: int) -> np.ndarray:
    """A picture that JPEG and WebP keep nearly as it is, with some noise."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(y / 9 + phase) + np.cos(x / 11 - phase) for phase in rng.uniform(0, 6, 3)]
    noise = rng.normal(0, 1, (height, width, 3))
    return (127 + 50 * np.stack(waves, axis=-1) + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("image", ["png", "jpg", "webp"])
def test_pixels_and_request_come_back(image, tmp_path):
    pixels = smooth_image(40, 72)
    path = tmp_path / f"x.{image}"
    path.write_bytes(encode_image(pixels, config=OutputConfig(image=image), metadata=METADATA))
    with Image.open(path) as opened:
        decoded = np.asarray(opened.convert("RGB"), dtype=np.int16)
        assert opened.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[image]
    difference = np.abs(decoded - pixels)
    assert difference.max() == 0 if image == "png" else difference.mean() < 4
    assert read_image_metadata(path) == METADATA


@pytest.mark.parametrize("image", ["png", "jpg", "webp"])
def test_stripped_file_holds_nothing_of_the_request(image, tmp_path):
    config = OutputConfig(image=image, strip_metadata=True)
    data = encode_image(smooth_image(16, 16), config=config, metadata={"prompt": "SECRET"})
    path = tmp_path / f"x.{image}"
    path.write_bytes(data)
    assert read_image_metadata(path) is None
    assert b"SECRET" not in data
    assert "SECRET".encode("utf-16-be") not in data
    assert data == encode_image(smooth_image(16, 16), config=config, metadata=None)


def test_same_input_gives_same_bytes():
    configs = [OutputConfig(image=image) for image in ("png", "jpg", "webp")]
    pixels = smooth_image(33, 17)
    first = [encode_image(pixels, config=config, metadata=METADATA) for config in configs]
    time.sleep(1.1)  # Past a whole second: a time stamp would show.
    assert [encode_image(pixels, config=config, metadata=METADATA) for config in configs] == first


@pytest.mark.parametrize("image", ["png", "jpg", "webp"])
def test_a_prompt_of_100_kilobytes_is_embedded_as_far_as_the_format_can(image, tmp_path):
    prompt = "".join(np.random.default_rng(3).choice(list("abc \x00é山🏔"), 100_000))
    path = tmp_path / f"x.{image}"
    metadata = {"prompt": prompt, "seed": 5}
    path.write_bytes(
        encode_image(smooth_image(16, 16), config=OutputConfig(image=image), metadata=metadata)
    )
    found = read_image_metadata(path)
    if image == "jpg":
        assert found["is_truncated"] is True
        assert found["seed"] == 5
        assert len(found["prompt"]) >= 4000
        assert prompt.startswith(found["prompt"])
    else:
        assert found == metadata


@pytest.mark.parametrize("image", ["png", "jpg", "webp"])
def test_a_prompt_that_is_not_utf8_is_embedded(image, tmp_path):
    path = tmp_path / f"x.{image}"
    config = OutputConfig(image=image)
    path.write_bytes(encode_image(smooth_image(16, 16), config=config, metadata={"p": "a\udc80b"}))
    assert read_image_metadata(path) == {"p": "a\udc80b"}


def test_jpeg_comment_is_what_viewers_of_generated_images_read():
    data = encode_image(
        smooth_image(16, 16), config=OutputConfig(image="jpg"), metadata={"prompt": "山"}
    )
    assert b"UNICODE\0" + '{"prompt":"山"}'.encode("utf-16-be") in data


def test_not_contiguous_pixels_are_encoded_as_they_look():
    pixels = smooth_image(20, 30)[::-1, ::2]
    data = encode_image(pixels, config=OutputConfig(), metadata=None)
    with Image.open(io.BytesIO(data)) as opened:
        np.testing.assert_array_equal(np.asarray(opened), pixels)


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)],
    ids=["float", "grey", "alpha"],
)
def test_anything_but_uint8_rgb_is_refused(pixels):
    with pytest.raises(ValueError, match="expected uint8"):
        encode_image(pixels, config=OutputConfig(), metadata=None)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_reading_something_else_is_an_error_that_names_it(content, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(OutputError, match=r"x\.png"):
        read_image_metadata(path)
    with pytest.raises(OutputError, match="missing"):
        read_image_metadata(tmp_path / "missing")


def test_foreign_images_have_no_request(tmp_path):
    image = Image.fromarray(smooth_image(16, 16))
    for suffix in ("png", "jpg", "webp"):
        image.save(tmp_path / f"x.{suffix}")
        assert read_image_metadata(tmp_path / f"x.{suffix}") is None


@pytest.mark.parametrize("image", ["png", "webp"])
def test_encoding_lets_other_threads_run(image):
    pixels = np.random.default_rng(0).integers(0, 256, (1536, 1536, 3), dtype=np.uint8)
    config = OutputConfig(image=image, png_compression=6)
    thread = threading.Thread(
        target=encode_image, args=(pixels,), kwargs={"config": config, "metadata": None}
    )
    wakes = 0
    started = time.perf_counter()
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        wakes += 1
    elapsed_s = time.perf_counter() - started
    assert wakes / elapsed_s > 50  # About 600 a second if the lock is free, 2 if it is kept.
