"""A stage without a worker gets the room of one that has several."""

from raydiff.engine.cluster_file import ClusterLayout
from raydiff.engine.make_room import STARVED_S, RoomMaker
from raydiff.engine.placement import places


def layout(**decode: object) -> ClusterLayout:
    cpu = {"resources": {"CPU": 1}}
    stages = {
        "encode": {"max": 1, **cpu},
        "denoise": {"max": 4, **cpu},
        "decode": {"max": 1, **cpu, **decode},
    }
    return ClusterLayout.model_validate({"stages": stages})


def crowded(wanted: ClusterLayout) -> RoomMaker:
    """Four CPUs: a text encoder and three of four denoisers have them all."""
    room = RoomMaker(places(wanted), wanted.by_role)
    for role in wanted.by_role:
        room.started(role, 0.0)
    room.placed("encode-0", "encode")
    for index in range(3):
        room.placed(f"denoise-{index}", "denoise")
    return room


def ids(room: RoomMaker, now: float) -> list[str]:
    return [place.worker_id for place in room.places(now)]


ALL = ["encode-0", "denoise-0", "denoise-1", "denoise-2", "denoise-3", "decode-0"]


def test_a_starved_stage_gets_the_room_of_the_richest() -> None:
    room = crowded(layout())
    assert ids(room, STARVED_S - 1) == ALL
    assert ids(room, STARVED_S) == ["encode-0", "denoise-0", "denoise-1", "decode-0"]
    room.gone("denoise-2")
    room.placed("decode-0", "decode")
    # What was withdrawn stays away, or it would take the room again; until nodes come.
    assert ids(room, 1000.0) == ["encode-0", "denoise-0", "denoise-1", "decode-0"]
    room.want(places(layout()))
    assert ids(room, 1001.0) == ALL


def test_the_last_worker_of_a_stage_is_never_withdrawn() -> None:
    room = crowded(layout())
    for now in range(0, 1000, 20):
        kept = ids(room, float(now))
        for place in ALL[1:5]:
            if place not in kept:
                room.gone(place)
    assert kept == ["encode-0", "denoise-0", "decode-0"]


def test_nothing_is_withdrawn_whose_room_would_not_suit() -> None:
    for wrong in ({"labels": {"a": "b"}}, {"resources": {"CPU": 2}}, {"resources": {"big": 1}}):
        room = crowded(layout(**wrong))
        assert ids(room, 1000.0) == ALL


def test_a_stage_whose_workers_all_died_waits_from_then_on() -> None:
    room = crowded(layout())
    room.placed("decode-0", "decode")
    room.gone("decode-0")
    assert ids(room, 500.0) == ALL
    room.started("decode", 500.0)
    assert ids(room, 500.0 + STARVED_S - 1) == ALL
    assert len(ids(room, 500.0 + STARVED_S)) == 4
