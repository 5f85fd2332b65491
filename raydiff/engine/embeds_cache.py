"""Which texts' embeddings the cluster holds: an index by content, least recently used out first."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from raydiff.engine.jobs import RowJob
from raydiff.engine.messages import TextKey

State = Literal["absent", "pending", "ready"]


@dataclass(eq=False, slots=True)
class _Entry:
    size_bytes: int | None = None
    """None until it is encoded."""
    encode_id: int = 0
    users: dict[RowJob, None] = field(default_factory=dict)
    """Batches that need it still: it stays for them, whatever room there is."""


class EmbedsCache:
    """Embeddings by text, at most `capacity_bytes` of them beyond what live batches need."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._entries: OrderedDict[TextKey, _Entry] = OrderedDict()
        self.size_bytes = 0
        self.pinned_bytes = 0
        """Of them, what live batches need."""

    @property
    def is_full(self) -> bool:
        """Whether live batches alone need all the room."""
        return self.pinned_bytes > self._capacity_bytes

    def pin(self, text: TextKey, user: RowJob) -> State:
        """Keep a text for a batch, and say what is there of it so far."""
        entry = self._entries.get(text)
        state: State = "absent"
        if entry is None:
            entry = self._entries[text] = _Entry()
        else:
            state = "pending" if entry.size_bytes is None else "ready"
            self._entries.move_to_end(text)
        if not entry.users:
            self.pinned_bytes += entry.size_bytes or 0
        entry.users[user] = None
        return state

    def unpin(self, text: TextKey, user: RowJob) -> None:
        """Let go of a text that a batch needs no more."""
        entry = self._entries.get(text)
        if entry is None or user not in entry.users:
            return
        del entry.users[user]
        if not entry.users:
            self.pinned_bytes -= entry.size_bytes or 0

    def encode_id(self, text: TextKey) -> int:
        """Return by which encoding a text's embeddings were made."""
        return self._entries[text].encode_id

    def users(self, text: TextKey) -> list[RowJob]:
        """Return the batches that need a text."""
        entry = self._entries.get(text)
        return [] if entry is None else list(entry.users)

    def store(self, text: TextKey, size_bytes: int, encode_id: int) -> None:
        """Say that a text's embeddings are there."""
        entry = self._entries.setdefault(text, _Entry())
        self._resize(entry, size_bytes)
        entry.encode_id = encode_id

    def lose(self, text: TextKey, encode_id: int) -> bool:
        """Say that embeddings may be gone; return whether they were those that are held now."""
        entry = self._entries.get(text)
        if entry is None or entry.size_bytes is None or entry.encode_id != encode_id:
            return False
        self._resize(entry, None)
        return True

    def forget(self, text: TextKey) -> None:
        """Drop a text that cannot be encoded."""
        entry = self._entries.pop(text, None)
        if entry is not None:
            self._resize(entry, None)

    def evict(self) -> tuple[TextKey, ...]:
        """Drop what there is no room for, and return it."""
        if self.size_bytes <= self._capacity_bytes:
            return ()
        evicted = tuple(self._too_much())
        for text in evicted:
            del self._entries[text]
        return evicted

    def _too_much(self) -> Iterator[TextKey]:
        for text, entry in self._entries.items():
            if self.size_bytes <= self._capacity_bytes:
                return
            if entry.size_bytes is not None and not entry.users:
                self._resize(entry, None)
                yield text

    def _resize(self, entry: _Entry, size_bytes: int | None) -> None:
        change = (size_bytes or 0) - (entry.size_bytes or 0)
        entry.size_bytes = size_bytes
        self.size_bytes += change
        if entry.users:
            self.pinned_bytes += change
