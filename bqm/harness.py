"""The import path that earlier jobs use."""

from harnessd import Command, Cradle, ProcessHarness, launch

__all__ = ["Command", "Cradle", "ProcessHarness", "launch"]
