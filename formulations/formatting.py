"""Format numbers for tables, reports and the command line."""

from collections.abc import Iterable, Sequence

LARGEST = 2.0**53  # beyond it a float does not hold every whole number


def number(value: float | None, digits: int = 6) -> str:
    """Format a number with ``digits`` significant digits, or a dash for None.

    >>> number(1234.56789), number(None)
    ('1,234.57', '–')
    """
    return "–" if value is None else f"{value:,.{digits}g}"


def with_error(value: float, error: float | None, digits: int = 4) -> str:
    """Format a number with its standard error, if that is known.

    >>> with_error(0.123456, 0.0123), with_error(0.123456, None)
    ('0.1235 ± 0.012', '0.1235')
    """
    return f"{value:.{digits}g}" + ("" if error is None else f" ± {error:.2g}")


def limit(value: float) -> str:
    """Format a limit that may be asked for as it is printed: whole numbers are written in full.

    >>> limit(12345678), limit(1234.56789)
    ('12,345,678', '1,234.57')
    """
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < LARGEST else number(value)


def amount(value: float) -> str:
    """Format an amount of a resource; large and whole numbers are written in full.

    >>> amount(1234.5), amount(0.01234567)
    ('1,234', '0.01235')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:,.4g}"


def percent(value: float | None) -> str:
    """Format a fraction as a percentage, or a dash for None.

    >>> percent(0.0123456), percent(None)
    ('1.235%', '–')
    """
    return "–" if value is None else f"{value:.3%}"


def plural(count: int, noun: str) -> str:
    """Format a count with its noun in the singular or plural.

    >>> plural(1, "round"), plural(2, "round")
    ('1 round', '2 rounds')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def one_line(text: str) -> str:
    r"""Format text of any origin in one line.

    >>> one_line("no kernel\n  for float64")
    'no kernel for float64'
    """
    return " ".join(text.split())


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""Format rows as a Markdown table; a column whose name starts with ``>`` is set to the right.

    Names and messages of others are cells too: white space becomes one space, and a bar does not end its cell.

    >>> print(markdown_table(["part", ">bytes"], [["a|b", "12"]]))
    | part | bytes |
    |---|--:|
    | a\|b | 12 |
    """
    lines = [[name.removeprefix(">") for name in columns], *rows]
    head, *body = [f"| {' | '.join(one_line(cell).replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines]
    return "\n".join([head, f"|{'|'.join('--:' if name.startswith('>') else '---' for name in columns)}|", *body])
