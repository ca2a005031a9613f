"""The sidecar tells massive tokens as melens does, with nothing but torch."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch


@pytest.fixture(scope="module")
def newline():
    """A model in which newlines become massive where they stand, and a sidecar of other texts."""
    from planted import newline_batch, plant_newline

    from melens import locate
    from melens.exporting.sidecars import sidecar
    from melens.models import load

    planted = plant_newline()
    model = load(planted.model)
    located = locate(model, newline_batch(seed=1))
    return model, located, sidecar(model, located, newline_batch(seed=1))


@pytest.fixture(scope="module")
def reader(newline, tmp_path_factory):
    from melens.exporting.sidecars import write_sidecar

    path = tmp_path_factory.mktemp("sidecar") / "massive.json"
    files = write_sidecar(newline[2], path, reader=True)
    assert [file.name for file in files] == ["massive.json", "massive_mask.py"]
    return path


def residuals(model, ids):
    """Every block's output, by plain hooks."""
    kept = {}
    inner = model.original_model
    handles = [
        block.register_forward_hook(
            lambda module, args, out, layer=layer: kept.__setitem__(
                layer, out[0] if isinstance(out, tuple) else out
            )
        )
        for layer, block in enumerate(inner.transformer.h)
    ]
    with torch.no_grad():
        inner(ids)
    for handle in handles:
        handle.remove()
    return kept


def test_the_mask_equals_melens_on_held_out_texts_at_every_layer_it_tells(newline, reader):
    from planted import newline_batch

    from melens.batches import Batch
    from melens.exporting.massive_mask import MassiveMask
    from melens.interventions.massive import massive_tokens

    model, located, made = newline
    massive, counts = MassiveMask(reader), 0
    told = [row.layer for row in made.layers if row.coordinate is not None]
    assert told[0] == located.me_layer
    assert len(told) > 1
    for seed in range(2, 8):
        ids = newline_batch(seed=seed)
        marks = next(iter(massive_tokens(model, located, [Batch.of(ids)])))[0]
        kept = residuals(model, ids)
        for layer in told:
            assert torch.equal(massive.mask(kept[layer], ids, layer), marks), (seed, layer)
        counts += int(marks.sum())
    assert counts > 10


def test_thresholds_lie_between_what_was_seen(newline):
    """By hand: the geometric mean of the two sides, from plain hooks."""
    from planted import newline_batch

    from melens.batches import Batch
    from melens.interventions.massive import massive_tokens

    model, located, made = newline
    ids = newline_batch(seed=1)
    marks = next(iter(massive_tokens(model, located, [Batch.of(ids)])))[0]
    for layer, x in residuals(model, ids).items():
        row = made.layers[layer + 1]
        assert row.layer == layer
        sizes = x[..., made.dim].abs()
        low, high = float(sizes[~marks].max()), float(sizes[marks].min())
        if layer > located.me_layer and row.coordinate is not None:
            assert row.coordinate == pytest.approx(math.sqrt(low * high), rel=1e-4)
            assert (row.told, low < row.coordinate < high) == (1.0, True)
        if row.dims:
            assert row.dims[0] == made.dim
            value = float(x[..., made.dim][marks].median())
            assert row.values[0] == pytest.approx(value, rel=1e-4)
        others = x[~marks][:, list(row.dims) or [made.dim]].abs().flatten()
        above = (others > row.clip).float().mean()
        assert row.clip in others
        assert above <= 0.001 < above + 1.5 / len(others)


