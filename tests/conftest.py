"""One thread per test process: pytest-xdist already uses every core, and two pools on one core wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.leap_fixtures import leap, one_connection  # noqa: F401  (fixtures of several modules)
