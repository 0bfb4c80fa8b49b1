"""One thread for all tests: small arrays gain nothing from more, and a busy machine loses much.

numba may be imported before this file is read (anndata registers a plugin of pytest), and then refuses another value of
NUMBA_NUM_THREADS; its threads are masked instead.
"""

import os

import numba

os.environ.setdefault("OMP_NUM_THREADS", "1")
numba.set_num_threads(1)
