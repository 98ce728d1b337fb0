"""``python -m qcompress`` is the command line."""

import sys

from qcompress.cli import main

sys.exit(main())