def test_clean_drops_clips_and_projects(newline, reader):
    from planted import newline_batch

    from melens.exporting.massive_mask import MassiveMask

    model, located, made = newline
    massive, ids = MassiveMask(reader), newline_batch(seed=3)
    layer = located.me_layer
    x, row = residuals(model, ids)[layer], made.layers[layer + 1]
    marks, before = massive.mask(x, ids, layer), x.clone()
    assert torch.equal(massive.clean(x, ids, layer, "drop"), x[~marks])
    clipped = massive.clean(x, ids, layer)
    assert clipped[marks][:, list(row.dims)].abs().max() <= row.clip * (1 + 1e-6)
    projected = massive.clean(x, ids, layer, "project")
    assert not projected[marks][:, list(row.dims)].any()
    rest = [d for d in range(x.shape[-1]) if d not in row.dims]
    for made_of in (clipped, projected):
        assert torch.equal(made_of[~marks], x[~marks])
        assert torch.equal(made_of[..., rest], x[..., rest])
    assert torch.equal(x, before)
    with pytest.raises(ValueError, match="drop, clip or project"):
        massive.clean(x, ids, layer, "drown")
    with pytest.raises(ValueError, match="has layers 0 to"):
        massive.mask(x, ids, 99)


def test_before_the_me_layer_first_tokens_are_told_by_id(folder, tmp_path):
    from melens.exporting.massive_mask import MassiveMask

    data = {
        "schema": "melens/sidecar/1",
        "model": "m",
        "n_layers": 2,
        "d_model": 4,
        "me_layer": 1,
        "erase_layer": 3,
        "dim": 1,
        "layers": [
            {"layer": layer, "coordinate": None, "norm": 0.0, "dims": [], "clip": 1.0}
            for layer in range(4)
        ],
    }
    ids, x = torch.tensor([[1, 1, 2], [3, 1, 2]]), torch.zeros(2, 3, 4)
    for others, first in ((False, [[1, 0, 0], [0, 0, 0]]), (True, [[0, 0, 0], [1, 0, 0]])):
        path = tmp_path / "s.json"
        path.write_text(json.dumps(data | {"first_ids": [1], "other_first_tokens": others}))
        massive = MassiveMask(path)
        assert massive.mask(x, ids, 0).tolist() == torch.tensor(first).bool().tolist()
        with pytest.raises(ValueError, match="pass ids"):
            massive.mask(x, None, 0)
        with pytest.raises(ValueError, match="layer 2 cannot tell"):
            massive.mask(x, ids, 2)
        assert not massive.mask(x, ids, 3).any()  # erased
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a melens sidecar"):
        MassiveMask(path)


def test_a_rule_of_the_embedding_stands_at_layer_minus_one(newline):
    from dataclasses import replace

    from melens.exporting.sidecars import LayerSizes, _layers
    from melens.interventions.massive import MassiveRule

    rows = {"massive": [torch.ones(2, 3) * 5], "others": [torch.ones(4, 3)]}
    sizes = LayerSizes(0, **rows, seen=[torch.ones(2, 4)])
    rule = MassiveRule(-1, 0, 2.5, 0.5, None)
    assert (_layers([sizes], rule)[0].coordinate, _layers([sizes], rule)[0].norm) == (2.5, 0.5)
    assert _layers([sizes], replace(rule, layer=0))[0].coordinate is None


