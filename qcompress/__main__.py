"""``python -m qcompress`` is the command line."""

from qcompress.cli import main

main()
