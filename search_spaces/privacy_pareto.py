"""What can a server have of utility, of protection and of thrift? MiniLM on TREC, by Optuna.

Run it: python -m fedlpp_ray.tune search_spaces/privacy_pareto.py
It needs: pip install 'fedlpp_ray[search]'. docs/search.md says what early stopping does.
"""

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from fedlpp_ray.config import Experiment
from fedlpp_ray.runtime.variants import Bundles

base = "../configs/trec_minilm.yaml"

bundles: Bundles = {
    "lora.rank": {rank: {"lora.rank": rank, "lora.alpha": 2 * rank} for rank in (4, 8, 16)},
    # One at a time, and all valid with every other choice: a dither that is subtracted goes with
    # `int` alone, and `server.base_correction` with a coarse base. `replace` is the server's other
    # rule; `pull` is the same at server.lr 1.
    "defence": {
        "none": {},
        "replace": {"server.rule": "replace"},
        "average": {"server.final_average": 3},
        "rotate": {"downlink.rotate": "round"},
        "rotate-each": {"downlink.rotate": "client"},
        "noise": {"downlink.perturbation": 0.5},
        "dither": {"downlink.dither": "run"},
        "hold": {"downlink.hold_scales": True, "downlink.hysteresis": 0.5},
        "norm": {"downlink.magnitude": "norm"},
        "fewer": {"downlink.every": 2, "server.lr": 0.5},
        "twice": {"federation.max_participations": 2},
        "mask": {"downlink.server_mask": 0.25},
        "mask-each": {"downlink.client_mask": 0.25},
        "tune": {
            "server.examples": 256,
            "server.final_tune_steps": 50,
            "server.final_tune_lr": 1e-3,
        },
    },
}

param_space = {
    "downlink.bits": tune.choice(["ternary", 2, 3, 4, 8]),
    "downlink.kind": tune.choice(["nf", "int"]),
    "downlink.block": tune.choice([32, 64, 256]),
    "downlink.full_precision_head": tune.choice([False, True]),
    "client.base_bits": tune.choice([2, 3, 4, 32]),
    "lora.rank": tune.choice(list(bundles["lora.rank"])),
    "federation.client_fraction": tune.choice([0.025, 0.05, 0.1]),
    "defence": tune.choice(list(bundles["defence"])),
    # One actor a trial, so that trials run side by side.
    "runtime.client_actors": 1,
    "client.dequantize_at_load": True,
    "evaluation.every": 2,
    # Protection is against these, too, in the clients' base and in W0; `all` takes a while longer.
    "adversary.at_end": ["recent-products", "interval", "aligned-trend", "tuned"],
}

# Of the model that the server ends with, which with `average` is not that of the last round.
objectives = {"final/accuracy": "max", "protection": "max", "bytes/total": "min"}


def tune_config(base: Experiment) -> tune.TuneConfig:
    rounds = base.federation.rounds
    # OptunaSearch samples by TPE, which takes several objectives, is at home with categories and
    # learns after 10 trials; NSGA-II would draw its first population of 50 blindly.
    search = OptunaSearch(
        metric=list(objectives), mode=list(objectives.values()), seed=base.seed % 2**32
    )
    # The worst quarter at a rung stops: servers that learn too little to be worth protecting.
    stop = ASHAScheduler(
        metric="server/accuracy",
        mode="max",
        grace_period=min(4, rounds),
        max_t=rounds,
        reduction_factor=4 / 3,
    )
    return tune.TuneConfig(num_samples=30, search_alg=search, scheduler=stop)
