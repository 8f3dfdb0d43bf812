"""Secrets stay where they are: what a study writes, prints or sends is cleared of those that this machine knows.

They come by the environment, or by the files that Ray, PostgreSQL and MLflow know themselves; no setting takes one.
"""

import configparser
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

HIDDEN = "***"
SHORTEST = 8
"""Characters that a secret must have to be looked for: shorter ones, `hdml` for example, would be found in many words.
"""

ADDRESSES = ("HDML_LEDGER", "MLFLOW_TRACKING_URI")
"""Variables whose value is an address that may hold a password."""
VARIABLES = (
    "RAY_AUTH_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "PGPASSWORD",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "DATABRICKS_TOKEN",
)


def redacted(said: Any) -> Any:
    """The same text, or the same JSON, with *** for every secret in it; keys stay as they are."""
    secrets = known()
    if not secrets:
        return said
    pattern = re.compile("|".join(re.escape(secret) for secret in sorted(secrets, key=len, reverse=True)))

    def cleared(value: Any) -> Any:
        match value:
            case str():
                return pattern.sub(HIDDEN, value)
            case dict():
                return {key: cleared(item) for key, item in value.items()}
            case list() | tuple():
                return [cleared(item) for item in value]
        return value

    return cleared(said)


def known() -> set[str]:
    """Every secret that the environment and the usual files hold, as they are and as an address writes them."""
    found = {secret for secret in (*_of_environment(), *_of_files()) if len(secret) >= SHORTEST}
    return found | {quote(secret, safe="") for secret in found}


def _of_environment() -> Iterator[str]:
    for name in ADDRESSES:
        with suppress(ValueError):
            address = urlsplit(os.environ.get(name, ""))
            yield unquote(address.password or "")
            yield from parse_qs(address.query).get("password", [])
    for name in VARIABLES:
        yield os.environ.get(name, "")


def _of_files() -> Iterator[str]:
    home = Path.home()
    yield _text(Path(os.environ.get("RAY_AUTH_TOKEN_PATH", home / ".ray" / "auth_token"))).strip()
    for line in _text(Path(os.environ.get("PGPASSFILE", home / ".pgpass"))).splitlines():
        # host:port:database:user:password, with \: and \\ for what would end a field
        fields = [field.replace("\\:", ":").replace("\\\\", "\\") for field in re.split(r"(?<!\\):", line)]
        yield fields[-1] if len(fields) == 5 else ""
    credentials = configparser.ConfigParser(interpolation=None)
    with suppress(configparser.Error):
        credentials.read_string(_text(home / ".mlflow" / "credentials"))
    for section in credentials.values():
        yield from (section.get(name, "") for name in ("mlflow_tracking_password", "mlflow_tracking_token"))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
