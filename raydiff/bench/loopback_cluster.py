"""A Ray cluster of several nodes on this machine, to try on it what happens to clusters.

All of it binds loopback and asks for a token.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raydiff.engine.cluster import drain_node, node_starter
from raydiff.engine.ray_session import environ, session_dir, write_token


class LoopbackCluster:
    """Nodes that can be added, killed and drained. The first is the head."""

    def __init__(self, starter: Any) -> None:
        self._cluster = starter()
        self._nodes: list[Any] = []

    @property
    def address(self) -> str:
        """`host:port` of the head."""
        return str(self._cluster.address)

    def add_node(
        self, *, num_cpus: int, num_gpus: int = 0, labels: dict[str, str] | None = None
    ) -> int:
        """Start a node and return its index; the head comes first."""
        options: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        if labels:
            options["labels"] = labels
        # Nobody reads what workers print, nodes come and go by hand, and the usual port of an agent
        # is another Ray's.
        options |= {"include_log_monitor": False, "dashboard_agent_listen_port": 0}
        if not self._nodes:
            options |= {"include_dashboard": False, "no_monitor": True}
        self._nodes.append(self._cluster.add_node(**options))
        return len(self._nodes) - 1

    def node_id(self, index: int) -> str:
        """Return Ray's id of a node."""
        return str(self._nodes[index].node_id)

    def kill_node(self, index: int) -> None:
        """Kill a node's raylet, as a power cut would: nothing is said to anyone."""
        os.kill(self._nodes[index].all_processes["raylet"][0].process.pid, signal.SIGKILL)

    def kill_head_service(self) -> None:
        """Kill the head's control service; its raylet and workers stay."""
        os.kill(self._nodes[0].all_processes["gcs_server"][0].process.pid, signal.SIGKILL)

    def drain_node(self, index: int, *, deadline_s: float) -> None:
        """Announce that a node will be gone."""
        drain_node(self.address, self.node_id(index), deadline_s=deadline_s)

    def close(self) -> None:
        """End all nodes."""
        for node in reversed(self._nodes):
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


@contextmanager
def loopback_cluster(*, has_token: bool = True) -> Iterator[LoopbackCluster]:
    """Yield a cluster without nodes; processes started meanwhile can join it by its address.

    One without a token is for the test that such a cluster is refused.
    """
    with (
        session_dir() as folder,
        environ(
            RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
            RAY_AUTH_MODE="token" if has_token else "disabled",
            RAY_AUTH_TOKEN_PATH=str(write_token(folder)),
            RAY_AUTH_TOKEN=None,
            RAY_TMPDIR=str(folder),
            RAY_USAGE_STATS_ENABLED="0",
            RAY_ADDRESS=None,
        ),
    ):
        cluster = LoopbackCluster(node_starter())
        try:
            yield cluster
        finally:
            cluster.close()
