"""CLIPTokenizer against transformers', from every layout of files, and the errors for bad files."""

import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer as ReferenceTokenizer

from raydiff.errors import ModelError
from raydiff.tokenizer import CLIPTokenizer, write_tiny_tokenizer
from tests.tokenizer_files import random_texts, write_json

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
FLAGS = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
BOS_TOKEN, EOS_TOKEN = {"content": BOS, **FLAGS}, {"content": EOS, **FLAGS}

# As the tokenizer folders of the real checkpoints have them.
SD21_MAP = {"bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN, "pad_token": "!"}
SD21_MAP |= {"unk_token": EOS_TOKEN}
SDXL_1_MAP = {**SD21_MAP, "pad_token": EOS}
SDXL_2_MAP = {**SD21_MAP, "unk_token": {"content": EOS, **FLAGS, "normalized": False}}
OLD_CONFIG = {
    "add_prefix_space": False,
    "bos_token": {"__type": "AddedToken", **BOS_TOKEN},
    "do_lower_case": True,
    "eos_token": {"__type": "AddedToken", **EOS_TOKEN},
    "errors": "replace",
    "model_max_length": 77,
    "pad_token": EOS,
    "special_tokens_map_file": "./special_tokens_map.json",
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": {"__type": "AddedToken", **EOS_TOKEN},
}

HARD_TEXTS = [
    "",
    " ",
    "a photo of an astronaut riding a horse on mars, 8k, trending on artstation",
    "A Very LOUD Prompt!!! Really?! (no) [yes] {maybe} <what>",
    "wow! so! many!! marks!!!",
    "👩‍👩‍👧‍👦 family 🇩🇪 flag 🏳️‍🌈 👍🏽 thumbs 🤷🏾‍♀️",
    "crème brûlée, Ångström, señor, ñandú, Žižek, Đặng, ŁÓDŹ",
    "cre\u0300me bru\u0302le\u0301e \u0041\u030angstro\u0308m (decomposed)",
    "ẞtraße İstanbul ΣΊΣΥΦΟΣ ǅ ﬁ ﬂ ſ Ω K",
    "一只戴着帽子的猫 日本語のテスト 한국어 테스트 한글",
    "123 1,234.56 4k 1920x1080 ١٢٣ ४५६ Ⅷ ½ ² ①",
    "it's don't we're I've I'm you'll he'd IT'S DON'T 'tis rock'n'roll o’clock",
    "&amp; &lt;b&gt; &#39;quoted&#39; &quot;x&quot; &nbsp;| &amp;amp; &eacute;",
    "double  spaces   and    more ",
    "tabs\tand\nnew\r\nlines\x0b\x0c\x1c\x1d\x85\u2028\u2029end",
    "no\xa0break\u2003em\u3000ideographic\u200bzero\ufeffwidth",
    "NUL\x00in the\x00middle\x00",
    "control \x01\x02\x07\x08\x1b[31m\x7f\x9f characters",
    "שלום עולם مرحبا بالعالم \u202eright to left\u202c",
    "Z̷͙̈́a̶͓͝l̸̰̈g̵̢̛o̶̙͝ t̵̖̏e̸̬͑x̴̭̌t̶̪̽",
    "नमस्ते ประเทศไทย தமிழ் መልካም 𝔉𝔯𝔞𝔨𝔱𝔲𝔯 𐍈 𒀀",
    "<|startoftext|>inside<|endoftext|> <|STARTOFTEXT|> <|EndOfText|> <|endoftext |>",
    "a</w> </w> ## Ġ ĠĠ Ċ ![alt](../../etc/passwd) \\n %s {0} --",
    "\ufffd \ue000 \U000f0000 \U0010ffff \ufffe",
    "!",
    "!!!!!!!!!!!!!!!!",
    "x" * 300,
    "word " * 74,
    "word " * 75,
    "word " * 76,
    "a cat and a dog " * 312 + "on a mat",
    "é" * 5000,
    "猫犬" * 2500,
]


TEXTS = HARD_TEXTS + random_texts(200, seed=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """vocab.json and merges.txt of a BPE trained on English and random text, laid out as CLIP's."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4000, min_frequency=2, end_of_word_suffix="</w>", show_progress=False
    )
    corpus = [*list(topics.values())[:40], *random_texts(300, seed=2), *HARD_TEXTS * 4]
    bpe.train_from_iterator(corpus, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    assert len(merges) > 2000
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    tokens += [*(left + right for left, right in merges), BOS, EOS]
    tokens = list(dict.fromkeys(tokens))
    folder = tmp_path_factory.mktemp("trained")
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def old_layout(folder: Path, special_tokens_map: dict) -> None:
    write_json(folder / "special_tokens_map.json", special_tokens_map)
    write_json(folder / "tokenizer_config.json", OLD_CONFIG)


def sd21(folder: Path) -> None:
    old_layout(folder, SD21_MAP)


def sdxl_1(folder: Path) -> None:
    old_layout(folder, SDXL_1_MAP)


def sdxl_2(folder: Path) -> None:
    """Since transformers 4.33 the config lists the added tokens."""
    size = len(json.loads((folder / "vocab.json").read_text("utf-8")))
    decoder = {"0": {"content": "!", **FLAGS, "normalized": False, "special": True}}
    decoder[str(size - 2)] = {**BOS_TOKEN, "special": True}
    decoder[str(size - 1)] = {**EOS_TOKEN, "special": True}
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": "!", "unk_token": EOS}
    config = {"added_tokens_decoder": decoder, "model_max_length": 77, **names}
    write_json(folder / "special_tokens_map.json", SDXL_2_MAP)
    write_json(folder / "tokenizer_config.json", config)


def leftover_map(folder: Path) -> None:
    """A special_tokens_map.json that contradicts a complete config."""
    sdxl_2(folder)
    write_json(folder / "special_tokens_map.json", SDXL_1_MAP)


def saved_by_transformers(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json alone, as transformers 5 writes them."""
    sd21(folder)
    reference = ReferenceTokenizer.from_pretrained(folder)
    for file in folder.iterdir():
        file.unlink()
    reference.save_pretrained(folder)
    assert {file.name for file in folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def saved_with_added_tokens(folder: Path) -> None:
    """Textual inversion: new tokens after eos."""
    sdxl_1(folder)
    reference = ReferenceTokenizer.from_pretrained(folder)
    reference.add_tokens(["cat", "<my-style>"])
    for file in folder.iterdir():
        file.unlink()
    reference.save_pretrained(folder)


def added_tokens_file(folder: Path) -> None:
    """Textual inversion before transformers 4.33."""
    sd21(folder)
    size = len(json.loads((folder / "vocab.json").read_text("utf-8")))
    write_json(folder / "added_tokens.json", {"mars": size + 1, "horse": size})


def foreign_tokenizer_json(folder: Path) -> None:
    """Merges as strings, and another normaliser, which transformers does not take either."""
    sd21(folder)
    ReferenceTokenizer.from_pretrained(folder).save_pretrained(folder)
    values = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    values["model"]["merges"] = [" ".join(merge) for merge in values["model"]["merges"]]
    values["normalizer"] = {"type": "NFD"}
    values["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst"}
    values["truncation"]["stride"] = 0
    write_json(folder / "tokenizer.json", values)


def vocabulary_alone(folder: Path) -> None:
    """No file names the special tokens: the defaults."""


LAYOUTS = [
    sd21,
    sdxl_1,
    sdxl_2,
    leftover_map,
    saved_by_transformers,
    saved_with_added_tokens,
    added_tokens_file,
    foreign_tokenizer_json,
    vocabulary_alone,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_ids_equal_transformers(layout, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "tokenizer")
    layout(folder)
    check_equal(folder)


@pytest.mark.parametrize("pad_token", ["!", EOS])
@pytest.mark.parametrize("without", [(), ("tokenizer.json",), ("vocab.json", "merges.txt")])
def test_tiny_tokenizer_equals_transformers(pad_token, without, tmp_path):
    write_tiny_tokenizer(tmp_path, pad_token)
    for name in without:
        (tmp_path / name).unlink()
    check_equal(tmp_path)


def check_equal(folder: Path) -> None:
    reference = ReferenceTokenizer.from_pretrained(folder)
    tokens = CLIPTokenizer.from_folder(folder).encode(TEXTS)
    expected = reference(TEXTS, padding="max_length", max_length=77, truncation=True)["input_ids"]
    for row, text in enumerate(TEXTS):
        assert tokens.input_ids[row].tolist() == expected[row], repr(text[:80])
    lengths = [len(ids) for ids in reference(TEXTS, truncation=False)["input_ids"]]
    assert tokens.is_truncated == tuple(length > 77 for length in lengths)
    assert 10 < sum(tokens.is_truncated) < len(TEXTS) - 50


def test_truncation_keeps_eos_last(tmp_path):
    size = write_tiny_tokenizer(tmp_path, "!")
    tokens = CLIPTokenizer.from_folder(tmp_path).encode(["5" * 75, "6" * 76, "", "7" * 100_000])
    assert tokens.input_ids.shape == (4, 77)
    assert tokens.input_ids.dtype == np.int64
    assert tokens.is_truncated == (False, True, False, True)
    assert set(tokens.input_ids[:, 0]) == {size - 2}
    assert tokens.input_ids[:, -1].tolist() == [size - 1, size - 1, 0, size - 1]
    assert tokens.input_ids[2].tolist() == [size - 2, size - 1] + [0] * 75


def test_shorter_model_max_length_is_kept_and_none_is_77(tmp_path):
    write_tiny_tokenizer(tmp_path, EOS)
    config = tmp_path / "tokenizer_config.json"
    for length, expected in ((20, 20), (77, 77), (10**30, 77)):
        write_json(config, {**OLD_CONFIG, "model_max_length": length})
        tokens = CLIPTokenizer.from_folder(tmp_path).encode(["red cat " * 50])
        assert tokens.input_ids.shape == (1, expected)
        assert tokens.is_truncated == (True,)


def test_tiny_tokenizer_is_laid_out_as_clips(tmp_path):
    size = write_tiny_tokenizer(tmp_path / "new" / "tokenizer_2", "!")
    folder = tmp_path / "new" / "tokenizer_2"
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    merges = (folder / "merges.txt").read_text("utf-8").splitlines()[1:]
    assert sorted(vocab.values()) == list(range(size))
    assert len(merges) == size - 514 > 24
    assert (vocab["!"], vocab["!</w>"], vocab[BOS], vocab[EOS]) == (0, 256, size - 2, size - 1)
    ours = CLIPTokenizer.from_folder(folder)
    assert (ours.vocab_size, ours.pad_token_id, ours.max_length) == (size, 0, 77)
    ids = ours.encode(["a photo of the red cat"]).input_ids[0]
    words = ["photo</w>", "of</w>", "the</w>", "red</w>", "cat</w>"]
    assert ids[1:7].tolist() == [vocab["a</w>"], *(vocab[word] for word in words)]
    # Other programs run tokenizer.json as it stands.
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in HARD_TEXTS[:20]:
        ids = plain.encode(text).ids[:76]
        assert ours.encode([text]).input_ids[0, : len(ids)].tolist() == ids


def test_tiny_tokenizer_is_the_same_each_time(tmp_path):
    for name in ("one", "two"):
        write_tiny_tokenizer(tmp_path / name, "!")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("file_name", "content", "words"),
    [
        ("vocab.json", None, "neither tokenizer.json nor vocab.json"),
        ("vocab.json", '{"a": 1', "vocab.json: Invalid JSON"),
        ("vocab.json", '["a", "b"]', "vocab.json: Input should be"),
        ("vocab.json", '{"a": -1}', "vocab.json: a: .* greater than or equal to 0"),
        ("vocab.json", b"\xff\xfe\x00", "vocab.json is not UTF-8"),
        ("vocab.json", "{}", "merges.txt: merge 1 "),
        ("merges.txt", None, "merges.txt: No such file"),
        ("merges.txt", "#version: 0.2\nt h\nt h e\n", "merges.txt: merge 2 is 't h e'"),
        ("merges.txt", "t h\nq zebra</w>\n", "merges.txt: merge 2 is 'q zebra</w>'"),
        ("tokenizer.json", "", "tokenizer.json: Invalid JSON"),
        ("tokenizer.json", '{"version": "1.0"}', "tokenizer.json: model: Field required"),
        ("tokenizer.json", '{"model": {"vocab": [["a", 0.5]]}}', "tokenizer.json: model.vocab: "),
        ("special_tokens_map.json", '{"pad_token": 7}', "special_tokens_map.json: pad_token: "),
        (
            "special_tokens_map.json",
            '{"pad_token": "<pad>"}',
            "pad_token '<pad>' is not in the voc",
        ),
        ("special_tokens_map.json", '{"eos_token": "<e>"}', "eos_token '<e>' is not in the vocab"),
        (
            "tokenizer_config.json",
            '{"model_max_length": 0}',
            "tokenizer_config.json: model_max_len",
        ),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: Input should be"),
    ],
)
def test_bad_files_are_named(file_name, content, words, tmp_path):
    write_tiny_tokenizer(tmp_path, "!")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / file_name).unlink(missing_ok=True)
    if content is not None:
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / file_name).write_bytes(raw)
    with pytest.raises(ModelError, match=words) as caught:
        CLIPTokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)
