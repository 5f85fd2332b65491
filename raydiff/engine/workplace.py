"""Where a run works: a Ray of this machine's own, or a cluster with the nodes it has now."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from raydiff.config import RunConfig
from raydiff.engine.cluster import OBJECT_STORE_BYTES, RaySession, joined_session, private_session
from raydiff.engine.cluster_file import ClusterLayout
from raydiff.engine.known_models import KnownModels
from raydiff.engine.messages import Place
from raydiff.engine.placement import cluster_layout, grown, local_layout, places
from raydiff.engine.plan import profile_on
from raydiff.engine.ray_session import free_shm_bytes
from raydiff.errors import ModelError
from raydiff.memory.gpus import visible_gpus

LATENTS_BYTES = 256 * 2**20
"""Room in a private object store for the latents of batches between two stages."""
MIN_EMBEDS_BYTES = 64 * 2**20
EMBEDS_SHARE = 0.5
"""Most of a node's object store that embeddings may fill."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workplace:
    """The Ray of a run, and which workers it is to have there."""

    session: RaySession
    layout: ClusterLayout
    embeds_cache_bytes: int
    places_now: Callable[[], Sequence[Place]] | None = None
    """For a cluster whose nodes say how many workers there are."""


@contextmanager
def open_workplace(
    config: RunConfig, models: KnownModels, layout: ClusterLayout | None
) -> Iterator[Workplace]:
    """Choose the workers, and join the cluster if there is one to join. Raises ConfigError."""
    engine = config.engine
    wanted_bytes = int(engine.embeds_cache_gib * 2**30)
    if engine.address is None:
        layout = layout or local_layout(config, visible_gpus())
        store_bytes = OBJECT_STORE_BYTES
        if layout.is_split:
            room = int(EMBEDS_SHARE * free_shm_bytes()) - LATENTS_BYTES
            wanted_bytes = max(MIN_EMBEDS_BYTES, min(wanted_bytes, room))
            store_bytes += wanted_bytes + LATENTS_BYTES
        with private_session(layout, store_bytes) as session:
            yield Workplace(session=session, layout=layout, embeds_cache_bytes=wanted_bytes)
        return
    with joined_session(engine.address, insecure=engine.insecure) as session:
        session.open()
        chosen = layout or cluster_layout(
            config, session.nodes, encodes_on_cpu=lambda: _encodes_on_cpu(config, models, session)
        )
        smallest = min(node.object_store_bytes for node in session.nodes)
        is_by_nodes = layout is None and engine.cluster is None and engine.workers == "auto"
        yield Workplace(
            session=session,
            layout=chosen,
            embeds_cache_bytes=min(wanted_bytes, int(EMBEDS_SHARE * smallest)),
            places_now=_GrowingPlaces(config, session, chosen) if is_by_nodes else None,
        )


class _GrowingPlaces:
    """The places of a cluster that nodes join while the run goes on."""

    def __init__(self, config: RunConfig, session: RaySession, layout: ClusterLayout) -> None:
        self._config = config
        self._session = session
        self._layout = layout

    def __call__(self) -> list[Place]:
        nodes = [node for node in self._session.nodes if not node.is_draining]
        is_split = self._layout.is_split
        newer = cluster_layout(self._config, nodes, encodes_on_cpu=lambda: is_split)
        self._layout = grown(self._layout, newer)
        return places(self._layout)


def _encodes_on_cpu(config: RunConfig, models: KnownModels, session: RaySession) -> bool:
    """Return whether the memory profile of the cluster's GPUs puts text encoders on the CPU."""
    gpu = session.probe_gpu()
    if gpu is None:
        return False
    try:
        info = models(config.model.name)
    except ModelError:
        return False  # rows name models of their own, and this one is not needed
    devices = profile_on(gpu, info, config).devices
    return devices["text_encoder"] == "cpu" and devices["unet"] == "cuda"
