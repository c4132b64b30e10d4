"""What every codec keeps of real features, what it costs, and what lossless compression gains.

    python tests/benchmarks/store_fidelity.py [--params tests/benchmarks/store.yaml] [--images 320]

Each teacher sees the images once; codecs are fitted to four fifths of them and measured on the
rest (see `store.calibration`). Prints Markdown tables and writes fidelity.json.

`bound` is the relative L2 error that no code of the same rate can beat for a Gaussian source with
the covariance of these tokens (reverse water-filling, Cover and Thomas, theorem 10.3.3); features
are no Gaussian, and blocks of tokens are coded together, so a codec may come below it.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs import Blosc, Zstd

from pipeline.params import load_params
from stages.data.dataset import open_dataset
from stages.extract.calibrate import choose_rows, gather
from stages.extract.reading import RowReader
from stages.extract.teachers import load_teacher
from stages.progress import NoProgress
from store.calibration import Calibration
from store.codecs import Codec
from store.fit import stack
from store.reader import FeatureStore

CODECS = ("float16", "int8", "int8-hadamard", "int8-pca", "pca-6bit", "pca-4bit", "pca-3bit",
          "pca-2bit", "pca-1bit")  # fmt: skip
LOSSLESS = {
    "zstd": Zstd(level=3),
    "blosc zstd, byte shuffle": Blosc("zstd", 3, Blosc.SHUFFLE),
    "blosc zstd, bit shuffle": Blosc("zstd", 3, Blosc.BITSHUFFLE),
    "blosc lz4, bit shuffle": Blosc("lz4", 5, Blosc.BITSHUFFLE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("tests/benchmarks/store.yaml"))
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--teachers", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("artifacts/benchmarks/fidelity.json"))
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    results: list[dict[str, Any]] = []
    print(
        "| teacher | level | grid x C | codec | smaller | cosine | 1st pct | rel. L2 | bound | parameters | encode MB/s | decode MB/s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in arguments.teachers or params.teachers:
        calibration = calibrate(params, name, arguments.images)
        for target in calibration.spec.targets:
            fitted, held_out = calibration.tokens(target)
            for codec in CODECS:
                one = measure(calibration, codec, target, fitted, held_out)
                results.append({"teacher": name, "level": target.level, "codec": codec, **one})
                print(line(results[-1], target), flush=True)
            results[-1]["lossless"] = lossless(held_out)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2))
    print_lossless(results)


def calibrate(params: Any, name: str, images: int) -> Calibration:
    """Run one teacher over some images, through the code that extraction uses."""
    from pipeline.indexing import index

    teacher = load_teacher(name, params.teachers[name], params.image_size, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        store_path = Path(folder) / "features.zarr"
        index(params.model_copy(update={"store": str(store_path)}), False, NoProgress())
        store = FeatureStore(store_path)
        paths = {image.id: image.path for image in open_dataset(params.data).images}
        rows = RowReader(teacher=teacher, images=store.images, views=store.views, paths=paths)
        chosen = choose_rows(rows, images)
        return gather(rows, chosen, params.extract.batch_size, os.cpu_count() or 1, NoProgress())


def measure(
    calibration: Calibration, name: str, target: Any, fitted: np.ndarray, held_out: np.ndarray
) -> dict[str, Any]:
    """Fit one codec to one target; return what it keeps and costs."""
    found = calibration.fit_target(name, target)
    row = (*target.grid, target.channels)
    exact = int(np.prod(row)) * 4
    stored = int(np.prod(found.codec.stored_shape(row))) * np.dtype(found.codec.dtype).itemsize
    encode, decode = speeds(found.codec, stack(held_out))
    return {
        "smaller": exact / stored,
        "row_bytes": stored,
        "parameters": sum(array.nbytes for array in found.codec.parameters().values()),
        "cosine": found.fidelity.cosine_mean,
        "p01": found.fidelity.cosine_p01,
        "l2": found.fidelity.relative_l2,
        "bound": bound(fitted.reshape(-1, target.channels), 32 * stored / exact),
        "encode": encode,
        "decode": decode,
    }


def speeds(codec: Codec, tokens: np.ndarray) -> tuple[float, float]:
    """Return MB of float32 features per second, encoded and decoded, best of three."""
    size = tokens.nbytes / 1e6
    times: list[tuple[float, float]] = []
    for _ in range(3):
        start = time.process_time()
        codes = codec.encode(tokens)
        middle = time.process_time()
        codec.decode(codes)
        times.append((middle - start, time.process_time() - middle))
    return size / min(t for t, _ in times), size / max(min(t for _, t in times), 1e-9)


def bound(tokens: np.ndarray, bits: float) -> float:
    """Return the relative L2 error of a Gaussian of this covariance at `bits` per value."""
    mean = tokens.mean(axis=0)
    deviations = (tokens - mean).astype(np.float64)
    variances = np.linalg.eigvalsh(deviations.T @ deviations / len(tokens)).clip(min=1e-12)
    low, high = 1e-14, float(variances.max())
    for _ in range(80):
        water = (low * high) ** 0.5
        rate = 0.5 * np.log2(np.maximum(variances / water, 1)).mean()
        low, high = (water, high) if rate > bits else (low, water)
    energy = float((tokens.astype(np.float64) ** 2).sum(axis=1).mean())
    return float((np.minimum(variances, water).sum() / energy) ** 0.5)


def lossless(held_out: np.ndarray) -> dict[str, dict[str, float]]:
    """Return by how much each compressor shrinks rows of float16 and of int8 codes."""
    from store.fit import fit_codec

    tokens = stack(held_out)[: 4 * 1024]
    arrays = {
        "float16": tokens.astype(np.float16),
        "int8": fit_codec("int8", held_out).encode(tokens),
        "pca-4bit": fit_codec("pca-4bit", held_out).encode(tokens),
    }
    return {
        name: {key: array.nbytes / len(codec.encode(np.ascontiguousarray(array)))
               for key, codec in LOSSLESS.items()}
        for name, array in arrays.items()
    }  # fmt: skip


def line(one: dict[str, Any], target: Any) -> str:
    """Return one row of the table."""
    shape = f"{target.grid[0]} x {target.grid[1]} x {target.channels}"
    return (
        f"| {one['teacher']} | {one['level']} | {shape} | {one['codec']} | {one['smaller']:.2f}x "
        f"| {one['cosine']:.5f} | {one['p01']:.5f} | {one['l2']:.4f} | {one['bound']:.4f} "
        f"| {one['parameters'] / 1024:.0f} KiB | {one['encode']:.0f} | {one['decode']:.0f} |"
    )


def print_lossless(results: list[dict[str, Any]]) -> None:
    """Print the gain of lossless compression on top, per level."""
    print("\n| teacher | level | stored as | " + " | ".join(LOSSLESS) + " |")
    print("|---" * (3 + len(LOSSLESS)) + "|")
    for one in results:
        for stored, gains in one.get("lossless", {}).items():
            cells = " | ".join(f"{gain:.3f}" for gain in gains.values())
            print(f"| {one['teacher']} | {one['level']} | {stored} | {cells} |")


if __name__ == "__main__":
    main()
