"""GemmaTokenizer against transformers', from each layout of files; and the errors for bad files."""

import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import GemmaTokenizer as ReferenceTokenizer

from raydiff.errors import ModelError
from raydiff.gemma_tokenizer import GemmaTokenizer, write_tiny_gemma_tokenizer
from tests.tokenizer_files import random_texts, write_json

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
NAMES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
NAMED = [{"content": content, "id": index} for index, content in enumerate(SPECIAL)]
GOOGLE_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    **NAMES,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1000000000000000019884624838656,
    "sp_model_kwargs": None,
    "spaces_between_special_tokens": False,
    "tokenizer_class": "GemmaTokenizer",
    "use_default_system_prompt": False,
}

HARD_TEXTS = [
    "",
    " ",
    "a photo of an astronaut riding a horse on mars, 8k, trending on artstation",
    "  spaces around \n",
    "double  spaces   and    more, ▁ and ▁▁ typed",
    "tabs\tand\nnew\r\nlines\n\n\nand\u2028more\u3000end",
    "no\xa0break\u2003em\u200bzero\ufeffwidth\x85",
    "👩‍👩‍👧‍👦 family 🇩🇪 flag 🏳️‍🌈 👍🏽 thumbs",
    "cre\u0300me bru\u0302le\u0301e, crème brûlée, ẞtraße İstanbul",
    "一只戴着帽子的猫 日本語のテスト 한국어 테스트",
    "שלום עולם مرحبا بالعالم नमस्ते ประเทศไทย 𝔉𝔯𝔞𝔨𝔱𝔲𝔯 𒀀",
    "NUL\x00 control \x01\x1b[31m\x7f\x9f",
    "<bos>typed<eos> <pad> <unk> <mask> < pad> <PAD> <pad>",
    "<start_of_turn>user\nhello<end_of_turn>\n<unused0><image_soft_token>",
    "<0x41> <0xFF> <0x0A> &amp; <b>bold</b>",
    "123 1,234.56 4k 1920x1080 ١٢٣ Ⅷ ½",
    "\ufffd \ue000 \U0010ffff \ufffe",
    "x" * 300,
    "a cat and a dog " * 400,
    "猫犬" * 2500,
]


TEXTS = HARD_TEXTS + random_texts(100, seed=1)


@pytest.fixture(scope="module")
def google(tmp_path_factory) -> Path:
    """The two files as Google's repositories have them, of a BPE trained on English."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    symbols = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        show_progress=False,
        special_tokens=[*SPECIAL, "<start_of_turn>", "<end_of_turn>", "<unused0>", *symbols],
    )
    # By words, each with the space before it, to be quick; applied to whole prompts, as Gemma's.
    words = {"▁" + word for text in list(topics.values())[:10] for word in text.split()}
    bpe.train_from_iterator(sorted(words), trainer)
    values = json.loads(bpe.to_str())
    values["added_tokens"] = [
        token for token in values["added_tokens"] if token["content"] not in symbols
    ]
    size = len(values["model"]["vocab"])
    values["added_tokens"].append(
        {"id": size, "content": "<image_soft_token>", **FLAGS, "special": True}
    )
    values["added_tokens"].append({"id": size + 1, "content": "\n\n", **FLAGS, "special": False})
    values["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    values["post_processor"] = template(["<bos>"])
    folder = tmp_path_factory.mktemp("google")
    write_json(folder / "tokenizer.json", values)
    decoder = {str(token.pop("id")): token for token in values["added_tokens"]}
    write_json(folder / "tokenizer_config.json", {**GOOGLE_CONFIG, "added_tokens_decoder": decoder})
    return folder


def as_published(folder: Path) -> None:
    """Nothing changed."""


def saved_by_transformers(folder: Path) -> None:
    reference = ReferenceTokenizer.from_pretrained(folder)
    for file in folder.iterdir():
        file.unlink()
    reference.save_pretrained(folder)
    assert {file.name for file in folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def bos_by_template_alone(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "GemmaTokenizer", **NAMES})


def config_against_template(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    write_json(
        folder / "tokenizer_config.json", {**config, "add_bos_token": False, "add_eos_token": True}
    )


def without_bos(folder: Path) -> None:
    """As transformers saves a tokenizer that was made in memory."""
    bos_by_template_alone(folder)
    change(folder, post_processor=template([]))


def foreign_tokenizer_json(folder: Path) -> None:
    """Merges as strings, and another normaliser, which transformers does not take either."""
    values = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    merges = [" ".join(merge) for merge in values["model"]["merges"]]
    change(folder, model={**values["model"], "merges": merges}, normalizer={"type": "NFD"})


LAYOUTS = [
    as_published,
    saved_by_transformers,
    bos_by_template_alone,
    config_against_template,
    without_bos,
    foreign_tokenizer_json,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_ids_equal_transformers(layout, google, tmp_path):
    folder = shutil.copytree(google, tmp_path / "tokenizer")
    layout(folder)
    check_equal(folder)


def test_tiny_tokenizer_equals_transformers(tmp_path):
    size = write_tiny_gemma_tokenizer(tmp_path)
    ours = check_equal(tmp_path)
    assert (ours.vocab_size, ours.pad_token_id, ours.max_length) == (size, 0, 1024)
    ids = ours.encode(["cat and the red dog"]).input_ids[0, -6:]
    assert ids[0] == 2
    assert len({*ids.tolist()}) == 6


def check_equal(folder: Path) -> GemmaTokenizer:
    """Against the call that diffusers' LTX2Pipeline makes."""
    reference = ReferenceTokenizer.from_pretrained(folder)
    reference.padding_side = "left"
    ours = GemmaTokenizer.from_folder(folder)
    tokens = ours.encode(TEXTS)
    expected = reference(
        [text.strip() for text in TEXTS], padding="max_length", max_length=1024, truncation=True
    )
    for row, text in enumerate(TEXTS):
        assert tokens.input_ids[row].tolist() == expected["input_ids"][row], repr(text[:80])
        assert tokens.attention_mask[row].tolist() == expected["attention_mask"][row]
    lengths = [len(reference(text.strip())["input_ids"]) for text in TEXTS]
    assert tokens.is_truncated == tuple(length > 1024 for length in lengths)
    assert 1 <= sum(tokens.is_truncated) < 5
    assert tokens.lengths == tuple(min(length, 1024) for length in lengths)
    return ours


