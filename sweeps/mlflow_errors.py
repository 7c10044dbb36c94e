"""What went wrong with MLflow, in one sentence that says what to do and holds no password."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from sweeps.source import without_password

SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


def sentence(error: BaseException, uri: str) -> str:
    """One line for an error that MLflow, its database, or the network raised.

    Args:
        uri: of the tracking store.
    """
    text = str(error).strip()
    known = _of_server(text, urlsplit(uri).hostname or uri) if uri.startswith(("http://", "https://")) else ""
    return cleaned(known or f"{type(error).__name__}: {(text.splitlines() or [''])[0]}")[:300]


def cleaned(text: str) -> str:
    """The text without the password of any URL in it and without the secrets of the environment."""
    text = without_password(text)
    for name in SECRETS:
        secret = os.environ.get(name, "")
        if secret:
            text = text.replace(secret, "***")
    return text


def _of_server(text: str, host: str) -> str:
    """The sentence for what a server or the way to it answers often; empty for anything else."""
    code = _code(text)
    if "Invalid Host header" in text:
        return (
            f"the MLflow server does not accept the name {host}; start it with --allowed-hosts '{host},{host}:*' "
            "(mlflow server --help)"
        )
    if code == 401 or text.startswith("UNAUTHENTICATED"):
        return (
            "the MLflow server refuses the user or password (401); set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, where the sweep runs"
        )
    if code == 403 or text.startswith("PERMISSION_DENIED"):
        return "the MLflow server knows the user but does not let it write here (403); ask for the right to edit"
    if "timeout" in text.lower() or "timed out" in text:
        return f"the MLflow server at {host} does not answer in time"
    if re.search(r"NameResolution|Name or service|nodename nor|No address", text):
        return f"the name {host} of the MLflow server is not known on this machine"
    if re.search(r"NewConnectionError|Connection refused|Connection aborted|Max retries exceeded", text):
        return f"no MLflow server answers at {host}"
    return f"the MLflow server answers with error {code}" if code >= 500 else ""


def _code(text: str) -> int:
    found = re.search(r"error code (\d{3})\b|too many (\d{3}) error", text)
    return int(next(filter(None, found.groups()))) if found else 0
