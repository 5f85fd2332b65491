"""Contact sheets: what is in which cell, on which page, with which text; and what goes wrong."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PdfParser

from raydiff.errors import ConfigError, OutputError
from raydiff.output.sheet.file import check_sheet_path, write_pages
from raydiff.output.sheet.grid import read_grid
from raydiff.output.sheet.lettering import Lettering, one_line
from raydiff.output.sheet.pictures import FRAME_GAP, make_picture
from raydiff.output.sheet.sheet import Sheet, describe
from tests.output.generated_runs import write_run, write_video

COLUMNS = pa.schema([("style", pa.string()), ("tags", pa.list_(pa.int64())), ("none", pa.int8())])
ODD_PROMPTS = [
    "<script>alert(\"x\")</script> & 'quotes'",
    "مرحبا بالعالم \u202egnp.exe",
    "山の写真 🏔 café",
    "x" * 10_000,
    "two\nlines\ttab\0nul",
    "",
]


def flat(*colour: int) -> np.ndarray:
    return np.full((32, 48, 3), colour, np.uint8)


def colour_of(cell: tuple[int, int, int]) -> tuple[int, int, int]:
    """A colour for each of 5 x 4 x 3 cells, far from the others and from the paper."""
    x, y, z = cell
    return (20 + 40 * x, 20 + 50 * y, 20 + 80 * z)


@pytest.fixture
def grid_run(tmp_path: Path) -> Path:
    """Rows of 5 seeds, 4 guidance scales and 3 styles, not in order; one cell has none."""
    rows = [
        {
            "seed": [1, 2, 3, 10, 20][x],
            "guidance_scale": [2.5, 3.0, 7.5, 12.0][y],
            "style": ["photo", "ink", "oil"][z],
            "pixels": flat(*colour_of((x, y, z))),
            "prompt": f"style {z}",
        }
        for z in range(3)
        for x in (3, 1, 4, 0, 2)
        for y in (2, 0, 3, 1)
        if (x, y, z) != (4, 3, 1)
    ]
    return write_run(tmp_path / "out", rows, columns=COLUMNS)


def blocks(page: Image.Image, box: tuple[int, int]) -> dict[tuple[int, int], tuple[int, ...]]:
    """Return the colour of each place of a box's size that is of one strong colour."""
    pixels = np.asarray(page).astype(int)
    colours = {}
    strong = (np.abs(pixels - 255).max(axis=2) > 40) & (np.ptp(pixels, axis=2) >= 0)
    width, height = box
    for top in range(pixels.shape[0] - height):
        row = np.flatnonzero(strong[top])
        if not len(row):
            continue
        for left in row:
            if left + width > pixels.shape[1]:
                break
            before = left and (pixels[top, left - 1] == pixels[top, left]).all()
            above = top and (pixels[top - 1, left] == pixels[top, left]).all()
            area = pixels[top : top + height, left : left + width]
            if not before and not above and (area == area[0, 0]).all():
                colours[top, int(left)] = tuple(area[0, 0].tolist())
    return colours


def test_cells_are_where_their_values_say(grid_run: Path) -> None:
    grid, num_left_out = read_grid(grid_run, x="seed", y="guidance_scale", z="style")
    assert num_left_out == 0
    assert grid.x.values == (1, 2, 3, 10, 20)
    assert grid.y.labels == ["2.5", "3", "7.5", "12"]
    assert grid.z.values == ("photo", "ink", "oil")  # texts stay in the manifest's order
    sheet = Sheet(grid_run, grid, cell_size=48)
    pages = list(sheet)
    assert len(pages) == len(sheet) == 3
    for z, page in enumerate(pages):
        found = blocks(page, (48, 32))
        tops = sorted({top for top, _ in found})
        lefts = sorted({left for _, left in found})
        assert (len(tops), len(lefts)) == (4, 5)
        for (top, left), colour in found.items():
            assert colour == colour_of((lefts.index(left), tops.index(top), z))
        assert len(found) == (19 if z == 1 else 20)
    assert sheet.problems == {"empty": 1}


def test_what_is_ambiguous_is_counted_and_named(tmp_path: Path) -> None:
    rows = [
        {"seed": seed, "sampler": sampler, "prompt": "same", **extra}
        for seed in (1, 2)
        for sampler, extra in (
            ("euler", {"error": "out of memory"} if seed == 1 else {}),
            ("ddim", {}),
        )
    ]
    out = write_run(tmp_path / "out", rows)
    grid, _ = read_grid(out, x="seed")
    assert (grid.num_ambiguous, grid.most_results) == (2, 2)
    assert grid.differing() == ["sampler"]
    assert grid.cell(0, 0, 0).row["sampler"] == "ddim"  # the first completed one
    assert grid.cell(1, 0, 0).row["sampler"] == "euler"
    assert grid.cell(0, 0, 0).num_results == 2
    assert read_grid(out, x="seed", y="sampler")[0].num_ambiguous == 0
    assert grid.constants()["prompt"] == "same"
    assert "seed" not in grid.constants()


