"""Programs of the repository that are no modules of a package, as modules to test."""

import importlib.util
import sys


def load_script(path):
    """The module that a file makes, under the file's name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module
