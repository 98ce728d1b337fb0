"""One thread per test process: pytest-xdist already uses every core, and two pools on one core wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
