"""Room for a stage that has no worker while another one has several. Pure: no Ray, no clock.

Where workers of two stages fit the same nodes, those of one may fill them all: at the start, or
when a node is gone. Then the other stage would wait for ever.
"""

from collections.abc import Mapping, Sequence

from raydiff.engine.cluster_file import StagePlacement
from raydiff.engine.messages import Place, Role

STARVED_S = 20.0
"""A stage that waits so long for its only worker is given another stage's room."""


class RoomMaker:
    """Says which places a run is to have: those that are wanted, but for what it withdraws."""

    def __init__(self, places: Sequence[Place], placements: Mapping[Role, StagePlacement]) -> None:
        self._wanted = list(places)
        self._placements = placements
        self._placed: dict[str, Role] = {}
        self._waiting_since: dict[Role, float] = {}
        """By stages that have no worker on any node, and want one."""
        self._withdrawn: set[str] = set()

    def want(self, places: Sequence[Place]) -> None:
        """Have these places from now on; nodes have come, so that what was withdrawn may return."""
        self._wanted = list(places)
        self._withdrawn.clear()

    def started(self, role: Role, now: float) -> None:
        """Take in that a worker waits for a node."""
        if role not in self._placed.values():
            self._waiting_since.setdefault(role, now)

    def placed(self, worker_id: str, role: Role) -> None:
        """Take in that a node has a worker."""
        self._placed[worker_id] = role
        self._waiting_since.pop(role, None)

    def gone(self, worker_id: str) -> None:
        """Take in that a worker has failed, or was stopped."""
        self._placed.pop(worker_id, None)

    def places(self, now: float) -> list[Place]:
        """Return the places to have now, without those that a starved stage needs the room of."""
        for role, since in self._waiting_since.items():
            if now - since >= STARVED_S:
                self._waiting_since[role] = now
                self._withdraw_for(role)
        return [place for place in self._wanted if place.worker_id not in self._withdrawn]

    def _withdraw_for(self, starved: Role) -> None:
        """Take one worker from the stage that has most, and its places that are not filled."""
        richest = max(
            (role for role in self._placements if self._could_give(role, starved)),
            key=self._num_placed,
            default=None,
        )
        if richest is None:
            return
        places = [place.worker_id for place in self._wanted if place.role == richest]
        filled = [worker_id for worker_id in places if worker_id in self._placed]
        self._withdrawn.update(set(places) - set(filled[:-1]))

    def _could_give(self, role: Role, starved: Role) -> bool:
        """Tell whether a worker of `role` can be spared, and its room suits `starved`."""
        gives, takes = self._placements[role], self._placements[starved]
        return (
            role != starved
            and gives.is_elastic
            and self._num_placed(role) > 1
            and gives.labels == takes.labels
            and takes.num_cpus <= gives.num_cpus
            and takes.num_gpus <= gives.num_gpus
            and takes.custom_resources.items() <= gives.custom_resources.items()
        )

    def _num_placed(self, role: Role) -> int:
        return sum(one == role for one in self._placed.values())