def test_any_column_can_be_an_axis(grid_run: Path, tmp_path: Path) -> None:
    assert read_grid(grid_run, x="style")[0].x.values == ("photo", "ink", "oil")
    assert read_grid(grid_run, y="status")[0].y.values == ("completed",)
    rows = [{"seed": 1, "tags": [1, 2]}, {"seed": 2, "tags": []}, {"seed": 3, "tags": [1, 2]}]
    rows += [{"seed": 4, "negative_prompt": ""}]
    out = write_run(tmp_path / "other", rows, columns=COLUMNS)
    assert read_grid(out, x="tags")[0].x.labels == ["[1, 2]", "[]", "(none)"]
    assert read_grid(out, x="negative_prompt")[0].x.labels == ["(empty)", "(none)"]
    assert read_grid(out, x="finished_at", y="image_index")[0].shape == (4, 1, 1)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"x": "guidance"}, 'did you mean "guidance_scale"'),
        ({"x": "Seed"}, 'did you mean "seed"'),
        ({"y": "none"}, "'none' is empty"),
        ({"x": "seed", "z": "seed"}, "given twice"),
    ],
)
def test_bad_axes_are_refused(grid_run: Path, axes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_grid(grid_run, **axes)


def test_what_is_no_run_or_has_no_results(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not a run"):
        read_grid(tmp_path)
    with pytest.raises(OutputError, match="no results yet"):
        read_grid(write_run(tmp_path / "out", []))


def test_rows_without_a_picture_show_why(tmp_path: Path) -> None:
    rows = [{"seed": seed} for seed in range(4)]
    rows += [{"seed": 4, "error": "out of memory"}, {"bad": "row 5: no prompt"}]
    out = write_run(tmp_path / "out", rows)
    grid, _ = read_grid(out)
    files = [grid.cell(place, 0, 0).row["file_name"] for place in range(4)]
    (out / files[0]).unlink()
    (out / files[1]).write_bytes((out / files[1]).read_bytes()[:200])
    (out / files[2]).write_bytes(b"GIF89a")
    said = [make_picture(out, grid.cell(place, 0, 0).row, (48, 48), 4) for place in range(6)]
    assert [one.problem for one in said] == ["missing", "broken", "broken", "", "failed", "failed"]
    for place in range(3):
        assert files[place] in said[place].message
    assert said[3].image.size == (48, 32)
    assert said[5].message == "row 5: no prompt"
    sheet = Sheet(out, grid, cell_size=96)
    list(sheet)
    assert sheet.problems == {"missing": 1, "broken": 2, "failed": 2}
    grid, num_left_out = read_grid(out, x="seed")
    assert (grid.shape, num_left_out) == ((5, 1, 1), 1)


def test_odd_prompts_are_text(tmp_path: Path) -> None:
    rows = [{"seed": seed, "prompt": text} for seed in range(2) for text in ODD_PROMPTS]
    out = write_run(tmp_path / "out", rows)
    for axes in ({}, {"x": "prompt"}, {"y": "prompt", "x": "seed"}, {"z": "prompt"}):
        grid, _ = read_grid(out, **axes)
        sheet = Sheet(out, grid, cell_size=32)
        for page in sheet:
            assert max(page.size) <= 3200
        assert not sheet.missing_characters & set("abcxyz<>&'\"é")


def test_lines_fit_and_lose_nothing() -> None:
    lettering = Lettering(size=14, colour=(0, 0, 0))
    text = "a red fox in the snow, a lighthouse on a cliff at dusk, oil painting; café"
    paragraph = lettering.wrap(text, 150, 50)
    assert " ".join(paragraph.lines) == text
    assert len(paragraph.lines) > 2
    assert all(lettering.width(line) <= 150 for line in paragraph.lines)
    long_word = lettering.wrap("x" * 300, 150, 50)
    assert "".join(long_word.lines) == "x" * 300
    clipped = lettering.wrap(text, 150, 2)
    assert len(clipped.lines) == 2
    assert clipped.lines[-1].endswith("...")
    assert lettering.wrap("", 150, 2).lines == []
    assert len(one_line("y" * 10_000)) < 1000
    assert one_line("a\u202e\n\0b\u2066") == "a b"


def test_long_axes_are_divided_over_pages_evenly(tmp_path: Path) -> None:
    rows = [{"seed": seed, "width": 16, "height": 16} for seed in range(45)]
    out = write_run(tmp_path / "out", rows)
    grid, _ = read_grid(out, x="seed")
    sheet = Sheet(out, grid, cell_size=180)
    widths = [page.size[0] for page in sheet]
    assert len(widths) == len(sheet) == 3
    assert len(set(widths)) == 1
    assert all(2500 < width <= 3200 for width in widths)
    by_row = Sheet(out, read_grid(out, y="seed")[0], cell_size=180)
    assert len(by_row) == 3
    assert len(Sheet(out, read_grid(out)[0], cell_size=180)) == 1
    assert len(Sheet(out, read_grid(out, limit=7)[0], cell_size=2000)) == 7


def test_too_many_pages_are_refused(tmp_path: Path) -> None:
    rows = [{"seed": seed, "width": 16, "height": 16} for seed in range(60)]
    out = write_run(tmp_path / "out", rows)
    grid, _ = read_grid(out, x="seed", y="request_id", z="row_index")
    with pytest.raises(ConfigError, match=r"60 of 216,000 cells have a result\).*--limit"):
        Sheet(out, grid, cell_size=600)


def test_pages_as_files(grid_run: Path, tmp_path: Path) -> None:
    grid, _ = read_grid(grid_run, x="seed", y="guidance_scale", z="style")
    sheet = Sheet(grid_run, grid, cell_size=48)
    files = list(write_pages(tmp_path / "sheet.png", sheet, len(sheet)))
    assert [path.name for path in files] == ["sheet-01.png", "sheet-02.png", "sheet-03.png"]
    for path, page in zip(files, sheet, strict=True):
        with Image.open(path) as image:
            assert image.tobytes() == page.tobytes()
    (pdf,) = write_pages(tmp_path / "sheet.pdf", sheet, len(sheet))
    with PdfParser.PdfParser(str(pdf)) as parser:
        assert len(parser.pages) == 3
    one, _ = read_grid(grid_run, x="seed")
    single = list(write_pages(tmp_path / "one.png", Sheet(grid_run, one), 1))
    assert [path.name for path in single] == ["one.png"]
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert names == {"one.png", "sheet.pdf", *(path.name for path in files)}


@pytest.mark.parametrize("name", ["sheet.gif", "sheet", "gone/sheet.png"])
def test_a_bad_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / name))):
        check_sheet_path(tmp_path / name)


