"""What a scan of the weights costs: its bytes a second against plain reading, and one `locate`.

    python benchmarks/foresee.py                     # SmolLM2-135M, a minute
    python benchmarks/foresee.py --model ./a-folder --no-locate

Reading is sequential, of the same files, into one buffer, from the page cache: it is warmed first,
and the two alternate. A scan reads the FFN and its norms only, so the ratio is that of time a byte;
the ratio to reading the files whole is printed beside it. Nothing is run in it (`--no-reach`); the
default, which tries first tokens, is timed beside it. Memory is a fresh process's peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

from common import seconds, status_megabytes

BUFFER = 1 << 21


def read_whole(model: str) -> int:
    """Read a model's files from end to end; gives the bytes."""
    from melens.models.opening import open_checkpoint

    files = open_checkpoint(model)
    buffer = memoryview(bytearray(BUFFER))
    total = 0
    for blob in files.blobs:
        for start in range(0, blob.size, BUFFER):
            length = min(BUFFER, blob.size - start)
            blob.read_into(start, buffer[:length], "a tensor")
            total += length
    files.close()
    return total


def scanned_bytes(model: str) -> int:
    """What a scan reads of them."""
    from melens.models.opening import open_checkpoint
    from melens.scanning import predict as weights

    files = open_checkpoint(model)
    plan = weights.plan_of(files)
    for layer in plan.layers:
        weights.scan_layer(files, plan, layer, "cpu")
    files.close()
    return files.bytes_read


def compare(model: str, rounds: int) -> None:
    """Alternate scan and reading; print the medians and their ratio."""
    from melens.scanning import scan

    total, part = read_whole(model), scanned_bytes(model)
    times: dict[str, list[float]] = {"read": [], "scan": [], "tried": []}
    for _ in range(rounds):
        times["read"].append(seconds(lambda: read_whole(model)))
        times["scan"].append(seconds(lambda: scan(model, device="cpu", reach=False)))
        times["tried"].append(seconds(lambda: scan(model, device="cpu")))
    ratios = [s / part / (r / total) for s, r in zip(times["scan"], times["read"], strict=True)]
    whole = [s / r for s, r in zip(times["scan"], times["read"], strict=True)]
    read, scanned = (statistics.median(times[name]) for name in ("read", "scan"))
    print(f"files {total / 1e6:.0f} MB, of which a scan reads {part / 1e6:.0f} MB")
    print(f"plain reading: {total / 1e9 / read:.2f} GB/s ({read:.3f} s)")
    print(f"scan:          {part / 1e9 / scanned:.2f} GB/s ({scanned:.3f} s)")
    print(f"with first tokens tried (the default): {statistics.median(times['tried']):.3f} s")
    print(
        f"time a byte, scan / reading: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f} over {rounds} rounds); "
        f"scan / reading the files whole: {statistics.median(whole):.2f}"
    )


def against_locate(model: str, scan_seconds: float) -> None:
    """One locate on a loaded model, 8 x 128 tokens, and what loading took."""
    import melens

    loaded = []
    loading = seconds(lambda: loaded.append(melens.load(model, device="cpu")))
    texts = melens.prompts(n=8, length=128)
    melens.locate(loaded[0], melens.prompts(n=1, length=16))
    locating = seconds(lambda: melens.locate(loaded[0], texts))
    print(
        f"locate, 8 x 128 tokens: {locating:.2f} s, after {loading:.2f} s of loading; the scan "
        f"takes {scan_seconds / locating:.2f} of the one, "
        f"{scan_seconds / (locating + loading):.2f} of both"
    )


def alone(model: str) -> None:
    """Memory of a fresh process: with everything imported, and at the scan's peak."""
    from melens.scanning import scan

    before = status_megabytes("VmHWM")
    scan(model, device="cpu", reach=False)
    print(json.dumps([before, status_megabytes("VmHWM")]))


def main() -> None:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description="What a scan of the weights costs.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of locate; a scan takes one")
    parser.add_argument("--no-locate", action="store_true")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    if arguments.alone:
        alone(arguments.model)
        return
    compare(arguments.model, arguments.rounds)
    done = subprocess.run(
        [sys.executable, __file__, "--alone", "--model", arguments.model],
        capture_output=True,
        text=True,
        check=True,
    )
    before, peak = json.loads(done.stdout.splitlines()[-1])
    print(f"memory of a fresh process: {before:.0f} MB imported, {peak:.0f} MB at the scan's peak")
    if not arguments.no_locate:
        from melens.scanning import scan

        against_locate(
            arguments.model, seconds(lambda: scan(arguments.model, device="cpu", reach=False))
        )


if __name__ == "__main__":
    main()
