"""What measuring a number format costs: its passes and its time, over one plain forward pass.

    python benchmarks/quantise.py                       # SmolLM2-135M, 8 x 128 tokens, five minutes
    python benchmarks/quantise.py --n 2 --length 64 --schemes w8a8-tensor

A scheme's time holds its packing, its own pass of the model as it is, and all its trials; what is
done once a call (locating, massive tokens, super weights) is timed apart. The plain pass is
transformers' own model on the same batches, in turns with the schemes. Bytes are those that a
scheme's weights are kept in, over the weights of the blocks' linear layers.
"""

from __future__ import annotations

import argparse
import statistics
import time

from melens import locate, prompts
from melens.inputs import prepare
from melens.models import load
from melens.quantising import DEFAULT, SCHEMES, Protect
from melens.quantising.bench import SchemeBench
from melens.quantising.layers import plain_model
from melens.quantising.run import SchemeLoop
from melens.quantising.running import QuantisedModel, unquantised
from melens.settings import Run


def main() -> None:
    """Print a line a scheme."""
    given = argparse.ArgumentParser()
    given.add_argument("--model", default="smollm2-135m")
    given.add_argument("--n", type=int, default=8)
    given.add_argument("--length", type=int, default=128)
    given.add_argument("--schemes", default=",".join(DEFAULT))
    args = given.parse_args()
    model = load(args.model)
    inputs = prepare(model, prompts(n=args.n, length=args.length, bos=True))
    located = locate(inputs)
    schemes = [SCHEMES[name] for name in args.schemes.split(",")]
    start = time.perf_counter()
    bench = SchemeBench.of(inputs, schemes, located, Protect(), 4)
    print(f"once a call: {time.perf_counter() - start:.1f} s")
    loop, plain = SchemeLoop(bench, Run()), plain_model(model)
    weights = sum(one.stored.nbytes for one in plain.weights)
    for scheme in schemes:
        alone = statistics.median(timed(lambda: run_plain(bench)) for _ in range(3))
        took = timed(lambda scheme=scheme: loop.run(scheme))
        kept = sum(one.held for one in QuantisedModel.of(plain, scheme).packed.values())
        trials = len(bench.trials(scheme))
        print(
            f"{scheme.name}: {trials} trials, {took / alone:.1f} x one plain pass ({alone:.2f} s); "
            f"{kept / weights:.2f} x the weights' bytes"
        )


def run_plain(bench: SchemeBench) -> None:
    """One forward pass over the scored texts."""
    for batch in bench.texts.batches:
        unquantised(bench.plain, batch)


def timed(call: object) -> float:
    """Seconds."""
    start = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
