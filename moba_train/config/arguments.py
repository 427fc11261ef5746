"""Scripts with flags of their own: their docstring is their help. Standard library only."""

from __future__ import annotations

import argparse

__all__ = ["argument_parser"]


def argument_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that describes itself by the first paragraph of `doc` and shows the rest, as it is, below the flags."""
    summary, _, rest = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
