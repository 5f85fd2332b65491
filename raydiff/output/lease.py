"""One driver per run in an object store: claims OUT/.lock/epoch-000007.json, of which the highest
holds, and heartbeats that keep it.

A driver takes the place of another only when the other has said goodbye, is dead on this host, or
has written no heartbeat for STALE_S. Each side writes first and looks second: a driver writes its
heartbeat, then looks for a higher epoch; a successor writes its claim, then looks whether the
heartbeat has moved on. So of two that meet, one at least sees the other, and stops.
"""

import contextlib
import json
import os
import platform
import random
import re
import secrets
import threading
import time
from dataclasses import asdict
from typing import NamedTuple

from raydiff.errors import EngineError, OutputError
from raydiff.object_storage import StorageError, StoredFile
from raydiff.output.atomic import disk_error
from raydiff.output.holder import LockHolder, describe_holder, is_process_alive, parse_holder
from raydiff.output.storage import Storage

CLAIMS_DIR = ".lock"
CLAIM_NAME = re.compile(r"\.lock/epoch-(?P<epoch>\d+)(?:\.(?P<token>[0-9a-f]+))?\.json")
HEARTBEAT_S = 10.0
STALE_S = 60.0
"""Age of the last heartbeat from which on a driver is taken for dead. A request that was begun
under a fresh heartbeat ends well before: see Patience.request_s."""
POLL_S = 2.0
NUM_ATTEMPTS = 10
NO_CONDITIONS = (
    "{uri}: this object store does not honour conditional writes (If-None-Match), so that the lock "
    "goes by listing claims. Start only one run in a folder at a time."
)


class Claim(NamedTuple):
    """One driver's claim on the run, as it stands in the store."""

    epoch: int
    token: str
    """Tells claims of one epoch apart where the store cannot refuse the second; else empty."""
    file: StoredFile


