"""Takes secrets out of text that is written down: errors quote URLs, and URLs hold keys."""

import os
import re
from collections.abc import Mapping

HIDDEN = "***"
MIN_SECRET_LENGTH = 8
"""Shorter values of variables are words that occur in any text."""
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.I)
PATHS = re.compile(r"(?:FILE|PATH|DIR|URL|URI|MODE)$", re.I)
"""Variables that say where a secret is."""
USER_INFO = re.compile(r"(?<=://)[^/\s@]+@")
QUERY = re.compile(
    r"(?<=[?&;])((?:x-amz-|x-goog-)?(?:signature|credential|security-token|token|sig|key|secret|"
    r"password|access_token|api_key|awsaccesskeyid))=[^&\s'\"]+",
    re.I,
)
KNOWN_FORMS = re.compile(r"\bhf_[A-Za-z0-9]{20,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bBearer\s+\S+")


class Redactor:
    """Knows this process's own secrets, and what others look like."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        values = {
            value
            for name, value in environ.items()
            if SECRET_NAME.search(name)
            and not PATHS.search(name)
            and len(value) >= MIN_SECRET_LENGTH
        }
        longest_first = sorted(values, key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, longest_first))) if values else None

    def __call__(self, text: str) -> str:
        """Return `text` without its secrets."""
        if self._values is not None:
            text = self._values.sub(HIDDEN, text)
        text = USER_INFO.sub(f"{HIDDEN}@", text)
        text = QUERY.sub(rf"\1={HIDDEN}", text)
        return KNOWN_FORMS.sub(HIDDEN, text)
