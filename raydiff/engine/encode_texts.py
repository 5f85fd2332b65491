"""Encode the texts of a manifest ahead of its run, into a folder that workers read them from."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from raydiff.config import LTX2Config, RunConfig
from raydiff.engine.encoding import MAX_TEXTS
from raydiff.engine.known_models import KnownModels, known_models
from raydiff.engine.messages import TextKey, texts_of
from raydiff.engine.plan import MAX_BAD_ROWS, open_rows
from raydiff.errors import DiskError, OutputError
from raydiff.manifest.rows import read_rows
from raydiff.output.storage import open_storage
from raydiff.pipelines.embeds_store import EmbedsStore
from raydiff.pipelines.load import load_pipeline

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeSummary:
    """What became of the texts of a manifest."""

    out: str
    num_texts: int
    """Distinct texts that the good rows need, once for each of their models."""
    num_encoded: int
    num_kept: int
    """Texts that were there already."""
    num_bad: int
    """Rows with an error."""
    bad_rows: tuple[str, ...]
    """What is wrong with the first of them."""
    elapsed_s: float
    is_interrupted: bool = False

    @property
    def exit_status(self) -> int:
        """0: every row's texts are there; 1: some rows are bad; 130: interrupted."""
        if self.is_interrupted:
            return 130
        return 1 if self.num_bad else 0


def encode_texts(
    config: RunConfig, out: str | Path, *, on_progress: OnProgress | None = None
) -> EncodeSummary:
    """Encode each distinct text that the run's rows need and `out` does not have.

    `ltx2.text_encoder` says where the run is to take them from; here it is always the checkpoint's
    own encoder. on_progress is called with texts done and all texts. The memory it takes is that
    of the distinct texts. Raises InputError where nothing can be encoded, DiskError for a folder
    that cannot be written.
    """
    started = time.time()
    config = config.model_copy(update={"ltx2": LTX2Config(mode=config.ltx2.mode)})
    models = known_models(config.model, config.ltx2, ["encode"])
    wanted = _Wanted.of(config, models)
    folder = _Folder(out)
    num_encoded = num_kept = 0
    is_interrupted = False
    try:
        for texts in wanted.by_checkpoint():
            for num_found, num_new in folder.fill(texts, config, models):
                num_kept, num_encoded = num_kept + num_found, num_encoded + num_new
                if on_progress is not None:
                    on_progress(num_kept + num_encoded, len(wanted.texts))
    except KeyboardInterrupt:
        is_interrupted = True
    return EncodeSummary(
        out=folder.uri,
        num_texts=len(wanted.texts),
        num_encoded=num_encoded,
        num_kept=num_kept,
        num_bad=wanted.num_bad,
        bad_rows=wanted.bad_rows,
        elapsed_s=time.time() - started,
        is_interrupted=is_interrupted,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wanted:
    """The distinct texts of a manifest, in order."""

    texts: tuple[TextKey, ...]
    num_bad: int
    bad_rows: tuple[str, ...]

    @classmethod
    def of(cls, config: RunConfig, models: KnownModels) -> "_Wanted":
        """Read every row."""
        texts: dict[TextKey, None] = {}
        errors: list[str] = []
        num_bad = 0
        for row in read_rows(open_rows(config), config=config, models=models):
            if row.request is not None:
                texts.update(dict.fromkeys(texts_of(row.request)))
                continue
            num_bad += 1
            if len(errors) < MAX_BAD_ROWS:
                errors.append(row.error or "")
        return cls(texts=tuple(texts), num_bad=num_bad, bad_rows=tuple(errors))

    def by_checkpoint(self) -> list[list[TextKey]]:
        """Return the texts of each checkpoint: one is loaded at a time."""
        groups: dict[tuple[str, str], list[TextKey]] = {}
        for text in self.texts:
            groups.setdefault((text.model, text.revision), []).append(text)
        return list(groups.values())


class _Folder:
    """Where encoded texts are kept."""

    def __init__(self, out: str | Path) -> None:
        self._storage = open_storage(out)
        path = self._storage.local_path("")
        if path is not None:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"{path}: cannot be made: {error.strerror}") from None
        self._store = EmbedsStore(self._storage)

    @property
    def uri(self) -> str:
        return self._storage.uri

    def fill(
        self, wanted: Sequence[TextKey], config: RunConfig, models: KnownModels
    ) -> Iterator[tuple[int, int]]:
        """Encode what is missing of one checkpoint's texts; yield how many of the next few were
        there, and how many have been encoded."""
        model, revision, _ = wanted[0]
        pipeline = load_pipeline(
            models(model), config=config.model, memory=config.memory, stages=["encode"]
        )
        for start in range(0, len(wanted), MAX_TEXTS):
            texts = [key.text for key in wanted[start : start + MAX_TEXTS]]
            found = self._store.read(texts, revision=revision, dtype=pipeline.dtype)
            missing = [text for text in texts if text not in found]
            with pipeline.fitting(f"{len(missing)} texts"):
                encoded = dict(zip(missing, pipeline.encode_texts(missing), strict=True))
            self._store.write(encoded, revision=revision)
            if self._store.error is not None:
                raise DiskError(f"{self._store.error}. The same command goes on from there")
            yield len(found), len(missing)
