"""``solvers``: list the solvers, what they can do, and what is missing."""

from qcompress.cli import arguments
from qcompress.cli.console import print_json, print_table
from solvers import SolverInfo


def solvers(as_json: arguments.AsJson = False) -> None:
    """List the solvers: which are installed, what they can do, and their options.

    Example: `qcompress solvers`
    """
    from dataclasses import asdict

    from solvers import available

    infos = [_with_token(info) for info in available()]
    if as_json:
        print_json([asdict(info) for info in infos])
        return
    rows = []
    for info in infos:
        able = [("proves", info.exact), ("pairs", info.native_pairs), ("network", info.needs_network)]
        options = ", ".join(f"{name}={default!r}" for name, default in info.options.items())
        about = info.summary if info.available else f"{info.summary} [{info.why_not}]"
        usable = "yes" if info.available else "no"
        rows.append((info.name, usable, ", ".join(word for word, is_so in able if is_so), about, options))
    print_table(("solver", "here", "can", "summary", "options"), rows)


def _with_token(info: SolverInfo) -> SolverInfo:
    """Mark a solver of the service as not available if no API token is configured. This needs no network."""
    if not (info.needs_network and info.available):
        return info
    from dataclasses import replace

    from solvers.leap.connection import missing_token

    why = missing_token()
    return replace(info, available=not why, why_not=why)
