"""Speed of the quantizer against bitsandbytes' CPU kernels and a plain memory copy, on one thread.

    python -m benchmarks.quantizer

Everything is timed in turn, best of several, in one process, packing and allocation of the result
included. Read the ratios: the absolute numbers depend on the machine and on what else runs there.
bitsandbytes' dequantization takes fresh memory page by page, which on a virtual machine is most of
its time; the rows "4 Mi weights" show both where malloc reuses memory and no such cost arises.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from fedlpp_ray.quantization import Bits, Quantizer

SIZES = {"16 Mi weights": 1 << 24, "4 Mi weights": 1 << 22}
BITS: tuple[Bits, ...] = ("ternary", 2, 3, 4, 5, 6, 8)
BLOCK = 64
REPEATS = 5


def measure() -> list[dict[str, Any]]:
    """Time every method for every size.

    Returns one row per size and method: ``size``, ``method``, ``quantize`` and ``dequantize`` in
    Mweights/s, and their ratios to bitsandbytes (``quantize_vs_bnb``, ...) and to the memory copy
    (``quantize_vs_copy``, ...). Without bitsandbytes its row and its ratios are missing.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for name, numel in SIZES.items() for row in _measure_size(name, numel)]
    finally:
        torch.set_num_threads(threads)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the rows of :func:`measure` as a table."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(name)) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _measure_size(size: str, numel: int) -> list[dict[str, Any]]:
    weights = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    target = torch.empty_like(weights)
    copy = _speed(lambda: target.copy_(weights), numel)
    rows: list[dict[str, Any]] = [{"method": "memory copy", "quantize": copy, "dequantize": copy}]
    rows += _bitsandbytes(weights)
    reference = rows[1] if len(rows) > 1 else None
    rows += [_ours(bits, weights) for bits in BITS]
    for row in rows:
        for name in ("quantize", "dequantize"):
            if reference:
                row[f"{name}_vs_bnb"] = row[name] / reference[name]
            row[f"{name}_vs_copy"] = row[name] / copy
    return [{"size": size, **row} for row in rows]


def _bitsandbytes(weights: torch.Tensor) -> list[dict[str, Any]]:
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError:
        print("bitsandbytes is not installed: its rows and ratios are left out")
        return []
    packed, state = quantize_4bit(weights, blocksize=BLOCK, quant_type="nf4")
    return [
        {
            "method": "bitsandbytes nf4",
            "quantize": _speed(
                lambda: quantize_4bit(weights, blocksize=BLOCK, quant_type="nf4"), weights.numel()
            ),
            "dequantize": _speed(lambda: dequantize_4bit(packed, state), weights.numel()),
        }
    ]


def _ours(bits: Bits, weights: torch.Tensor) -> dict[str, Any]:
    quantizer = Quantizer(bits, block=BLOCK)
    quantized = quantizer.quantize(weights)
    return {
        "method": f"ours, nf {bits}",
        "quantize": _speed(lambda: quantizer.quantize(weights), weights.numel()),
        "dequantize": _speed(quantized.dequantize, weights.numel()),
    }


def _speed(run: Callable[[], Any], numel: int) -> float:
    """Mweights/s of the fastest of several runs."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return numel / min(seconds) / 1e6


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.2f}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    print(markdown(measure()))
