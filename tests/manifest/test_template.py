"""Templates and wildcards: every text once, in order or by chance, and what is refused."""

import random
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from raydiff.errors import ConfigError
from raydiff.manifest.template import Draws, Phrase, fill, parse_template
from raydiff.manifest.wildcards import Wildcards


def parse(text: str) -> Phrase:
    return parse_template(text, Wildcards(None).choice)


def texts(phrase: Phrase, **values: str) -> list[str]:
    return [fill(phrase, values, [], number=number) for number in range(phrase.num_texts)]


def write(folder: Path, **wildcards: str) -> Wildcards:
    for name, content in wildcards.items():
        (folder / f"{name}.txt").write_text(content, "utf-8")
    return Wildcards(str(folder))


def test_every_combination_of_choices_the_last_changes_first() -> None:
    rng = random.Random(1)
    sets = [[f"{rng.random()}" for _ in range(rng.randint(1, 4) + 1)] for _ in range(4)]
    phrase = parse(" - ".join("{" + "|".join(options) + "}" for options in sets))
    assert texts(phrase) == [" - ".join(chosen) for chosen in product(*sets)]


def test_choices_nest_and_may_be_empty() -> None:
    phrase = parse("a { very {big | small}| }{,|;} {size} fox")
    assert texts(phrase, size="grey") == [
        f"a {how}{mark} grey fox" for how in ("very big", "very small", "") for mark in ",;"
    ]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (r"\{a\|b\} a|b", "{a|b} a|b"),
        (r"\__init__ \\{x}", r"__init__ \7"),
        ("snake_case __ ___", "snake_case __ ___"),
        (r"(cat:1.2) \(paren\)", r"(cat:1.2) \(paren\)"),
        ("", ""),
        ("{ x }{x}", "77"),
        ("שלום {x} <script>é☕", "שלום 7 <script>é☕"),
    ],
)
def test_what_is_text(template: str, text: str) -> None:
    assert texts(parse(template), x="7") == [text]


def test_values_are_not_templates() -> None:
    assert texts(parse("{x}"), x="{a|b} __c__ {x}") == ["{a|b} __c__ {x}"]


def test_picks_are_named_in_reading_order(tmp_path: Path) -> None:
    wildcards = write(tmp_path, animal="cat\n__bird__\n", bird="{grey|snow} goose\nowl\n")
    phrase = parse_template("{x|y __bird__} {1|2} __animal__", wildcards.choice)
    found = {}
    for number in range(phrase.num_texts):
        picks: list[tuple[str, str]] = []
        found[fill(phrase, {}, picks, number=number)] = picks
    assert len(found) == (1 + 3) * 2 * (1 + 3)
    assert found["y owl 2 snow goose"] == [
        ("choice_1", "y owl"),
        ("bird", "owl"),
        ("choice_2", "2"),
        ("animal", "snow goose"),
        ("bird", "snow goose"),
    ]
    assert phrase.picks == Counter(choice_1=1, choice_2=1, bird=2, animal=1)


def test_wildcard_files_in_folders_with_comments_and_fields(tmp_path: Path) -> None:
    (tmp_path / "style").mkdir()
    text = "\ufeff# styles\r\n\r\n  {ink} wash \r\noil\r\n"
    (tmp_path / "style" / "old.txt").write_bytes(text.encode())
    phrase = parse_template("__style/old__", Wildcards(str(tmp_path)).choice)
    assert texts(phrase, ink="blue") == ["blue wash", "oil"]
    assert phrase.fields == Counter(ink=1)


def test_draws_are_even_and_depend_on_seed_and_row_alone() -> None:
    phrase = parse("{a|b|{c|d|e}}")

    def drawn(seed: int) -> list[str]:
        return [fill(phrase, {}, [], draws=Draws(seed, row)) for row in range(6000)]

    first = drawn(0)
    assert first == drawn(0)
    assert first != drawn(1)
    counts = Counter(first)
    assert counts["a"] == pytest.approx(2000, abs=200)
    assert counts["c"] == pytest.approx(667, abs=120)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a {b", "character 5: a { is not closed"),
        ("a {b|c", "not closed"),
        ("a } b", "character 3: closes a brace that is not open"),
        ("a {} b", "character 3: a { needs a field's name"),
        ("{{a|b}}", "needs a field's name"),
        ("{" * 40 + "a|b" + "}" * 40, "more than 32 deep"),
        ("a __b__", r"no folder of wildcards. Name it (--wildcards FOLDER), or write \__b__"),
    ],
)
def test_a_bad_template_says_where(template: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(template)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "__a__"}, "__a__ -> __a__ is a loop. Take __a__ out of a.txt"),
        (
            {"a": "x\n__b__", "b": "{1|__c__}", "c": "__b__"},
            "__b__ -> __c__ -> __b__ is a loop. Take __b__ out of c.txt",
        ),
        ({"aa": "cat"}, 'no a.txt; did you mean "aa"? known: aa'),
        ({"a": "# nothing\n\n"}, "a.txt has no lines"),
        ({"a": "__b__ __b__", "b": "__c__ " * 40, "c": "x"}, "takes 82 choices"),
        ({"a": "x {y"}, "not closed"),
        ({"a": "x" * 600_000 + "__b__", "b": "y" * 600_000}, "1,200,000 characters"),
        ({f"{'a' * (i + 1)}": f"__{'a' * (i + 2)}__" for i in range(40)}, "more than 32 deep"),
    ],
)
def test_bad_wildcards_are_named(files: dict[str, str], message: str, tmp_path: Path) -> None:
    wildcards = write(tmp_path, **files)
    with pytest.raises(ConfigError) as caught:
        parse_template("__a__", wildcards.choice)
    assert message in str(caught.value)


def test_wildcards_stay_in_their_folder_and_are_text(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "w" / "sub").mkdir(parents=True)
    (tmp_path / "w" / "link.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "w" / "binary.txt").write_bytes(b"\xff\xfe\x00")
    wildcards = Wildcards(str(tmp_path / "w"))
    for name, message in [
        ("sub/../../secret", "has no"),
        ("link", "has no"),
        ("sub", "has no sub.txt"),
        ("binary", "not UTF-8"),
    ]:
        with pytest.raises(ConfigError, match=message):
            parse_template(f"__{name}__", wildcards.choice)
    with pytest.raises(ConfigError, match="is not a folder"):
        Wildcards(str(tmp_path / "gone"))
