"""What docs/sidecar.md shows of other libraries, run in them as it stands, on a planted model.

Each library has an environment of its own over this one; run with make test-interop.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.interop
ROOT = Path(__file__).parents[2]
NAMED = 'name, layer = "HuggingFaceTB/SmolLM2-135M", 15'
"""The one line of the page that is not of the tiny model."""
TEXTS, TOKENS = 12, 40
"""Rows of the file, and tokens of each, its massive BOS included."""

REPEATED = """
from collections import Counter
seen = [x for x in rows(texts)]
plain, marks = [], []
for text in texts:
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        x = model.model(ids, output_hidden_states=True).hidden_states[layer + 1][0]
    plain.append(x)
    marks.append(x[:, massive.data["dim"]].abs() > 100 * x.abs().median())
assert sum(int(m.sum()) for m in marks) == len(texts) == 12, "one massive token a text"
for x, kept, mark in zip(plain, seen, marks):
    torch.testing.assert_close(kept, x[~mark])
ordinary = torch.cat(seen)
largest = float(ordinary.abs().max())
"""
"""The rows, by plain arithmetic: all but the one token whose coordinate is far off."""

CHECKS = {
    "SAELens": """
class Watched:
    def __init__(self, batches):
        self.batches, self.largest, self.shapes = batches, 0.0, set()
    def __next__(self):
        x = next(self.batches)
        self.largest = max(self.largest, float(x.abs().max()))
        self.shapes.add(tuple(x.shape))
        return x

def left_out(batches):
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_model, d_sae=width * d_model, k=16))
    watched = Watched(batches)
    config = SAETrainerConfig(
        total_training_samples=6400, train_batch_size_samples=64, lr=3e-3, lr_end=3e-4
    )
    made = SAETrainer(config, sae, watched).fit()
    assert watched.shapes == {(64, d_model)}
    rest = ordinary - made(ordinary)
    left = rest.square().sum() / (ordinary - ordinary.mean(0)).square().sum()
    return float(left), watched.largest

assert trained.cfg.d_in == d_model and trained(ordinary).shape == ordinary.shape
clean = left_out(mixing_buffer(256, 64, rows(cycle(texts))))
every = left_out(mixing_buffer(256, 64, cycle(plain)))
assert clean[1] <= largest < every[1], (clean, largest, every)
assert clean[0] < every[0], (clean, every)
""",
    "dictionary_learning": """
raw = ActivationBuffer(
    cycle(texts), traced, traced.model.layers[layer], d_submodule=d_model, **sizes
)
given = [next(raw) for _ in range(8)]
assert {tuple(x.shape) for x in given} == {(64, d_model)}
assert max(float(x.abs().max()) for x in given) > 100 * largest
kept = [massive.clean(x, None, layer, "drop") for x in given]
assert max(float(x.abs().max()) for x in kept) <= largest * (1 + 1e-5)
count = sum(int((x.abs().amax(-1) > 100 * largest).sum()) for x in given)
assert 0 < count == sum(map(len, given)) - sum(map(len, kept))
assert float(next(batches).abs().max()) <= largest * (1 + 1e-5)
saved = torch.load("trained/trainer_0/ae.pt", weights_only=True)
assert saved["encoder.weight"].shape == (width * d_model, d_model)
assert all(bool(x.isfinite().all()) for x in saved.values())
""",
    "sparsify": """
assert len(losses) == 8 * len(texts) and losses[-1] < 0.9 * losses[0]
with torch.no_grad():
    every, few = torch.cat(plain), coder(ordinary)
    assert few.sae_out.shape == ordinary.shape
    rest = (ordinary - few.sae_out).square().sum() / (ordinary - ordinary.mean(0)).square().sum()
    torch.testing.assert_close(few.fvu, rest)
    # of the variance of all rows an ordinary one has next to nothing, as the page says
    part, whole = ((x - x.mean(0)).square().sum() for x in (ordinary, every))
    assert part < 0.01 * whole
""",
    "nnsight": """
assert torch.equal(found[0], marks[0]) and found.shape == (1, len(marks[0]))
row = massive.layers[layer]
expected = plain[0].clone()
expected[0, row["dims"]] = expected[0, row["dims"]].clamp(-row["clip"], row["clip"])
assert not torch.equal(expected, plain[0])
torch.testing.assert_close(clipped[0], expected)
handle = model.model.layers[layer].register_forward_hook(lambda *_: clipped)
with torch.no_grad():
    by_hook = model(tokenizer(texts[0], return_tensors="pt").input_ids).logits
handle.remove()
torch.testing.assert_close(logits, by_hook)
""",
}


def block_of(library):
    """The Python that the page shows under this heading."""
    page = (ROOT / "docs" / "sidecar.md").read_text("utf-8")
    section = page.split(f"# {library}\n")[1]
    return re.search(r"^```py\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A planted model's folder, its texts, and what the command writes of them."""
    import torch
    from planted import plant

    from melens.cli.app import _run

    at = tmp_path_factory.mktemp("interop")
    plant("llama", "single", 0).model.save_pretrained(at / "model")
    tokenizer.save_pretrained(at / "model")
    words = torch.randint(3, 64, (TEXTS, TOKENS - 1), generator=torch.Generator().manual_seed(3))
    lines = ["<s> " + " ".join(f"w{i}" for i in row) for row in words.tolist()]
    (at / "texts.txt").write_text("\n".join(lines), "utf-8")
    (at / "others.txt").write_text(
        "\n".join(" ".join(x.split()[:0:-1]) for x in lines[:4]), "utf-8"
    )
    told = ["--text", str(at / "others.txt"), "--lines", "--bos", "--length", "24"]
    told += ["-o", str(at / "massive.json"), "--reader"]
    assert _run(["sidecar", str(at / "model"), *told], debug=False) == 0
    return at


@pytest.mark.parametrize("library", CHECKS)
def test_the_block_of_the_page_runs_in_the_library(library, place, tmp_path):
    python = ROOT / ".interop" / library.lower() / "bin" / "python"
    if not python.exists():
        pytest.skip(f"needs {library} in {python.parents[1]}; un-skip: make test-interop")
    shown = block_of("In other libraries")
    assert shown.count(NAMED) == 1
    ours = shown.replace(NAMED, f'name, layer = "{place / "model"}", 4')
    code = "\n".join([ours, block_of(library), REPEATED, CHECKS[library]])
    for name in ("massive.json", "massive_mask.py", "texts.txt"):
        (tmp_path / name).write_bytes((place / name).read_bytes())
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [python, "-c", code],
        cwd=tmp_path,
        env=kept | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
