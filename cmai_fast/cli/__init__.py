"""The command `cmai-fast`."""

from cmai_fast.cli.main import app

__all__ = ["app"]
