"""Run the app in Flower's simulation engine: `python -m benchmarks.flower.app.run CONFIG OUT`."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flwr.simulation import run_simulation

from benchmarks.flower.app.client_app import app as client_app
from benchmarks.flower.app.server_app import make_app

PACKAGES = ("flwr", "ray", "torch", "transformers", "peft", "bitsandbytes")


def main(config_file: Path, out: Path) -> None:
    """Simulate the federation of a file and write what was measured to another."""
    config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    run_simulation(
        server_app=make_app(config, found.update),
        client_app=client_app,
        num_supernodes=config["clients"],
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            # A private cluster, whatever else runs on the machine.
            "init_args": {"address": "local", "num_cpus": config["workers"]},
        },
    )
    found["versions"] = {package: version(package) for package in PACKAGES}
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
