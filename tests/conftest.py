"""One thread for all tests: small arrays gain nothing from more, and a busy machine loses much.

numba may be imported before this file is read (anndata registers a plugin of pytest), and then refuses another value of
NUMBA_NUM_THREADS; its threads are masked instead. A shell that runs the tests in the background may ignore Ctrl-C,
which some tests send.
"""

import os
import signal

import numba

os.environ.setdefault("OMP_NUM_THREADS", "1")
numba.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
