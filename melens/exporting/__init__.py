"""An edit to take along: beside the weights, as a key/value prefix, or as a PEFT adapter."""

from melens.exporting.bake import bake
from melens.exporting.folder import export
from melens.exporting.prefix import for_call, for_generate, load_prefix
from melens.exporting.prefix_search import choose_prefix
from melens.exporting.reload import load, open_edit
from melens.exporting.sidecars import sidecar, write_sidecar
from melens.exporting.subject import read_edit

__all__ = [
    "bake",
    "choose_prefix",
    "export",
    "for_call",
    "for_generate",
    "load",
    "load_prefix",
    "open_edit",
    "read_edit",
    "sidecar",
    "write_sidecar",
]
