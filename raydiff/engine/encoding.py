"""The first stage of a split run: which batches wait for which texts to be encoded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from raydiff.engine.embeds_cache import EmbedsCache
from raydiff.engine.jobs import RowJob, TextJob
from raydiff.engine.messages import EncodeBatch, EncodeReply, TextKey, texts_of
from raydiff.request import RenderRequest

MAX_TEXTS = 16
"""Texts that are encoded together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DoomedRow:
    """A row that one of its texts has doomed."""

    request: RenderRequest
    error: str


class Encoding:
    """Asks for each distinct text once, while its embeddings are held or under way."""

    def __init__(self, cache_bytes: int) -> None:
        self._cache = EmbedsCache(cache_bytes)
        self._texts: dict[TextKey, None] = {}
        """To be encoded, in order."""
        self._deadly: dict[TextKey, str] = {}
        """Texts that kill the worker that encodes them, and how often they did. There are few:
        each has cost several workers."""

    @property
    def num_texts_waiting(self) -> int:
        """Texts that no worker has been asked for."""
        return len(self._texts)

    @property
    def is_full(self) -> bool:
        """Whether the batches under way need all the room for embeddings already."""
        return self._cache.is_full

    def begin(self, job: RowJob) -> list[DoomedRow]:
        """Let a batch wait for its texts; return, and take out of it, rows of deadly texts."""
        doomed = self._without_deadly(job)
        for text in _texts(job):
            state = self._cache.pin(text, job)
            if state == "ready":
                job.embeds[text] = self._cache.encode_id(text)
                continue
            job.missing.add(text)
            if state == "absent":
                self._texts[text] = None
        return doomed

    def release(self, job: RowJob) -> None:
        """Let go of the texts of a batch that needs them no more."""
        for text in (*job.missing, *job.embeds):
            self._cache.unpin(text, job)
        job.missing.clear()
        job.embeds.clear()

    def take(self, num_takers: int) -> TextJob | None:
        """Take texts of one checkpoint to be encoded together: one taker's fair share of them."""
        if not self._texts:
            return None
        share = min(MAX_TEXTS, -(-len(self._texts) // num_takers))
        first = next(iter(self._texts))
        texts: list[TextKey] = []
        for text in self._texts:
            if text[:2] == first[:2]:
                texts.append(text)
                if len(texts) == share:
                    break
        for text in texts:
            del self._texts[text]
        return TextJob(batch=EncodeBatch(encode_id=0, texts=tuple(texts)))

    def done(self, job: TextJob, reply: EncodeReply) -> list[DoomedRow]:
        """Take in what became of texts; return the rows whose text could not be encoded."""
        doomed: list[DoomedRow] = []
        for text, size_bytes, error in zip(job.batch.texts, reply.sizes, reply.errors, strict=True):
            if error is not None:
                doomed += self._doom(text, error)
                continue
            self._cache.store(text, size_bytes, reply.encode_id)
            for waiting in self._cache.users(text):
                if text in waiting.missing:
                    waiting.missing.remove(text)
                    waiting.embeds[text] = reply.encode_id
        return doomed

    def convict(self, text: TextKey, error: str) -> list[DoomedRow]:
        """Never encode a text again; return the rows that wait for it."""
        self._deadly[text] = error
        return self._doom(text, error)

    def lose(self, job: RowJob) -> tuple[TextKey, ...]:
        """Ask again for the embeddings that a batch was sent with; return what is to be dropped.

        Those that were made anew since then stay.
        """
        lost = [text for text, made in job.embeds.items() if self._cache.lose(text, made)]
        for text in lost:
            self._texts[text] = None
            for user in self._cache.users(text):
                if not user.is_sent:
                    del user.embeds[text]
                    user.missing.add(text)
        return tuple(lost)

    def evict(self) -> tuple[TextKey, ...]:
        """Return the texts that the cache has no more room for."""
        return self._cache.evict()

    def _doom(self, text: TextKey, error: str) -> list[DoomedRow]:
        waiting = [job for job in self._cache.users(text) if text in job.missing]
        doomed: list[DoomedRow] = []
        for job in waiting:
            self.release(job)
            doomed += self._take_out(job, {text: error})
        self._cache.forget(text)
        for job in waiting:
            # The rows left have none of it, and all their other texts are known.
            self.begin(job)
        return doomed

    def _without_deadly(self, job: RowJob) -> list[DoomedRow]:
        return self._take_out(job, self._deadly) if self._deadly else []

    def _take_out(self, job: RowJob, errors: dict[TextKey, str]) -> list[DoomedRow]:
        """Take rows with one of these texts out of a batch."""
        doomed: list[DoomedRow] = []
        kept: list[RenderRequest] = []
        for request in job.batch.requests:
            error = next((errors[text] for text in texts_of(request) if text in errors), None)
            if error is None:
                kept.append(request)
            else:
                doomed.append(DoomedRow(request=request, error=error))
        if doomed:
            job.batch = replace(job.batch, requests=tuple(kept))
        return doomed


def _texts(job: RowJob) -> Sequence[TextKey]:
    texts = (text for request in job.batch.requests for text in texts_of(request))
    return tuple(dict.fromkeys(texts))
