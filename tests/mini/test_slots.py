"""What a text encoder is taught: the slots of a scene, and that captions leave them free."""

from pathlib import Path

import numpy as np
import torch

from raydiff.mini.captions import caption
from raydiff.mini.draw import table
from raydiff.mini.recipe import MAX_TOKENS
from raydiff.mini.scenes import (
    BACKGROUNDS,
    CANVAS,
    COLORS,
    SHAPES,
    Group,
    Placed,
    Scene,
    place,
    sample_scene,
)
from raydiff.mini.slots import NUM_SLOTS, SlotReader, Slots, read_slots
from raydiff.mini.vocabulary import words
from raydiff.tokenizer import CLIPTokenizer, write_tiny_tokenizer


def test_slots_say_what_a_scene_has() -> None:
    groups = (
        Group(count=2, size="small", color="blue", shape="star"),
        Group(count=1, size="large", color="orange", shape="square"),
    )
    scene = Scene(groups=groups, relation="left", background="grey")
    placed = [Placed(20, 40, 12, 0), Placed(30, 100, 12, 0), Placed(96, 64, 24, 1)]
    tables = torch.from_numpy(table(scene, placed, np.random.default_rng(0)))[None]
    slots = read_slots(tables)
    names = list(COLORS)
    blue, orange = names.index("blue"), names.index("orange")
    assert slots.background.tolist() == [list(BACKGROUNDS).index("grey")]
    assert slots.counts[0].tolist() == [{blue: 2, orange: 1}.get(i, 0) for i in range(len(names))]
    assert slots.shapes[0, blue] == SHAPES.index("star")
    assert slots.shapes[0, orange] == SHAPES.index("square")
    expected = [[25 / CANVAS - 0.5, 70 / CANVAS - 0.5, 0.5], [96 / CANVAS - 0.5, 0.0, 1.0]]
    assert torch.allclose(slots.places[0, [blue, orange]], torch.tensor(expected), atol=1e-6)


def test_every_color_of_any_scene_is_found() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        scene = sample_scene(rng)
        placed = place(scene, rng)
        if placed is None:
            continue
        slots = read_slots(torch.from_numpy(table(scene, placed, rng))[None])
        asked = {list(COLORS).index(one.color): one for one in scene.groups}
        counts = [asked[i].count if i in asked else 0 for i in range(len(COLORS))]
        assert slots.counts[0].tolist() == counts
        assert all(slots.shapes[0, i] == SHAPES.index(one.shape) for i, one in asked.items())


def test_captions_leave_the_slots_free(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path, "!", words(), MAX_TOKENS)
    tokenizer = CLIPTokenizer.from_folder(tmp_path)
    rng = np.random.default_rng(2)
    texts = [caption(sample_scene(rng), rng) for _ in range(20_000)]
    ids = tokenizer.encode(texts).input_ids
    padding = tokenizer.encode([""]).input_ids[0, -1]
    assert (ids[:, -NUM_SLOTS:] == padding).all()


def test_only_rows_that_are_read_and_colors_that_are_there_count() -> None:
    torch.manual_seed(0)
    reader, embeds = SlotReader(8), torch.randn(3, 12, 8)
    slots = Slots(
        background=torch.tensor([0, 1, 2]),
        counts=torch.tensor([[1, 0, 0, 0, 2, 0], [0, 3, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]),
        shapes=torch.randint(4, (3, 6)),
        places=torch.randn(3, 6, 3),
    )
    is_read = torch.tensor([True, False, True])
    loss = reader.loss(embeds, slots, is_read)
    told = reader.loss(embeds[is_read], slots.rows(is_read), torch.tensor([True, True]))
    assert torch.allclose(loss, told)
    nowhere = slots._replace(
        places=torch.where(slots.counts[..., None] > 0, slots.places, 7.0),
        shapes=torch.where(slots.counts > 0, slots.shapes, 3 - slots.shapes),
    )
    assert torch.equal(reader.loss(embeds, nowhere, is_read), loss)
    other = slots._replace(counts=slots.counts.flip(1))
    assert not torch.allclose(reader.loss(embeds, other, is_read), loss)
    assert reader.loss(embeds, slots, torch.zeros(3, dtype=torch.bool)) == 0


def test_the_reader_learns_its_slots() -> None:
    torch.manual_seed(0)
    slots = read_slots(random_tables(32))
    embeds = torch.randn(32, 10, 64)
    reader = SlotReader(64)
    optimiser = torch.optim.Adam(reader.parameters(), lr=0.03)
    is_read = torch.ones(32, dtype=torch.bool)
    losses = []
    for _ in range(400):
        loss = reader.loss(embeds, slots, is_read)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.2 * losses[0]


def random_tables(num_scenes: int) -> torch.Tensor:
    rng = np.random.default_rng(3)
    tables = []
    while len(tables) < num_scenes:
        scene = sample_scene(rng)
        placed = place(scene, rng)
        if placed is not None:
            tables.append(table(scene, placed, rng))
    return torch.from_numpy(np.stack(tables))
