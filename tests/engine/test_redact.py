"""What is taken out of text before it is written down, and what stays."""

import pytest

from raydiff.engine.redact import Redactor

ENVIRON = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
    "HF_TOKEN": "hf_short",
    "RAY_AUTH_TOKEN_PATH": "/home/me/.ray/auth_token",
    "MY_PASSWORD": "short",
    "HOME": "/home/somebody",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("signed with wJalrXUtnFEMI/K7MDENG.", "signed with ***."),
        ("hf_short", "***"),
        ("https://me:pass@host/a.png failed", "https://***@host/a.png failed"),
        ("s3://bucket/a.png?X-Amz-Signature=ab12&x=1", "s3://bucket/a.png?X-Amz-Signature=***&x=1"),
        ("https://h/a?token=abc: 404", "https://h/a?token=*** 404"),
        ("key AKIAIOSFODNN7EXAMPLE", "key ***"),
        ("Authorization: Bearer abc.def", "Authorization: ***"),
        ("hf_abcdefghijklmnopqrstuvwx", "***"),
        ("/home/me/.ray/auth_token: mode 0644", "/home/me/.ray/auth_token: mode 0644"),
        ("a short story, token by token", "a short story, token by token"),
        ("/home/somebody/out", "/home/somebody/out"),
    ],
)
def test_secrets_are_hidden_and_the_rest_stays(text: str, expected: str) -> None:
    assert Redactor(ENVIRON)(text) == expected


def test_without_secrets_in_the_environment_the_known_forms_are_hidden() -> None:
    assert Redactor({})("Bearer abc") == "***"
