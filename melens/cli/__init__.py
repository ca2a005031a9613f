"""The command line: parse, call, print. torch is imported inside the commands only."""

from melens.cli.app import main

__all__ = ["main"]
