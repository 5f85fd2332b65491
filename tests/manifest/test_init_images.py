"""Init images: only intact files inside the input root, known by their content."""

import hashlib
import os
import random
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from raydiff.errors import RowError
from raydiff.manifest.init_images import find_init_image, read_init_image

NOBODY = 65534
SUFFIXES = ("png", "jpg", "webp")


def save(path: Path, *, size: tuple[int, int] = (48, 32), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random.Random(seed).randbytes(size[0] * size[1] * 3)
    Image.frombytes("RGB", size, pixels).save(path)
    return path


def refusal(text: str, root: Path | None) -> str:
    with pytest.raises(RowError) as caught:
        find_init_image(text, root)
    return str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_image_is_found_and_known_by_its_content(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / "in" / f"a.{suffix}")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    for text in (f"in/a.{suffix}", f"in/../in/a.{suffix}", str(path)):
        assert find_init_image(text, tmp_path) == (str(path), sha256)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    _, first = find_init_image("a.png", tmp_path)
    save(path, seed=1)
    os.utime(path, ns=(1, 2))
    _, second = find_init_image("a.png", tmp_path)
    assert first != second == hashlib.sha256(path.read_bytes()).hexdigest()


def test_nothing_outside_the_root_is_read(tmp_path: Path) -> None:
    save(tmp_path / "secret.png")
    root = tmp_path / "in"
    root.mkdir()
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    for text in ("../secret.png", "link.png", "up/secret.png", str(tmp_path / "secret.png")):
        message = refusal(text, root)
        assert f"outside the input root {root}" in message
        assert "--set input.root=FOLDER" in message


def test_a_root_that_is_a_link_itself_is_followed(tmp_path: Path) -> None:
    path = save(tmp_path / "real" / "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    found, _ = find_init_image("a.png", tmp_path / "link")
    assert found == str(path)


@pytest.mark.parametrize(
    "url",
    [
        "http://x.org/a.png",
        "https://x.org/a.png",
        "s3://b/a.png",
        "file:///etc/a.png",
        "data:image/png;base64,iVBORw0KGgo=",
    ],
)
def test_urls_are_not_fetched(tmp_path: Path, url: str) -> None:
    assert "URLs are not fetched. Download it" in refusal(url, tmp_path)


def test_a_remote_manifest_needs_a_root() -> None:
    assert "--set input.root=FOLDER" in refusal("a.png", None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no.png", "No such file"),
        ("no/no.png", "No such file"),
        ("a\0b.png", "null"),
        ("x" * 5000, "too long"),
        ("loop", "oop"),
        (".", "is not a file"),
        ("", "is not a file"),
        ("pipe", "is not a file"),
    ],
)
def test_what_is_no_file(tmp_path: Path, text: str, reason: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    message = refusal(text, tmp_path)
    assert reason in message
    assert len(message) < 500 + 2 * len(str(tmp_path))


def test_an_unreadable_file() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        folder.chmod(0o755)
        save(folder / "a.png").chmod(0)
        user = os.geteuid()
        if user == 0:  # root may read every file
            os.seteuid(NOBODY)
        try:
            assert "Permission denied. Make it readable." in refusal("a.png", folder)
        finally:
            os.seteuid(user)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_and_damaged_images(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a.{suffix}")
    whole = path.read_bytes()
    for size in (0, 1, 10, 40, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:size])
        assert "is not an intact PNG, JPEG or WebP image" in refusal(path.name, tmp_path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_random_damage_is_a_row_error_or_still_an_image(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(8)
    path = save(tmp_path / f"a.{suffix}")
    whole = path.read_bytes()
    num_refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 4, 30])):
            damaged[rng.randrange(min(len(damaged), rng.choice([60, 5000])))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            find_init_image(path.name, tmp_path)
        except RowError:
            num_refused += 1
            with pytest.raises(RowError):
                read_init_image(str(path))
        else:
            assert read_init_image(str(path)).mode == "RGB"
    assert num_refused > 20


def test_a_file_that_is_gone_when_it_is_rendered(tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"gone\.png: No such file"):
        read_init_image(str(tmp_path / "gone.png"))


def test_other_formats_are_refused(tmp_path: Path) -> None:
    for name in ("a.gif", "a.bmp", "a.tiff"):
        save(tmp_path / name)
        assert "is not an intact PNG, JPEG or WebP image" in refusal(name, tmp_path)
    save(tmp_path / "b.gif").rename(tmp_path / "b.png")
    assert "is not an intact PNG, JPEG or WebP image" in refusal("b.png", tmp_path)


def test_an_image_of_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.png", size=(100, 60))
    for limit in (5000, 2000):  # Pillow warns above its limit, and raises above twice of it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert f"has more than {limit:,} pixels. Scale it down." in refusal("a.png", tmp_path)
