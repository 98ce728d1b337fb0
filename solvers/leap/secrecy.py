"""API tokens kept out of logs: D-Wave's client logs its configuration and its requests' headers as they are."""

import logging
import re

CLIENT = "dwave.cloud"
"""The client's loggers are called this, or begin with it."""

SECRET = re.compile(r"""(token['"]?\s*[:=]\s*)(['"]).*?\2""", re.IGNORECASE)


class _Masked(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Let the record pass, without what is a token in it."""
        text = record.getMessage()
        if (masked := mask(text)) != text:
            record.msg, record.args = masked, None
        return True


_MASKED = _Masked()


def mask(text: str) -> str:
    """``text`` with every token that it names left out.

    >>> mask("config(endpoint='there', token='abc'), headers={'X-Auth-Token': 'abc'}")
    "config(endpoint='there', token='…'), headers={'X-Auth-Token': '…'}"
    """
    return SECRET.sub(r"\1\2…\2", text)


def mask_logs() -> None:
    """Mask what the client's loggers say from now on; once it is imported, since a filter is not inherited."""
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.startswith(CLIENT) and isinstance(logger, logging.Logger):
            logger.addFilter(_MASKED)