def test_a_video_is_a_strip_of_frames(tmp_path: Path) -> None:
    out = write_run(tmp_path / "out", [{"seed": 1}])
    (out / "videos").mkdir()
    shades = [10 * number for number in range(1, 22)]
    write_video(out / "videos" / "film.mp4", [flat(one, 0, 255 - one) for one in shades])
    metadata = next((out / "metadata").glob("part-*.parquet"))
    table = pq.read_table(metadata)
    place = table.column_names.index("file_name")
    pq.write_table(table.set_column(place, "file_name", [["videos/film.mp4"]]), metadata)
    grid, _ = read_grid(out, x="seed")
    picture = make_picture(out, grid.cell(0, 0, 0).row, (48, 48), 5)
    assert picture.image.size == (5 * 48 + 4 * FRAME_GAP, 32)
    shown = [picture.image.getpixel((20 + number * (48 + FRAME_GAP), 16)) for number in range(5)]
    assert shown == [(one, 0, 255 - one) for one in (10, 60, 110, 160, 210)]
    sheet = Sheet(out, grid, cell_size=48, num_frames=3)
    (page,) = sheet
    assert sheet.problems == {}
    assert page.size[0] >= 3 * 48 + 2 * FRAME_GAP
    (out / "videos" / "film.mp4").write_bytes(b"not a video" * 30)
    assert make_picture(out, grid.cell(0, 0, 0).row, (48, 48), 5).problem == "broken"


def test_settings_in_words() -> None:
    settings = {
        "model": "/models/tiny", "width": 64, "height": 32, "num_inference_steps": 30,
        "guidance_scale": 7.5, "guidance_rescale": 0.0, "sampler": "euler", "task": "txt2img",
        "seed": 3, "negative_prompt": "",
    }  # fmt: skip
    assert describe(settings) == "tiny, 64x32, 30 steps, guidance 7.5, euler, seed 3"


MEASURE = """
import sys
from pathlib import Path
from raydiff.output.sheet.sheet import Sheet
from raydiff.output.sheet.grid import read_grid

def most_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

sheet = Sheet(sys.argv[1], read_grid(sys.argv[1])[0], cell_size=64, num_threads=2)
before = most_memory()
list(sheet)
print(most_memory() - before)
"""


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """Twelve images of 27 MB take the memory of the two that are read at a time."""
    size = {"width": 3000, "height": 3000}
    rows = [
        {"seed": seed, **size, "pixels": np.full((3000, 3000, 3), 10 * seed, np.uint8)}
        for seed in range(12)
    ]
    out = write_run(tmp_path / "out", rows)
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, out], capture_output=True, text=True, check=True
    )
    assert int(measured.stdout) < 220e6
