"""Every table there is: the modules are imported for what they register."""

from melens.cli import (  # noqa: F401
    cause_tables,
    check_table,
    diff_command,
    edit_table,
    eval_table,
    long_context_table,
    patch_command,
    reach_table,
    scan_table,
    super_weights_table,
    tune_table,
)
from melens.cli.tables import TABLES

__all__ = ["TABLES"]
