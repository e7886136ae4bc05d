"""Three tables that other benchmarks build on: `python -m benchmarks` writes them into README.md.

    python -m benchmarks

Where the seconds of a round of the default experiment go; a training step by the format of the
base; the quantizer.
"""

from __future__ import annotations

from benchmarks import federation, page, quantizer


def main() -> None:
    """Measure one after the other, print, and write each."""
    found = {
        "benchmarks.federation": federation.markdown(
            federation.measure(federation.default_experiment())
        )
    }
    from benchmarks import base  # only now, or the driver above would hold the model's libraries

    found["benchmarks.base"] = base.markdown(base.measure())
    found["benchmarks.quantizer"] = quantizer.markdown(quantizer.measure())
    for name, table in found.items():
        shown = f"\n{table}\n\n{page.machine()}.\n"
        print(shown)
        page.write(page.README, name, shown)


if __name__ == "__main__":
    main()
