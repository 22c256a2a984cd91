"""Settings that must be made before JAX starts: four CPU devices, so that every test may shard."""

import os
import sys
from pathlib import Path

DEVICES = "--xla_force_host_platform_device_count=4"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
if ROOT not in map(Path, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))):
    # What is tested is the installed package. The checkout comes last, for the benchmarks, even where `python -m
    # pytest` put it first; and subprocesses do not look in the folder where they are started.
    sys.path[:] = [*(path for path in sys.path if Path(path).resolve() != ROOT), str(ROOT)]
    os.environ["PYTHONSAFEPATH"] = "1"

# The tests, and the scripts they run, import each other's tables (operations, oracle, helpers) by their plain names.
sys.path.insert(0, str(HERE))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
