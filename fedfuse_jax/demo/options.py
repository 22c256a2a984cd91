"""Options that the demo's command line shares with others about the same federation."""

import argparse
from collections.abc import Callable
from pathlib import Path

from fedfuse_jax.demo.rules import RULES

RULE_NAMES = ", ".join(name.replace(" ", "-") for name in RULES)


def rule(text: str) -> str:
    """The name of a rule; hyphens do for its spaces."""
    for name in RULES:
        if text.replace(" ", "-") == name.replace(" ", "-"):
            return name
    raise argparse.ArgumentTypeError(f"got {text!r}, needs one of {RULE_NAMES}")


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """A whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not least <= number <= most:
            raise argparse.ArgumentTypeError(f"got {text!r}, needs a whole number from {least} to {most}")
        return number

    return parse


def writable_png(text: str) -> Path:
    """Refuses, before a minute of training, a file that could not be written after it."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"got {text!r}, needs a file name that ends in .png")
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, which cannot be written: {error.strerror}") from None
    if not existed:
        path.unlink()
    return path
