"""``engines``: list the engines and what is missing."""

from qcompress.cli import arguments
from qcompress.cli.console import print_json, print_lines, print_table

WITHOUT = "without --target: the package's own file, for PyTorch"


def engines(as_json: arguments.AsJson = False) -> None:
    """List the engines that models can be written for: which are installed, what is missing, and their settings.

    Example: `qcompress engines`
    """
    from dataclasses import asdict

    import qcompress

    infos = qcompress.engines()
    if as_json:
        print_json([asdict(info) for info in infos])
        return
    rows = [
        (info.name, "yes" if info.available else "no",
         info.summary if info.available else f"{info.summary} [{info.why_not}]")
        for info in infos
    ]  # fmt: skip
    print_table(("engine", "here", "summary"), [*rows, ("(none)", "yes", WITHOUT)])
    print_lines("")
    settings = [(info.name, name, meaning) for info in infos for name, meaning in info.settings.items()]
    print_table(("engine", "--setting", "meaning"), settings)
