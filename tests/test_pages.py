"""Which memory huge pages are asked for, by the kernels' own source."""

from cxx import needs_compiler, run_host_test


@needs_compiler
def test_large_results_get_huge_pages(tmp_path):
    """One result and several that follow each other; what lies between them keeps its contents."""
    run_host_test(tmp_path, "pages")
