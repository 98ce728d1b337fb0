"""Ctrl-C inside compiled code, which Python reports as the cause of another error."""


def is_interrupt(error: BaseException | None) -> bool:
    """Whether an error is a Ctrl-C, or was raised from one.

    A signal that arrives while a function compiled by numba returns makes the call end in a ``SystemError``, "returned
    a result with an exception set", whose cause is the interrupt.

    >>> try:
    ...     raise SystemError("returned a result with an exception set") from KeyboardInterrupt()
    ... except SystemError as error:
    ...     is_interrupt(error), is_interrupt(SystemError())
    (True, False)
    """
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__
    return False
