"""Every table there is: the modules are imported for what they register."""

from melens.cli import cause_tables, eval_table, patch_command, super_weights_table  # noqa: F401
from melens.cli.tables import TABLES

__all__ = ["TABLES"]
