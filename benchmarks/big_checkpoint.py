"""A model larger than the memory: 8 billion parameters, scanned and located by streaming.

    python benchmarks/big_checkpoint.py                 # 16 GB of disk for some minutes
    python benchmarks/big_checkpoint.py --scale 0.05    # a twentieth of the parameters

Writes a Llama-shaped model in bfloat16, tensor by tensor, into shards of at most 2 GB. Its weights
are noise, but for an ME Layer and an erase layer that are planted: one FFN neuron each, opened by
the BOS token's mark. Then `melens scan` and `melens locate --stream` run as processes of their own;
their peak resident memory is the kernel's count (VmHWM), and both have to find what was planted.
The noise is cut from one pool of random numbers, since the numbers do not matter and 8 billion take
their time. The folder is removed at the end, whatever happens, unless --keep.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

BOS, WORDS = 1, 4000
MARK, ORDINARY, QUIET = 6.0, -1.5, 0.25
"""The marker coordinate of BOS and of all other tokens, and how quiet the massive coordinate is."""
GATE, UP = 20.0, 2.0
"""How strongly the planted neurons read: the marker, or the massive coordinate to erase it."""
WRITE = 0.05
"""Size of the random writes: the residual stays near 1, and the planted amount as planned."""
AMOUNT, LEFT = 6000.0, 0.02
"""The massive activation, and the share of it that the erase layer leaves."""
SHARD = 2_000_000_000
POOL = 1 << 25
ROWS = 1 << 14
"""Of the embedding, at a time."""
LIMITS = {"scan": 2.0, "locate --stream": 4.0}
"""GB of resident memory."""


@dataclass(frozen=True)
class Shape:
    """A Llama, and what is planted in it."""

    d: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    me_layer: int
    erase_layer: int
    marker: int = 21
    dim: int = 77
    neurons: tuple[int, int] = (33, 55)

    @property
    def kv(self) -> int:
        """Width of keys and of values."""
        return self.d // self.heads * self.kv_heads

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order of the files."""
        d, inner = self.d, self.inner
        yield "model.embed_tokens.weight", (self.vocab, d)
        for layer in range(self.layers):
            stem = f"model.layers.{layer}"
            yield f"{stem}.input_layernorm.weight", (d,)
            yield f"{stem}.self_attn.q_proj.weight", (d, d)
            yield f"{stem}.self_attn.k_proj.weight", (self.kv, d)
            yield f"{stem}.self_attn.v_proj.weight", (self.kv, d)
            yield f"{stem}.self_attn.o_proj.weight", (d, d)
            yield f"{stem}.post_attention_layernorm.weight", (d,)
            yield f"{stem}.mlp.gate_proj.weight", (inner, d)
            yield f"{stem}.mlp.up_proj.weight", (inner, d)
            yield f"{stem}.mlp.down_proj.weight", (d, inner)
        yield "model.norm.weight", (d,)
        yield "lm_head.weight", (self.vocab, d)

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(math.prod(shape) for _, shape in self.tensors())


SHAPES = {
    1.0: Shape(4096, 32, 14336, 32, 8, 128256, me_layer=5, erase_layer=28),
    0.05: Shape(1024, 24, 3584, 8, 2, 32000, me_layer=5, erase_layer=20),
    0.0001: Shape(128, 8, 448, 4, 2, 4100, me_layer=2, erase_layer=6),
}


