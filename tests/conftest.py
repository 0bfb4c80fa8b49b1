"""One thread for all tests: small arrays gain nothing from more, and a busy machine loses much."""

import os

for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(name, "1")
