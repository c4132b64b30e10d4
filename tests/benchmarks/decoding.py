"""Speed of decoding int8 codes that are on the device already, the square law in several ways.

    python tests/benchmarks/decoding.py [--rounds 10] [--device cpu] [--compiled]

A batch of 16 rows of 28 x 36 tokens, 768 channels. All ways take turns in one process; milliseconds
of a batch, median and range. `--compiled` adds the kernel that CUDA gets, which on a processor
needs a C++ compiler and half a minute.
"""

from stages.memory import keep_freed_memory

keep_freed_memory()  # as `sak` does, before torch is imported

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from stages.decode import compiled_square_law, square_law, square_law_in_cache

SHAPE = (16 * 28 * 36, 768)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compiled", action="store_true")
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, SHAPE, dtype=torch.int8, generator=generator)
    scale = torch.rand(SHAPE[1], generator=generator) * 1e-3
    offset = torch.randn(SHAPE[1], generator=generator)
    given = [part.to(arguments.device) for part in (codes, scale, offset)]
    ways: dict[str, Callable[..., Tensor]] = {
        "four operations": four_operations,
        "addcmul": square_law,
    }
    if arguments.device == "cpu":
        ways["in cache"] = square_law_in_cache
    if arguments.compiled:
        ways["compiled"] = compiled_square_law()
    print("| threads | " + " | ".join(ways) + " |\n|---|" + "---|" * len(ways))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():
            torch.testing.assert_close(way(*given), four_operations(*given), rtol=0, atol=4e-6)
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                found[name].append(seconds(way, given) * 1e3)
        cells = [
            f"{statistics.median(one):.1f} ({min(one):.1f} to {max(one):.1f})"
            for one in found.values()
        ]
        print(f"| {threads} | " + " | ".join(cells) + " |")


def seconds(way: Callable[..., Tensor], given: list[Tensor]) -> float:
    """Return how long one batch takes."""
    started = time.perf_counter()
    way(*given)
    if given[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def four_operations(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Decode as the stream did before."""
    roots = codes.float()
    return roots.mul_(roots.abs()).mul_(scale).add_(offset)


if __name__ == "__main__":
    main()