def test_prompts_are_stripped_and_begin_with_bos_after_padding_on_the_left(tmp_path):
    write_tiny_gemma_tokenizer(tmp_path, max_length=8)
    tokens = GemmaTokenizer.from_folder(tmp_path).encode(["\n red cat\t ", "red cat", ""])
    assert (tokens.input_ids.dtype, tokens.attention_mask.dtype) == (np.int64, np.bool_)
    assert tokens.input_ids.shape == (3, 8)
    assert tokens.input_ids[0].tolist() == tokens.input_ids[1].tolist()
    assert tokens.input_ids[0, :6].tolist() == [0, 0, 0, 0, 0, 2]
    assert tokens.attention_mask[0].tolist() == [False] * 5 + [True] * 3
    assert tokens.input_ids[2].tolist() == [0] * 7 + [2]
    assert tokens.lengths == (3, 3, 1)


def test_length_is_the_tokenizers_but_at_most_1024(tmp_path):
    write_tiny_gemma_tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    for length, expected in ((16, 16), (1024, 1024), (2048, 1024), (10**30, 1024)):
        write_json(config, {**GOOGLE_CONFIG, "model_max_length": length})
        tokens = GemmaTokenizer.from_folder(tmp_path).encode(["cat " * 2000])
        assert tokens.input_ids.shape == (1, expected)
        assert tokens.is_truncated == (True,)
        assert tokens.input_ids[0, 0] == 2
        assert tokens.attention_mask.all()


def test_pad_that_was_typed_is_a_token(tmp_path):
    write_tiny_gemma_tokenizer(tmp_path, max_length=8)
    tokens = GemmaTokenizer.from_folder(tmp_path).encode(["<pad>cat"])
    assert tokens.input_ids[0, 5:7].tolist() == [2, 0]
    assert tokens.attention_mask[0].tolist() == [False] * 5 + [True] * 3


def test_tiny_tokenizer_is_the_same_each_time_and_runs_as_it_stands(tmp_path):
    for name in ("one", "two"):
        write_tiny_gemma_tokenizer(tmp_path / "new" / name, max_length=64)
    for file in (tmp_path / "new" / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "new" / "two" / file.name).read_bytes()
    plain = Tokenizer.from_file(str(tmp_path / "new" / "one" / "tokenizer.json"))
    ours = GemmaTokenizer.from_folder(tmp_path / "new" / "one")
    for text in HARD_TEXTS[:10]:
        ids = plain.encode(text.strip()).ids[:64]
        assert ours.encode([text]).input_ids[0, -len(ids) :].tolist() == ids


@pytest.mark.parametrize(
    ("change_of_json", "config", "words"),
    [
        (None, {}, "tokenizer.json: No such file"),
        ({"model": {"vocab": []}}, {}, "tokenizer.json: model.vocab: "),
        (
            {"model": {"vocab": {"a": 0}, "merges": ["a b"]}, "added_tokens": NAMED},
            {},
            "merge 1 is 'a b'",
        ),
        (
            {"model": {"vocab": {}, "merges": []}, "added_tokens": []},
            {},
            "pad_token '<pad>' is not in the voc",
        ),
        ({"added_tokens": [{"content": "<x>", "id": 7}]}, {}, "added token '<x>' has id 7"),
        ({"post_processor": {"type": "BertProcessing"}}, {}, "post_processor.type: .*Template"),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<x>"}}],
                }
            },
            {},
            "post_processor adds '<x>'",
        ),
        ({}, {"tokenizer_class": "T5Tokenizer"}, "tokenizer_config.json: tokenizer_class: "),
        ({}, {"model_max_length": 1}, "tokenizer_config.json: model_max_length: "),
        ({}, {"bos_token": "<s>"}, "bos_token '<s>' is not in the vocabulary"),
    ],
)
def test_bad_files_are_named(change_of_json, config, words, tmp_path):
    write_tiny_gemma_tokenizer(tmp_path)
    if change_of_json is None:
        (tmp_path / "tokenizer.json").unlink()
    else:
        change(tmp_path, **change_of_json)
    write_json(tmp_path / "tokenizer_config.json", config)
    with pytest.raises(ModelError, match=words) as caught:
        GemmaTokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)


def template(before: list[str]) -> dict:
    pieces = [{"SpecialToken": {"id": token, "type_id": 0}} for token in before]
    single = [*pieces, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {
        token: {"id": token, "ids": [SPECIAL.index(token)], "tokens": [token]} for token in before
    }
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": special,
    }


def change(folder: Path, **values: object) -> None:
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    write_json(folder / "tokenizer.json", {**content, **values})
