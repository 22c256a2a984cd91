"""How work is shared among threads: by the executor's own source, on a thread pool that does as the test says."""

from pathlib import Path

import jaxlib
from cxx import needs_compiler, run_host_test

INCLUDE = Path(jaxlib.__file__).parent / "include"


@needs_compiler
def test_tasks_are_shared(tmp_path):
    """More and fewer tasks than threads, stages, threads that come late, tasks that throw."""
    run_host_test(tmp_path, "executor", "-pthread", "-isystem", INCLUDE)