def test_of_many_texts_a_drawn_part_is_kept_and_thresholds_are_of_all(newline, monkeypatch):
    from planted import newline_batch

    from melens.exporting import sidecars

    model, located, made = newline
    kept = []
    sizes = sidecars._sizes
    monkeypatch.setattr(sidecars, "_sizes", lambda *a: kept.append(sizes(*a)) or kept[-1])
    monkeypatch.setattr(sidecars, "MOST_FLOATS", 0)
    monkeypatch.setattr(sidecars, "FEWEST_TOKENS", 30)
    ids = newline_batch(seed=1)
    few = sidecars.sidecar(model, located, ids)
    assert made.sampled_tokens is None
    assert few.sampled_tokens == sum(map(len, kept[0][0].others)) <= 30
    for layer in kept[0]:
        assert sum(x.numel() for x in layer.seen) == 2 * (made.tokens - made.massive_tokens)
    assert (few.tokens, few.massive_tokens) == (made.tokens, made.massive_tokens)
    for one, other in zip(few.layers, made.layers, strict=True):
        assert (one.coordinate, one.norm, one.told) == (other.coordinate, other.norm, other.told)
        assert (one.dims, one.values) == (other.dims, other.values)
        assert one.clip <= other.clip * 1.5
    # the drawn rows are those of as many tokens, the same ones at every layer
    drawn = set()
    for layer, x in residuals(model, ids).items():
        rows = torch.cat(kept[0][layer].others)
        far = torch.cdist(rows, x.flatten(0, 1), compute_mode="donot_use_mm_for_euclid_dist")
        assert far.amin(1).max() < 1e-3 * x.abs().median()
        drawn.add(tuple(far.argmin(1).tolist()))
    assert len(drawn) == 1
    assert len(set(*drawn)) == few.sampled_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A planted model's folder."""
    from planted import plant

    path = tmp_path_factory.mktemp("model") / "llama"
    plant("llama", "single", 0).model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_command_writes_both_and_the_reader_imports_torch_alone(folder, tmp_path, capsys):
    from melens.cli.app import _run

    out = tmp_path / "massive.json"
    texts = ["--bos", "--n-seq", "2", "--length", "16"]
    assert _run(["sidecar", str(folder), *texts, "-o", str(out), "--reader"], debug=False) == 0
    assert "massive tokens (2 of 32 here) are told by dimension 47" in capsys.readouterr().out
    made = json.loads(out.read_text("utf-8"))
    assert (made["me_layer"], made["dim"]) == (3, 47)
    assert {(one["layer"], one["dim"], one["why"]) for one in made["protected"]} == {
        (3, 47, "emerge")
    }
    code = (
        "import sys, torch\n"
        "from massive_mask import MassiveMask\n"
        f"massive = MassiveMask({str(out)!r})\n"
        f"x = torch.zeros(1, 2, {made['d_model']}); x[0, 1, 47] = 9000.0\n"
        "assert massive.mask(x, None, 3).tolist() == [[False, True]]\n"
        "assert not {'melens', 'transformer_lens', 'transformers'} & set(sys.modules)\n"
    )
    where = {"cwd": tmp_path, "env": {"PATH": "/usr/bin", "PYTHONPATH": str(tmp_path)}}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, **where)
    assert len((tmp_path / "massive_mask.py").read_text("utf-8").splitlines()) < 80


def test_what_is_of_another_model_is_refused(newline):
    from planted import newline_batch, plant

    from melens import locate, scan
    from melens.errors import InterventionError, MelensError
    from melens.exporting.sidecars import sidecar
    from melens.models import load

    model, located, _ = newline
    other = load(plant("gpt2", "single", 1).model)
    with pytest.raises(MelensError, match=r"was located on GPT2LMHeadModel .* has weights"):
        sidecar(model, locate(other, newline_batch(seed=1)), newline_batch(seed=1))
    scanned = scan("smollm2-135m", reach=False)
    with pytest.raises(InterventionError, match="30 layers of width 576"):
        sidecar(model, located, newline_batch(seed=1), scan=scanned)
    ids = torch.zeros(4, 4, dtype=torch.long) + 1
    with pytest.raises(MelensError):
        sidecar(model, located, ids[:, :1].repeat(1, 4))


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["-o", "massive.txt"], "is not a .json file"),
        (["-o", "x/massive.json", "--scan", "none.json"], "none.json"),
        (["-o", "x/massive.json", "--located", "none.json"], "none.json"),
    ],
)
def test_bad_input_is_refused_before_the_model(extra, said, folder, tmp_path, capsys, monkeypatch):
    from melens.cli.app import _run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("melens.models.load", None)
    assert _run(["sidecar", str(folder), *extra], debug=False) == 2
    assert said in capsys.readouterr().err


def test_it_round_trips_and_the_schema_is_the_present_one(newline):
    from pathlib import Path

    import jsonschema

    from melens.exporting.sidecars import sidecar_schema
    from melens.results.sidecar import Sidecar

    made = newline[2]
    assert Sidecar.from_json(made.to_json()) == made
    published = Path(__file__).parents[2] / "docs" / "sidecar.schema.json"
    assert json.loads(published.read_text("utf-8")) == sidecar_schema()
    jsonschema.Draft202012Validator(sidecar_schema()).validate(json.loads(made.to_json()))
