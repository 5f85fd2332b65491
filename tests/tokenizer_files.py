"""What the tests of tokenizers write and tokenise."""

import json
import random
from pathlib import Path


def random_texts(count: int, seed: int) -> list[str]:
    """Strings that mix scripts, symbols, spaces and any code point that is not a surrogate."""
    rng = random.Random(seed)
    blocks = [(0x20, 0x7E), (0x61, 0x7A), (0x00, 0x24F), (0x300, 0x36F), (0x370, 0x6FF)]
    blocks += [(0x900, 0x1FFF), (0x2000, 0x2BFF), (0x3000, 0xD7FF), (0xE000, 0xFFFF)]
    blocks += [(0x1F300, 0x1FAFF), (0x10000, 0x10FFFF)]
    texts = []
    for _ in range(count):
        chosen = rng.sample(blocks, k=rng.randint(1, 4))
        length = rng.choice([1, 5, 20, 60, 150])
        texts.append("".join(chr(rng.randint(*rng.choice(chosen))) for _ in range(length)))
    return texts


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
