"""What do fewer bits cost, and what do they protect? MiniLM on TREC, three bit widths.

Run it: python -m fedlpp_ray.tune search_spaces/rank_bits.py
"""

from ray import tune

base = "../configs/trec_minilm.yaml"

param_space = {
    "downlink.bits": tune.grid_search(["ternary", 2, 4]),
    "lora.rank": tune.grid_search([4, 16]),
    "federation.client_fraction": tune.grid_search([0.025, 0.05]),
    # Constants are values like any other. One actor a trial, so that trials run side by side.
    "runtime.client_actors": 1,
    "evaluation.every": 5,
}

objectives = {"server/accuracy": "max", "protection": "max", "bytes/total": "min"}
