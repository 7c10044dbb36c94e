"""What went wrong with MLflow, in one sentence that says what to do and holds no password."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from sweeps.source import without_password

SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_WITHOUT_ANSWER = r"NewConnectionError|Connection refused|Connection aborted|Max retries exceeded"


def sentence(error: BaseException, uri: str) -> str:
    """One line for an error that MLflow, its database, or the network raised.

    Args:
        uri: of the tracking store.
    """
    text = str(error).strip()
    said, fix = problem(text, uri)
    first = f"{type(error).__name__}: {(text.splitlines() or [''])[0]}"
    return cleaned("; ".join(part for part in (said or first, fix) if part))[:300]


def problem(text: str, uri: str) -> tuple[str, str]:
    """What a store's refusal means, and what to do; both empty for one that is not known.

    Args:
        text: of the error.
        uri: of the tracking store.
    """
    if "out-of-date database schema" in text:
        return "the store is of an older MLflow", f"back it up, then: mlflow db upgrade {without_password(uri)}"
    if "Can't locate revision" in text:
        return "the store is of a newer MLflow", "pip install -U mlflow"
    if "filesystem tracking backend" in text or "maintenance mode" in text:
        return "MLflow no longer keeps runs in folders", "use sqlite:////absolute/path.db, or a server"
    if not uri.startswith(("http://", "https://")):
        return "", ""
    host = urlsplit(without_password(uri)).hostname or uri
    return _of_answer(text, host) or _of_silence(text, host)


def cleaned(text: str) -> str:
    """The text without the password of any URL in it and without the secrets of the environment."""
    text = without_password(text)
    for name in SECRETS:
        secret = os.environ.get(name, "")
        if secret:
            text = text.replace(secret, "***")
    return text


def _of_answer(text: str, host: str) -> tuple[str, str] | None:
    code = _code(text)
    if "Invalid Host header" in text:
        return (
            f"the MLflow server does not accept the name {host} (403)",
            f"start it with --allowed-hosts '{host},{host}:*' (mlflow server --help)",
        )
    if code == 401 or text.startswith("UNAUTHENTICATED"):
        return (
            "the MLflow server refuses the user or password (401)",
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, where the sweep runs",
        )
    if code == 403 or text.startswith("PERMISSION_DENIED"):
        return (
            "the MLflow server knows the user but does not let it write here (403)",
            "ask for the right to edit",
        )
    return None


def _of_silence(text: str, host: str) -> tuple[str, str]:
    """The way to the server, or a server that fails."""
    code = _code(text)
    if "timeout" in text.lower() or "timed out" in text:
        return f"the MLflow server at {host} does not answer in time", ""
    if re.search(r"NameResolution|Name or service|nodename nor|No address", text):
        return f"the name {host} of the MLflow server is not known on this machine", ""
    if re.search(_WITHOUT_ANSWER, text):
        return f"no MLflow server answers at {host}", "start it, or correct MLFLOW_TRACKING_URI"
    return (f"the MLflow server answers with error {code}", "see its log") if code >= 500 else ("", "")


def _code(text: str) -> int:
    found = re.search(r"error code (\d{3})\b|too many (\d{3}) error", text)
    return int(next(filter(None, found.groups()))) if found else 0
