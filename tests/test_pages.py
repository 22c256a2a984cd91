"""Which memory huge pages are asked for, by the kernels' own source."""

import pytest
from cxx import FFI, compile_cxx, needs_compiler, run

PAGES = FFI / "cpu" / "pages.cc"


@pytest.mark.skipif(not PAGES.exists(), reason="the sources are not here")
@needs_compiler
def test_large_results_get_huge_pages(tmp_path):
    """One result and several that follow each other; what lies between them keeps its contents."""
    program = tmp_path / "pages_test"
    test = FFI / "cpu" / "tests" / "pages_test.cc"
    compile_cxx(program, "-fsanitize=address,undefined", PAGES, test)
    assert " 0 failed" in run(program)
