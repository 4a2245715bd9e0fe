"""The command line ``tsmask``: one module for each subcommand, imported only when it runs."""

from .main import main

__all__ = ["main"]
