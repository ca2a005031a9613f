"""The bounded reader: a hostile or damaged GGUF is refused within seconds and little memory.

``MELENS_FUZZ=5000`` (with ``--timeout 0``) runs the fuzz test with that many files.
"""

from __future__ import annotations

import os
import struct

import numpy as np
import planted_gguf as planted
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import adds_less_than

from melens.errors import MelensError, WeightsError
from melens.models.gguf_header import read_gguf_header

EXAMPLES = int(os.environ.get("MELENS_FUZZ", "100"))
GROWS = 600
"""Megabytes that are far too many; a hang ends by the time limit of the suite."""


def string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def field(key, kind, value):
    return string(key) + struct.pack("<I", kind) + value


def header(fields=(), tensors=(), *, counts=None, version=3):
    n_tensors, n_fields = counts or (len(tensors), len(fields))
    return b"".join([b"GGUF", struct.pack("<IQQ", version, n_tensors, n_fields), *fields, *tensors])


def info(name="w", dims=(32,), kind=0, offset=0):
    raw = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return string(name) + raw


ARRAY = struct.pack("<IQ", 0, 2**40)
DATA = bytes(4096)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "not a GGUF file"),
        (b"GG", "not a GGUF file"),
        (b"GGUF", "ends inside"),
        (header(counts=(2**62, 0)), "announces 4611686018427387904 tensors"),
        (header(counts=(0, 2**62)), "announces 4611686018427387904 fields"),
        (header([field("a", 9, ARRAY)]), "announces 1099511627776 values of 'a'"),
        (header([field("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2**40))]), "announces"),
        (header([field("a", 9, struct.pack("<IQ", 9, 1) + ARRAY)]), "array of the unknown type 9"),
        (header([field("a", 8, struct.pack("<Q", 2**63))]), "announces 9223372036854775808 bytes"),
        (header([struct.pack("<Q", 2**50)]) + DATA, "bytes of a field's name"),
        (header([field("a", 13, DATA)]), "unknown type 13"),
        (header([field("a", 4, b"\1\0\0\0")] * 2), "gives 'a' twice"),
        (header([field(b"\xff\xfe", 4, b"\1\0\0\0")]), "is not UTF-8"),
        (header([field("general.alignment", 4, bytes(4))], [info()]) + DATA, "alignment of 0"),
        (header([], [info(dims=(2**40, 2**40))]) + DATA, "is truncated"),
        (header([], [info(dims=(0,))]) + DATA, r"shape \[0\]"),
        (header([], [info(dims=(1,) * 9)]) + DATA, "9 dimensions"),
        (header([], [info(dims=())]) + DATA, "0 dimensions"),
        (header([], [info(kind=99)]) + DATA, "unknown format 99"),
        (header([], [info(kind=4)]) + DATA, "unknown format 4"),
        (header([], [info(dims=(33,), kind=2)]) + DATA, r"shape \[33\], which Q4_0 cannot"),
        (header([], [info(offset=2**62)]) + DATA, "is truncated"),
        (header([], [info(offset=7)]) + DATA, "multiple of 32"),
        (header([], [info(), info(offset=128)]) + DATA, "lists 'w' twice"),
        (header([], [info(), info("v", offset=32)]) + DATA, "'w' and 'v' lie on the same bytes"),
        (header(version=1) + DATA, "version 1"),
        (header(version=3 << 24) + DATA, "big-endian"),
        (header(version=4) + DATA, "version is 4"),
        (header(version=77) + DATA, "version is 77"),
        (header([field("split.count", 2, struct.pack("<H", 60000))]), "does not say which"),
    ],
)
def test_a_count_or_place_that_does_not_fit_is_refused_before_it_is_used(raw, said, tmp_path):
    from melens.models.loading import load_plain
    from melens.scanning import scan

    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    for read in (read_gguf_header, load_plain, scan):
        with adds_less_than(GROWS), pytest.raises(WeightsError, match=said) as found:
            read(path)
        assert found.value.exit_code == 2


def test_a_file_of_zeros_behind_a_header_is_read_no_further_than_its_header(tmp_path):
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        file.write(header([], [info()]))
        file.truncate(1 << 36)
    assert set(read_gguf_header(path).tensors) == {"w"}
    with path.open("r+b") as file:  # a vocabulary as long as the file
        file.write(header([field("tokenizer.x", 9, struct.pack("<IQ", 0, 1 << 35))]))
    with pytest.raises(WeightsError, match="announces 34359738368 values"):
        read_gguf_header(path)


def test_fields_of_every_type_are_read(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    wanted = {"general.architecture": "llama"}
    for name, value in (
        ("uint8", 3),
        ("int8", -3),
        ("uint16", 3),
        ("int16", -3),
        ("uint32", 3),
        ("int32", -3),
        ("uint64", 2**60),
        ("int64", -(2**60)),
        ("float32", 0.5),
        ("float64", 0.1),
        ("bool", True),
        ("string", "é"),
    ):
        getattr(writer, f"add_{name}")(f"x.{name}", value)
        wanted[f"x.{name}"] = value
    for name, value in (("ints", [1, 2]), ("floats", [0.5, 2.0]), ("strings", ["a", "b"])):
        writer.add_array(f"x.{name}", value)
        wanted[f"x.{name}"] = value
    writer.add_array("tokenizer.words", ["a", "b"])
    writer.add_tensor("w", np.zeros((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf_header(tmp_path / "m.gguf")
    assert found.fields == wanted
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    (theirs,), (ours,) = reader.tensors, found.tensors.values()
    assert (ours.start, ours.n_bytes) == (theirs.data_offset, theirs.n_bytes)
    assert ours.shape == (2, 32)


EXTREME = st.sampled_from(
    [0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 10**9, 2**40, 2**63, 2**64 - 1]
)
CHANGE = st.one_of(
    st.tuples(st.just("bytes"), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("u32"), st.floats(0, 1), EXTREME),
    st.tuples(st.just("u64"), st.floats(0, 1), EXTREME),
    st.tuples(st.just("cut"), st.floats(0, 1), st.integers(1, 64)),
    st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=64)),
    st.tuples(st.just("end"), st.floats(0, 1), st.just(0)),
)


def changed(raw, n_header, changes):
    """The file with changes made in its header, and ends cut off anywhere."""
    made = bytearray(raw)
    for kind, where, what in changes:
        at = int(where * min(n_header, len(made)))
        if kind == "cut":
            del made[at : at + what]
        elif kind == "end":
            del made[int(where * len(made)) :]
        elif kind == "insert":
            made[at:at] = what
        else:
            put = what if kind == "bytes" else struct.pack("<Q", what)[: 4 if kind == "u32" else 8]
            made[at : at + len(put)] = put
    return bytes(made)


class Whole:
    """A sound file's bytes and header, and where changed ones go; hypothesis prints no more."""

    def __init__(self, path):
        self.raw, self.header = path.read_bytes(), read_gguf_header(path)
        self.path = path.with_name("changed.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, make_tiny):
    folder = tmp_path_factory.mktemp("fuzz")
    hf = make_tiny("llama")
    tensors = planted.tensors_of(hf, "llama")
    path = planted.write(folder / "m.gguf", "llama", planted.fields_of(hf.config, "llama"), tensors)
    return Whole(path)


def refused(read, path):
    """Whether the reader refuses the file, and rightly so; any other error passes through."""
    try:
        read(path)
    except MelensError as error:
        return error.exit_code == 2 and 0 < len(str(error)) < 2000
    return None


@settings(max_examples=EXAMPLES, deadline=None, database=None)
@given(changes=st.lists(CHANGE, min_size=1, max_size=3))
def test_whatever_is_changed_in_a_header_ends_in_a_model_or_one_error(whole, changes):
    """Load, tokenizer and scan of a changed file; they share the reader of its header."""
    from melens.models.gguf import read_gguf_tokenizer, read_gguf_whole
    from melens.scanning import scan

    path, known = whole.path, whole.header
    path.write_bytes(changed(whole.raw, known.n_bytes, changes))
    with adds_less_than(GROWS):
        said = refused(read_gguf_header, path)
        assert said in (None, True)
        found = read_gguf_header(path) if said is None else known
        if (found.fields, set(found.tensors)) != (known.fields, set(known.tensors)):
            assert all(refused(r, path) in (None, True) for r in (read_gguf_whole, scan))
        if said is None and len(changes) == 1:  # a change that no field shows is in the vocabulary
            assert refused(read_gguf_tokenizer, path) in (None, True)