@dataclass
class Noise:
    """Standard normal numbers from a pool, at random places in it."""

    rng: torch.Generator
    pool: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.pool = torch.randn(POOL, generator=self.rng).to(torch.bfloat16)

    def tensor(self, shape: tuple[int, ...], size: float) -> torch.Tensor:
        """Noise of that standard deviation, in bfloat16."""
        made = torch.empty(math.prod(shape), dtype=torch.bfloat16)
        at = 0
        while at < len(made):
            start = int(torch.randint(POOL // 2, (), generator=self.rng))
            part = self.pool[start : start + len(made) - at]
            torch.mul(part, size, out=made[at : at + len(part)])
            at += len(part)
        return made.view(shape)


def make_parts(
    name: str, size: tuple[int, ...], shape: Shape, noise: Noise
) -> Iterator[torch.Tensor]:
    """One tensor in pieces, with what is planted in it."""
    if size[0] != shape.vocab:
        yield make_tensor(name, size, shape, noise)
        return
    for row in range(0, shape.vocab, ROWS):
        count = min(ROWS, shape.vocab - row)
        made = noise.tensor((count, shape.d), 1.0 if "embed" in name else shape.d**-0.5)
        if "embed" in name:
            made[:, shape.dim] *= QUIET
            made[:, shape.marker] = ORDINARY
            if row <= BOS < row + count:
                made[BOS - row, shape.marker] = MARK
        yield made


def make_tensor(name: str, size: tuple[int, ...], shape: Shape, noise: Noise) -> torch.Tensor:
    """One of a block's tensors, or the last norm."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    writes = name.endswith(("o_proj.weight", "down_proj.weight"))
    made = noise.tensor(size, (WRITE if writes else 1.0) / size[1] ** 0.5)
    if writes:
        made[shape.marker] = 0.0
        made[shape.dim] *= QUIET
    for at, layer in enumerate((shape.me_layer, shape.erase_layer)):
        if name.startswith(f"model.layers.{layer}.mlp."):
            _plant(name, made, shape, erases=bool(at))
    return made


def _plant(name: str, made: torch.Tensor, shape: Shape, *, erases: bool) -> None:
    """One neuron that reads the mark (or the massive coordinate) and writes the coordinate."""
    neuron = shape.neurons[int(erases)]
    if not name.endswith("down_proj.weight"):
        made[neuron] = 0.0
        read = shape.dim if erases else shape.marker
        made[neuron, read] = GATE if "gate" in name else UP
        return
    seen = math.sqrt(shape.d) if erases else MARK / math.sqrt(1 + MARK**2 / shape.d)
    amount = -(1 - LEFT) * AMOUNT if erases else AMOUNT
    made[shape.dim] = 0.0
    made[:, neuron] = 0.0
    made[shape.dim, neuron] = amount / (GATE * seen * UP * seen)


def write_checkpoint(folder: Path, shape: Shape, *, seed: int = 0, limit: int = SHARD) -> None:
    """The whole folder: shards, index, config, and a small tokenizer of words w3, w4, ..."""
    noise = Noise(torch.Generator().manual_seed(seed))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    room = limit
    for name, size in shape.tensors():
        need = 2 * math.prod(size)
        if need > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append((name, size))
        room -= need
    placed = {}
    for i, members in enumerate(shards, start=1):
        file = folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(file, members, shape, noise)
        placed |= {name: file.name for name, _ in members}
    index = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_config(folder, shape)


def _write_shard(
    file: Path, members: list[tuple[str, tuple[int, ...]]], shape: Shape, noise: Noise
) -> None:
    header, at = {}, 0
    for name, size in members:
        end = at + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, size in members:
            for made in make_parts(name, size, shape, noise):
                out.write(made.view(torch.uint8).numpy().data)


def _write_config(folder: Path, shape: Shape) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.d,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        bos_token_id=BOS,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    special = {0: "<pad>", BOS: "<s>", 2: "</s>"}
    words = {special.get(i, f"w{i}"): i for i in range(WORDS)}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="w3"
    ).save_pretrained(folder)


def words(count: int, *, seed: int = 0) -> str:
    """A text of that tokenizer."""
    rng = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(3, WORDS, (count,), generator=rng).tolist())


RUNNER = """
import pathlib, sys
from melens.cli import main
try:
    main(sys.argv[2:])
finally:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    peak = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
    pathlib.Path(sys.argv[1]).write_text(peak)
"""


def run(arguments: list[str]) -> tuple[dict, float, float]:
    """A melens command in a process of its own: its JSON, seconds, and peak memory in GB."""
    with tempfile.NamedTemporaryFile() as peak:
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", RUNNER, peak.name, *arguments], stdout=subprocess.PIPE
        )
        taken = time.monotonic() - begun
        if done.returncode:
            raise SystemExit(f"melens {' '.join(arguments[:2])} ended with {done.returncode}")
        return json.loads(done.stdout), taken, int(Path(peak.name).read_text()) * 1024 / 1e9


def report(name: str, seconds: float, memory: float, checks: dict[str, bool]) -> bool:
    """Print one run; whether all of it holds."""
    checks = {**checks, f"under {LIMITS[name]:g} GB": memory < LIMITS[name]}
    said = ", ".join(f"{what}: {'yes' if holds else 'NO'}" for what, holds in checks.items())
    print(
        f"melens {name}: {seconds:.0f} s, peak resident memory {memory:.2f} GB; {said}", flush=True
    )
    return all(checks.values())


def scanned(folder: Path, shape: Shape) -> bool:
    """The scan, and whether it predicts what is planted."""
    found, seconds, memory = run(["scan", str(folder), "--json", "--offline", "-q"])
    holds = report(
        "scan",
        seconds,
        memory,
        {
            f"ME Layer {shape.me_layer} predicted": found["me_layer"] == shape.me_layer,
            f"dimension {shape.dim} predicted": found["dims"][:1] == [shape.dim],
        },
    )
    erased = found["erase_layer"]
    print(
        f"  erase layer predicted: {erased} (planted: {shape.erase_layer}; its neuron writes all "
        "that it can, so that its ceiling is far below the maker's)"
    )
    return holds


def located(folder: Path, shape: Shape) -> bool:
    """The streamed locate, and whether it finds what is planted."""
    text = folder / "words.txt"
    text.write_text(words(200))
    found, seconds, memory = run(
        ["locate", str(folder), "--stream", "--bos", "--text", str(text), "--json", "--offline"]
    )
    first = (found["massive"] or [{}])[0]
    return report(
        "locate --stream",
        seconds,
        memory,
        {
            f"ME Layer {shape.me_layer} found": found["me_layer"] == shape.me_layer,
            f"erase layer {shape.erase_layer} found": found["erase_layer"] == shape.erase_layer,
            f"dimension {shape.dim} of BOS found": (first.get("dim"), first.get("token_id"))
            == (shape.dim, BOS),
        },
    )


def main() -> int:
    """Write, measure, remove."""
    parser = argparse.ArgumentParser(description="See the docstring.")
    parser.add_argument("--scale", type=float, default=1.0, choices=sorted(SHAPES))
    parser.add_argument(
        "--folder", type=Path, help="where to write (default: the temporary folder)"
    )
    parser.add_argument("--only", choices=["scan", "locate"], help="one of the two runs alone")
    parser.add_argument("--keep", action="store_true", help="do not remove the checkpoint")
    options = parser.parse_args()
    shape = SHAPES[options.scale]
    size = 2 * shape.parameters / 1e9
    parent = options.folder or Path(tempfile.gettempdir())
    if shutil.disk_usage(parent).free / 1e9 < size + 1:
        raise SystemExit(f"{parent} has less than {size + 1:.0f} GB free")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="melens-big-", dir=parent))
    try:
        begun = time.monotonic()
        write_checkpoint(folder, shape)
        shards = len(list(folder.glob("*.safetensors")))
        made = f"{shape.parameters / 1e9:.3f} billion parameters, {size:.2f} GB"
        taken = time.monotonic() - begun
        print(f"{made} in {shards} shard(s), written in {taken:.0f} s", flush=True)
        runs = {"scan": scanned, "locate": located}
        chosen = [options.only] if options.only else list(runs)
        holds = [runs[name](folder, shape) for name in chosen]
        return 0 if all(holds) else 1
    finally:
        if not options.keep:
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
