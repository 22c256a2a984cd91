"""The custom calls as exported programs contain them: names, attributes, buffers. They are frozen.

A case that is new, or a call that may now also be made in another way, is written down by

    python tests/test_custom_calls.py

and the difference it makes to the file is read: a line that is gone is a program of a release that no longer runs.
"""

import json
import re
from pathlib import Path

import jax
import pytest
from operations import CASES, Problem, all_kernels_built, to_jax

RECORD = Path(__file__).parent / "released" / "custom_calls.json"
CALL = re.compile(
    r"custom_call @(?P<target>fedfuse\.[\w.]+)\(.*mhlo\.backend_config = \{(?P<attributes>[^}]*)\}.* : (?P<types>.*)$"
)


def custom_calls(case):
    """Each custom call of the case, as one line of text."""
    text = jax.jit(case.call).lower(*to_jax(case.sample(Problem()))).as_text()
    found = [CALL.search(line) for line in text.splitlines()]
    return ["{target} {{{attributes}}} {types}".format(**match.groupdict()) for match in found if match]


@pytest.mark.skipif(not all_kernels_built(), reason="definitions make no custom calls")
def test_custom_calls_are_as_recorded():
    recorded = json.loads(RECORD.read_text())
    assert {str(case): custom_calls(case) for case in CASES} == recorded


if __name__ == "__main__":
    RECORD.write_text(json.dumps({str(case): custom_calls(case) for case in CASES}, indent=1, sort_keys=True) + "\n")
