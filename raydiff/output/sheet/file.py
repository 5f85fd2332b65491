"""The pages of a contact sheet as files: one PDF, or a PNG for each page."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from raydiff.errors import ConfigError
from raydiff.output.atomic import written_whole

SUFFIXES = (".png", ".pdf")
PDF_DPI = 150
PDF_QUALITY = 92


def check_sheet_path(path: Path) -> None:
    """Raise ConfigError if a sheet cannot be written there."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path}: a sheet is a .png or a .pdf file")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}")


def write_pages(path: Path, pages: Iterable[Image.Image], num_pages: int) -> Iterator[Path]:
    """Write pages as they come and yield the files written: sheet-01.png, sheet-02.png, ... for
    several pages of a sheet.png. Raises OutputError."""
    if path.suffix.lower() == ".pdf":
        yield from _write_pdf(path, pages)
        return
    digits = max(len(str(num_pages)), 2)
    for number, page in enumerate(pages, start=1):
        name = path.name if num_pages == 1 else f"{path.stem}-{number:0{digits}d}{path.suffix}"
        with written_whole(path.with_name(name)) as temporary:
            page.save(temporary, "PNG")
        yield path.with_name(name)


def _write_pdf(path: Path, pages: Iterable[Image.Image]) -> Iterator[Path]:
    with written_whole(path) as temporary:
        for number, page in enumerate(pages):
            page.save(
                temporary,
                "PDF",
                append=number > 0,
                resolution=PDF_DPI,
                quality=PDF_QUALITY,
                subsampling=0,
            )
    yield path
