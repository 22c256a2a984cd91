"""How fast the operations are, against everybody else's and against the memory: ``python -m benchmarks --help``.

One floor a file: ``operations`` is the table of what is measured and the goals it must meet, ``forms`` the other
ways to write the same things, ``trees`` the shapes of networks, ``stopwatch`` who is timed and how, ``bounds`` what
nobody could beat, ``measure`` one row, ``curves``, ``instruction_sets``, ``kept_memory`` and ``footprint`` what else is
asked of the kernels (in ``processes`` of their own), ``machine`` where it ran, ``report`` what is shown.
To add an operation, add its entry to ``operations.ROWS``.
"""

import os

# Contenders take turns in one process. A library whose idle threads spin for milliseconds after its turn would
# slow down whoever comes next, so all of them are told to sleep; they read this when they are first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
