"""One thread per process: tiny products gain nothing from more, and busy machines lose much."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
