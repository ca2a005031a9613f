"""Whatever stands in a header, an index or a config: it is taken, or refused in one line, soon."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from memory import adds_less_than
from safetensors.torch import save_file

from melens.errors import MelensError
from melens.models.checkpoint import read_folder
from melens.models.files import check_folder
from melens.models.weight_files import INDEX, SINGLE, read_header, weight_files

EXAMPLES = int(os.environ.get("MELENS_FUZZ", "100"))
MEGABYTES = 600
"""Peak memory that one example may add; a hang ends by the time limit of the suite."""
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    print_blob=True,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NUMBERS = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([10**9, 10**12, 2**63, 10**40, -(10**9), True]),
    st.floats(),
    st.none(),
    st.text(max_size=5),
)
JSON = st.recursive(
    NUMBERS,
    lambda some: st.lists(some, max_size=4) | st.dictionaries(st.text(), some, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(make_tiny, tmp_path_factory):
    """A model of one layer in shards whose small files the examples overwrite."""
    made = tmp_path_factory.mktemp("fuzz")
    hf = make_tiny("llama")
    del hf.model.layers[1:]
    hf.config.num_hidden_layers = 1
    hf.save_pretrained(made, max_shard_size="20KB")
    check_folder(made, trust_remote_code=False)
    return made


def survives(read):
    """One reading: it ends, in bounded memory, and says at most one printable line, code 2 or 3."""
    said, code = "taken", 2
    with adds_less_than(MEGABYTES):
        try:
            read()
        except MelensError as error:
            said, code = str(error), error.exit_code
    assert code in (2, 3)
    assert 0 < len(said.strip()) < 2000
    assert "\n" not in said


def mutated(base, changes):
    """A copy of a JSON object with some entries replaced, added or, for "gone", removed."""
    made = json.loads(json.dumps(base))
    for name, value in changes.items():
        made.pop(name, None) if value == "gone" else made.update({name: value})
    return made


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "F4", "I8", "none"]), NUMBERS),
        "shape": st.one_of(st.lists(NUMBERS, max_size=4), JSON),
        "data_offsets": st.one_of(st.lists(NUMBERS, min_size=1, max_size=3), JSON),
    },
)
HEADER = st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "\u2028"]), ENTRY | JSON)


@FUZZ
@given(
    header=st.one_of(HEADER.map(lambda h: json.dumps(h).encode()), st.binary(max_size=60)),
    length=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    data=st.binary(max_size=64),
)
def test_any_header(header, length, data):
    raw = (len(header) if length is None else length).to_bytes(8, "little") + header + data

    def read(start, count):
        assert start + count <= len(raw)  # never asked for what is not there
        return raw[start : start + count]

    def check():
        for entry in read_header(read, len(raw), "model.safetensors").values():
            assert 8 <= entry.start <= entry.end <= len(raw)

    survives(check)


@FUZZ
@given(change=st.dictionaries(st.sampled_from(["x", "y"]), ENTRY | JSON), pad=st.integers(0, 9))
def test_a_header_that_is_taken_is_one_that_safetensors_takes(tmp_path, change, pad):
    """An independent reader agrees on what is whole."""
    import torch
    from safetensors import safe_open

    path = tmp_path / SINGLE
    save_file({"x": torch.ones(2, 2), "y": torch.ones(3)}, path)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    text = json.dumps({**json.loads(raw[8 : 8 + size]), **change}).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    raw = path.read_bytes()

    def check():
        found = read_header(lambda at, n: raw[at : at + n], len(raw), SINGLE)
        with safe_open(path, "pt") as opened:
            assert set(opened.keys()) == set(found)
            for name, entry in found.items():
                assert tuple(opened.get_slice(name).get_shape()) == entry.shape

    survives(check)


PLACES = st.one_of(st.sampled_from(["../x.safetensors", "/etc/passwd", "model.safetensors"]), JSON)


@FUZZ
@given(
    changes=st.dictionaries(st.sampled_from(["weight_map", "metadata"]), JSON | st.just("gone")),
    places=st.dictionaries(st.sampled_from(["lm_head.weight", "model.norm.weight", "z"]), PLACES),
    raw=st.none() | st.binary(max_size=40) | st.integers(1, 5000).map(lambda n: b"[" * n),
)
def test_any_index(folder, changes, places, raw):
    path = folder / INDEX
    whole = path.read_text("utf-8")
    index, config = json.loads(whole), json.loads((folder / "config.json").read_text("utf-8"))
    index["weight_map"].update(places)
    try:
        path.write_bytes(json.dumps(mutated(index, changes)).encode() if raw is None else raw)
        survives(lambda: read_folder(weight_files(folder, config), config))
    finally:
        path.write_text(whole, "utf-8")


KEYS = [
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "hidden_act",
    "dtype",
    "torch_dtype",
    "model_type",
    "architectures",
    "pad_token_id",
    "eos_token_id",
    "bos_token_id",
    "num_labels",
    "id2label",
    "layer_types",
    "attention_bias",
    "mlp_bias",
    "pretraining_tp",
    "tie_word_embeddings",
    "quantization_config",
    "transformers_weights",
    "auto_map",
    "attn_implementation",
    "partial_rotary_factor",
    "initializer_range",
    "attention_dropout",
    "use_cache",
    "generation_config",
    "text_config",
    "is_encoder_decoder",
    "sliding_window",
    "problem_type",
    "return_dict",
    "chunk_size_feed_forward",
]


@FUZZ
@example(changes={"rope_theta": {"\n": [10**9]}}, raw=None)
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), JSON | st.just("gone"), min_size=1, max_size=3),
    raw=st.none()
    | st.none()
    | st.none()
    | st.binary(max_size=40)
    | st.integers(1, 5000).map(lambda n: b'{"model_type":' * n),
)
def test_any_config(folder, changes, raw):
    path = folder / "config.json"
    whole = path.read_text("utf-8")
    try:
        path.write_bytes(
            json.dumps(mutated(json.loads(whole), changes)).encode() if raw is None else raw
        )
        survives(lambda: check_folder(folder, trust_remote_code=False))
    finally:
        path.write_text(whole, "utf-8")


def test_the_folder_is_whole_after_all(folder, tmp_path):
    check_folder(shutil.copytree(folder, tmp_path / "again"), trust_remote_code=False)
