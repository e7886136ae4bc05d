"""All benchmarks, and the page that shows them: `python -m benchmarks` writes RESULTS.md."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import federation, quantizer

RESULTS = Path(__file__).parent / "RESULTS.md"


def main() -> None:
    """Run everything, one after the other, and write the page."""
    rounds = federation.markdown(federation.measure(federation.default_experiment()))
    from benchmarks import base  # only now, or the driver above would hold the model's libraries

    page = f"""# Measured

Written by `make bench`. {_machine()}. Other work on the machine moves the numbers: read shares and
ratios, which were taken side by side in one run.

## One round of the default experiment

{federation.__doc__.strip().splitlines()[0]}

{rounds}

## One training step, by the format of the client's base

{base.__doc__.strip().splitlines()[0]} `ratio` is to the full-precision base. On a CPU,
`dequantize_at_load` is the choice: the same numbers at no cost in time.

{base.markdown(base.measure())}

## The quantizer, Mweights/s on one thread

`_vs_bnb` and `_vs_copy` are ratios to bitsandbytes' nf4 and to a memory copy of the same run. The
target "dequantize at least as fast as bitsandbytes" is met for results of 32 MiB and more (a
large model's layers), where bitsandbytes waits for fresh pages, and missed below, where its
compiled kernel writes at the speed of a memory copy: torch has no operation that looks up and
scales in one pass, and its gather takes 0.8 ns an element. What that costs a training step is in
the table above.

{quantizer.markdown(quantizer.measure())}
"""
    RESULTS.write_text(page, encoding="utf-8")
    print(page)


def _machine() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "bitsandbytes"))
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    vector = "AVX512" if "avx512f" in flags else "no AVX512"
    return (
        f"{os.cpu_count()} cores ({platform.machine()}, {vector}), "
        f"Python {platform.python_version()}, {packages}, "
        f"{torch.get_num_threads()} default threads"
    )


if __name__ == "__main__":
    main()
