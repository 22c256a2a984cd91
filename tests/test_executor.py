"""How work is shared among threads: by the executor's own source, on a thread pool that does as the test says."""

from pathlib import Path

import jaxlib
import pytest
from cxx import FFI, compile_cxx, needs_compiler, run

INCLUDE = Path(jaxlib.__file__).parent / "include"
EXECUTOR = FFI / "cpu" / "executor.cc"


@pytest.mark.skipif(not EXECUTOR.exists(), reason="the sources are not here")
@needs_compiler
def test_tasks_are_shared(tmp_path):
    """More and fewer tasks than threads, stages, threads that come late, tasks that throw."""
    program = tmp_path / "executor_test"
    test = FFI / "cpu" / "tests" / "executor_test.cc"
    compile_cxx(program, "-fsanitize=address,undefined", "-pthread", "-isystem", INCLUDE, EXECUTOR, test)
    assert " 0 failed" in run(program)
