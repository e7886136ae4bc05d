"""The same federations under Flower's simulation engine: ``python -m benchmarks.flower``."""