class Lease:
    """The right to commit to one run in an object store, renewed by a thread."""

    def __init__(
        self, out: Storage, *, heartbeat_s: float = HEARTBEAT_S, stale_s: float = STALE_S
    ) -> None:
        self._out = out
        self._heartbeat_s = heartbeat_s
        self._stale_s = stale_s
        self._started_at = time.time()
        self._token = secrets.token_hex(8)
        self._name = ""
        self._is_held = False
        self._confirming = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self.epoch = 0
        self.warning: str | None = None

    def acquire(self, last_epoch: int) -> None:
        """Take the run with an epoch above `last_epoch` and above every claim's.

        Waits up to STALE_S where the last driver may be dead or alive. Raises OutputError naming
        the driver that has it.
        """
        try:
            is_conditional, clock_s = self._probe()
            if not is_conditional:
                self.warning = NO_CONDITIONS.format(uri=self._out.uri)
            for _ in range(NUM_ATTEMPTS):
                before = list_claims(self._out)
                if before:
                    self._wait_until_free(before[-1], clock_s)
                self.epoch = max([last_epoch, *(claim.epoch for claim in before)]) + 1
                if self._claim(before, is_conditional=is_conditional):
                    break
                time.sleep(random.uniform(0.1, 1.0))
            else:
                raise OutputError(
                    f"output folder {self._out.uri}: other drivers are starting in it. "
                    "Start one at a time."
                )
            self._out.delete(claim.file.name for claim in before)
        except StorageError as error:
            raise OutputError(
                f"output folder {self._out.uri}: not writable: {error.reason}. {error.remedy}."
            ) from None
        self._is_held = True
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Write a heartbeat and look whether the run is still this driver's.

        Raises EngineError if it is not, DiskError if the store cannot be asked.
        """
        try:
            self._confirm()
        except StorageError as error:
            raise disk_error(self._out.describe(self._name), error) from error
        if not self._is_held:
            raise EngineError(
                f"{self._out.describe(CLAIMS_DIR)}: this driver (epoch {self.epoch}) no longer "
                f"holds the folder: {self._whose()}. It stops without committing; nothing that "
                "was committed is lost."
            )

    def release(self) -> None:
        """Say goodbye; a lease that was lost is left as it is."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(EngineError, OSError):
            if self._is_held:
                self.check()
                self._out.put(self._name, self._content(is_released=True))
        self._is_held = False

    # -- claims --------------------------------------------------------------------------------

    def _probe(self) -> tuple[bool, float]:
        """Return whether the store refuses to create what is there, and the time by its clock."""
        name = f"{CLAIMS_DIR}/probe-{self._token}"
        try:
            self._out.create(name, b"1")
            is_conditional = not self._out.create(name, b"2")
        except StorageError:
            # It may not know such writes at all; if it takes no others either, this one says so.
            self._out.put(name, b"1")
            is_conditional = False
        files = {file.name: file for file in self._out.list_files(CLAIMS_DIR)}
        self._out.delete([name])
        return is_conditional, files[name].modified_at

    def _claim(self, before: list[Claim], *, is_conditional: bool) -> bool:
        """Write this driver's claim and return whether it holds."""
        content = self._content(is_released=False)
        token = "" if is_conditional else self._token
        self._name = _claim_name(self.epoch, token)
        if is_conditional:
            if not self._out.create(self._name, content):
                return False
        else:
            self._out.put(self._name, content)
        own = (self.epoch, token)
        after = [claim for claim in list_claims(self._out) if (claim.epoch, claim.token) != own]
        if any(claim.epoch >= self.epoch for claim in after) or _has_moved(before, after):
            self._out.delete([self._name])
            return False
        return True

    def _wait_until_free(self, claim: Claim, clock_s: float) -> None:
        """Return when the claim's driver is gone. Raises OutputError when it is not."""
        holder = read_holder(self._out, claim)
        if holder is None or _is_gone(holder):
            return
        until = time.monotonic() + self._stale_s - max(0.0, clock_s - claim.file.modified_at)
        while (left_s := until - time.monotonic()) > 0:
            time.sleep(min(POLL_S, self._heartbeat_s, left_s))
            current = list_claims(self._out)
            if not current or current[-1] != claim:
                holder = read_holder(self._out, current[-1]) if current else None
                if holder is None or holder.is_released:
                    return
                raise OutputError(
                    f"output folder {self._out.uri}: another driver is at work in it: "
                    f"{describe_holder(holder)}. Wait for it, stop it, or choose another --out."
                )

    # -- keeping it ----------------------------------------------------------------------------

    def _confirm(self) -> None:
        with self._confirming:
            if not self._is_held:
                return
            self._out.put(self._name, self._content(is_released=False))
            self._is_held = all(claim.epoch <= self.epoch for claim in list_claims(self._out))

    def _keep(self) -> None:
        while self._is_held and not self._stopped.wait(self._heartbeat_s):
            with contextlib.suppress(OSError):  # The next heartbeat, or a commit, tries again.
                self._confirm()

    def _content(self, *, is_released: bool) -> bytes:
        holder = LockHolder(
            epoch=self.epoch,
            host=platform.node(),
            pid=os.getpid(),
            started_at=self._started_at,
            is_released=is_released,
        )
        return json.dumps({**asdict(holder), "token": self._token}).encode()

    def _whose(self) -> str:
        with contextlib.suppress(OSError):
            return (
                f"it is now {describe_holder(read_holder(self._out, list_claims(self._out)[-1]))}'s"
            )
        return "another driver has it"


def list_claims(out: Storage) -> list[Claim]:
    """Return the claims on a run by their epochs."""
    claims = []
    for file in out.list_files(CLAIMS_DIR):
        match = CLAIM_NAME.fullmatch(file.name)
        if match is not None:
            claims.append(Claim(int(match["epoch"]), match["token"] or "", file))
    return sorted(claims)


def read_holder(out: Storage, claim: Claim) -> LockHolder | None:
    """Return who wrote a claim, None if it is gone or unreadable."""
    try:
        return parse_holder(out.read(claim.file.name))
    except FileNotFoundError:
        return None


def lease_holder(out: Storage) -> LockHolder | None:
    """Return who drives a run now, or None if nobody does."""
    claims = list_claims(out)
    holder = read_holder(out, claims[-1]) if claims else None
    if holder is None or _is_gone(holder):
        return None
    return holder if time.time() - claims[-1].file.modified_at < STALE_S else None


def _claim_name(epoch: int, token: str) -> str:
    return f"{CLAIMS_DIR}/epoch-{epoch:06d}{'.' if token else ''}{token}.json"


def _is_gone(holder: LockHolder) -> bool:
    is_here = holder.host == platform.node()
    return holder.is_released or (is_here and not is_process_alive(holder.pid))


def _has_moved(before: list[Claim], after: list[Claim]) -> bool:
    """Tell whether an earlier driver has written a heartbeat since `before`."""
    return any(claim not in before for claim in after)
