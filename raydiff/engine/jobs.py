"""What a worker holds or waits to be given: a batch of rows or of texts, and the deaths that
stand on its account."""

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Generic, Literal, Self, TypeVar

from raydiff.engine.messages import DenoiseReply, EncodeBatch, TextKey
from raydiff.request import BatchKey, RenderBatch, RenderRequest

MIN_CRASHES_ALONE = 2
"""Crashes that a single row must have caused with nothing beside it, to be quarantined."""

Verdict = Literal["again", "split", "convict"]


@dataclass(eq=False, kw_only=True, slots=True)
class Job:
    """Work for one worker."""

    num_crashes: int = 0
    """Workers that died with this job at the head of their queue."""
    num_crashes_alone: int = 0
    """Those of them that held nothing else."""
    is_suspect: bool = False
    """A worker that held it died: it goes to an idle worker that gets nothing else meanwhile, so
    that blame is certain."""

    def __len__(self) -> int:
        """Return the number of rows or texts."""
        raise NotImplementedError

    @property
    def is_ready(self) -> bool:
        """Whether all that it needs is there."""
        return True

    def blame(self, max_crashes: int) -> Verdict:
        """Put a worker's death on its account, and say what to do with it.

        It is retried whole, then (one crash before `max_crashes`) item by item, and an item with
        `max_crashes` crashes, two of them by itself, is convicted: one by itself may be chance,
        its batch mates' crashes stand on its account too.
        """
        self.num_crashes += 1
        self.num_crashes_alone += self.is_suspect
        if len(self) > 1:
            return "split" if self.num_crashes >= max_crashes - 1 else "again"
        is_convicted = self.num_crashes >= max_crashes and self.num_crashes_alone >= min(
            MIN_CRASHES_ALONE, max_crashes
        )
        return "convict" if is_convicted else "again"


@dataclass(eq=False, kw_only=True, slots=True)
class RowJob(Job):
    """A batch of rows, on its way through the stages."""

    batch: RenderBatch
    num_inputs_lost: int = 0
    """Times that the node of its embeddings or latents was lost."""
    is_sent: bool = False
    missing: set[TextKey] = field(default_factory=set)
    """Split runs: texts that are not encoded yet."""
    embeds: dict[TextKey, int] = field(default_factory=dict)
    """Split runs: the others, by the encode_id that made their embeddings."""
    denoised: DenoiseReply | None = None

    def __len__(self) -> int:
        return len(self.batch.requests)

    @property
    def is_ready(self) -> bool:
        return not self.missing

    @property
    def model(self) -> str:
        """Whose pipeline is asked for."""
        return self.batch.model

    @property
    def key(self) -> BatchKey:
        """What its rows have in common."""
        return self.batch.key

    @property
    def num_steps(self) -> int:
        """Denoising steps of all its rows together."""
        return sum(request.num_inference_steps for request in self.batch.requests)

    def take_row(self, request_id: str) -> RenderRequest | None:
        """Take out a row that has ended before its batch; None where it has no such row."""
        taken = next((row for row in self.batch.requests if row.request_id == request_id), None)
        if taken is not None:
            rest = tuple(row for row in self.batch.requests if row is not taken)
            self.batch = replace(self.batch, requests=rest)
        return taken

    def split(self) -> list[Self]:
        """Return a job for each row, each with this one's crashes on its account."""
        return [
            type(self)(
                batch=replace(self.batch, requests=(request,)),
                num_crashes=self.num_crashes,
                num_inputs_lost=self.num_inputs_lost,
                is_suspect=True,
            )
            for request in self.batch.requests
        ]


@dataclass(eq=False, kw_only=True, slots=True)
class TextJob(Job):
    """Texts to encode."""

    batch: EncodeBatch

    def __len__(self) -> int:
        return len(self.batch.texts)

    @property
    def model(self) -> str:
        """Whose text encoders are asked for."""
        return self.batch.texts[0].model

    def split(self) -> list[Self]:
        """Return a job for each text, each with this one's crashes on its account."""
        return [
            type(self)(
                batch=replace(self.batch, texts=(text,)),
                num_crashes=self.num_crashes,
                is_suspect=True,
            )
            for text in self.batch.texts
        ]


J = TypeVar("J", bound=Job)


class JobQueue(Generic[J]):
    """Jobs that wait for a worker: suspects, which need an idle one, and the others."""

    def __init__(self) -> None:
        self.suspects: deque[J] = deque()
        self.others: deque[J] = deque()

    def __len__(self) -> int:
        return len(self.suspects) + len(self.others)

    def add(self, job: J, *, in_front: bool = False) -> None:
        """Let a job wait behind, or before, those of its kind."""
        jobs = self.suspects if job.is_suspect else self.others
        if in_front:
            jobs.appendleft(job)
        else:
            jobs.append(job)

    def drop_empty(self) -> None:
        """Drop jobs that have nothing left to do."""
        self.suspects = deque(job for job in self.suspects if len(job))
        self.others = deque(job for job in self.others if len(job))

    def clear(self) -> None:
        """Drop all jobs."""
        self.suspects.clear()
        self.others.clear()


def take_ready(jobs: deque[J]) -> J | None:
    """Take the first job that has all it needs."""
    for index, job in enumerate(jobs):
        if job.is_ready:
            del jobs[index]
            return job
    return None
