import pytest

from raydiff.config_files import config_file, config_names
from raydiff.errors import ConfigError


def test_every_named_file_exists() -> None:
    names = config_names("models")
    assert {"sd21", "sd21-base", "sdxl"} <= set(names)
    assert all(config_file("models", name).is_file() for name in names)


def test_an_unknown_name_says_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r'there is no .sdx.; did you mean "sdxl"'):
        config_file("models", "sdx")


def test_an_unknown_kind_has_no_names() -> None:
    assert config_names("nothing") == []
    with pytest.raises(ConfigError, match="known: none"):
        config_file("nothing", "x")
