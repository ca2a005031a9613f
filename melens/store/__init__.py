"""The one way to keep work: files, folders and rows on disk, and hashes of what they are of."""

from melens.store.disk import (
    ABANDONED,
    PAGE,
    RESULT,
    ROWS,
    TEXT,
    decoded,
    hash_file,
    is_text,
    json_object,
    lines_of,
    open_regular,
    read_limited,
    read_stdin,
    read_text,
    remove_file,
    write_atomically,
)
from melens.store.folders import replacing, workspace, write_folder
from melens.store.identity import digest, hash_facts, hash_tensors, tensor_bytes
from melens.store.rows import Heading, KeptRows, Refusal, RowFormat

__all__ = [
    "ABANDONED",
    "PAGE",
    "RESULT",
    "ROWS",
    "TEXT",
    "Heading",
    "KeptRows",
    "Refusal",
    "RowFormat",
    "decoded",
    "digest",
    "hash_facts",
    "hash_file",
    "hash_tensors",
    "is_text",
    "json_object",
    "lines_of",
    "open_regular",
    "read_limited",
    "read_stdin",
    "read_text",
    "remove_file",
    "replacing",
    "tensor_bytes",
    "workspace",
    "write_atomically",
    "write_folder",
]
