"""The one error that a user of the report sees."""


class ReportError(Exception):
    """Bad input; the message is one sentence that says what is wrong, where, and what to do."""
