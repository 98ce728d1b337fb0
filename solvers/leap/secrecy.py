"""Mask API tokens in logs, because D-Wave's client logs its configuration and request headers unmasked."""

import logging
import re

CLIENT = "dwave.cloud"
"""Name, or prefix of the names, of the client's loggers."""

SECRET = re.compile(r"""(token['"]?\s*[:=]\s*)(['"]).*?\2""", re.IGNORECASE)


class _Masked(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Mask the tokens in the record and let it pass."""
        text = record.getMessage()
        if (masked := mask(text)) != text:
            record.msg, record.args = masked, None
        return True


_MASKED = _Masked()


def mask(text: str) -> str:
    """Replace every token in ``text`` by an ellipsis.

    >>> mask("config(endpoint='there', token='abc'), headers={'X-Auth-Token': 'abc'}")
    "config(endpoint='there', token='…'), headers={'X-Auth-Token': '…'}"
    """
    return SECRET.sub(r"\1\2…\2", text)


def mask_logs() -> None:
    """Mask all later messages of the client's loggers; call it after the import, since filters are not inherited."""
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.startswith(CLIENT) and isinstance(logger, logging.Logger):
            logger.addFilter(_MASKED)
