"""A run's numbers by name, flat, as Tune and MLflow take them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from fedlpp_ray.aggregation import find_method
from fedlpp_ray.config import Experiment
from fedlpp_ray.config.adversary import Watched
from fedlpp_ray.federation.records import EVALUATED, FAULTS, RoundRecord
from fedlpp_ray.federation.results import last_server, leak_of
from fedlpp_ray.messages import total_bytes
from fedlpp_ray.tasks import MEASURES, TEXT_MEASURES, UTILITY

PROTECTION = "protection"
"""NaN where it is undefined."""
TOTAL_BYTES = "bytes/total"
ROUND = "round"
SERVER_UTILITY = f"server/{UTILITY}"
_DP = ("dp/epsilon", "dp/clip")
DP_BELOW = "dp/below"
"""The noised fraction of clients whose update was within the adaptive clip."""
_NOT_MEASURED = ("examples",)
_PHASES = ("broadcast", "train", "aggregate", "evaluate", "record", "client_compute", "overhead")
LEAK = "leak"
"""Prefix of what attacks on the newest broadcasts came to, and of the strongest of them."""
FINAL = "final"
"""Prefix of the metrics of the model that the server ends with: its final one, or the last
round's. Its utility is that of protection."""
FINAL_UTILITY = f"{FINAL}/{UTILITY}"
_FLOORS = ("floor_base", "floor_local_only")
_OF_ANY_TASK = (
    *(f"seconds/{phase}" for phase in (*_PHASES, "total", "simulated", "run")),
    *(f"clients/{count}" for count in ("folded", *FAULTS, "staleness")),
    *("bytes/down", "bytes/up", TOTAL_BYTES),
    *("floor", "strongest_client", PROTECTION, "train/loss", ROUND),
)


def metric_names(experiment: Experiment) -> tuple[str, ...]:
    """Every name that a run of this experiment reports: the possible objectives of a search."""
    models = {
        "federated": EVALUATED if experiment.evaluation.server else EVALUATED[1:],
        "centralised": EVALUATED[:1],
        "local-only": EVALUATED[2:],
    }[experiment.method]
    measures = MEASURES[experiment.task.kind]
    if experiment.generation.examples == 0:
        measures = tuple(m for m in measures if m not in TEXT_MEASURES)
    finals = (FINAL,) if "server" in models else ()
    names = _names((*models, *finals, *_FLOORS), measures)
    return (*names, *_dp_names(experiment), *_leak_names(experiment))


def _dp_names(experiment: Experiment) -> tuple[str, ...]:
    if experiment.dp.clip is None:
        return ()
    return (*_DP, DP_BELOW) if experiment.dp.adaptive else _DP


def _leak_names(experiment: Experiment) -> tuple[str, ...]:
    personal = find_method(experiment.server.aggregation).personal
    watched = () if experiment.method != "federated" or personal else experiment.adversary.watch
    return tuple(f"{LEAK}/{name}" for name in (*watched, *(["strongest"] if watched else [])))


def _names(models: Sequence[str], measures: Sequence[str]) -> tuple[str, ...]:
    return (*(f"{model}/{m}" for model in models for m in (UTILITY, *measures)), *_OF_ANY_TASK)


_MODELS = (*EVALUATED, FINAL, *_FLOORS)
_ALL = {name for measures in MEASURES.values() for name in _names(_MODELS, measures)}
_ALL |= {*_DP, DP_BELOW, *(f"{LEAK}/{name}" for name in (*get_args(Watched), "strongest"))}


def round_metrics(history: Sequence[RoundRecord]) -> dict[str, float]:
    """Numbers of the last round, and the bytes moved up to it.

    Names are `server/accuracy`, `client_before/loss`, `bytes/down`, `seconds/train` and so on;
    MLflow shows each prefix as a section of its own.
    """
    record = history[-1]
    metrics: dict[str, float] = {}  # the first name is what MLflow's compare page opens with
    if record.evaluation is not None:
        for model in EVALUATED:
            metrics |= _prefixed(model, getattr(record.evaluation, model) or {})
        leaks = {name: found[UTILITY] for name, found in record.evaluation.leak.items()}
        metrics |= _prefixed(LEAK, leaks)
    if strongest := leak_of(record):
        metrics[f"{LEAK}/strongest"] = strongest[1]
    folded = record.folded
    if folded:
        metrics["train/loss"] = sum(record.loss) / len(folded)
        metrics["clients/staleness"] = sum(c.staleness for c in folded) / len(folded)
    faults: list[str] = [client.fault.kind for client in record.clients if client.fault]
    counts = {"folded": len(folded)} | {kind: faults.count(kind) for kind in FAULTS}
    metrics |= _prefixed("clients", counts)
    if spent := record.privacy:
        metrics |= dict(zip(_DP, (spent.epsilon, spent.clip), strict=True))
        if spent.below is not None:
            metrics[DP_BELOW] = spent.below
    totals = total_bytes(transfer for past in history for transfer in past.ledger)
    metrics |= _prefixed("bytes", totals) | {TOTAL_BYTES: sum(totals.values())}
    return metrics | _prefixed("seconds", record.seconds) | {ROUND: record.round}


def final_metrics(outcome: Mapping[str, Any]) -> dict[str, float]:
    """What only a finished run has, from its result (`fedlpp_ray.federation.results`).

    The model that the server ends with, if it has one, the floor, the strongest utility of a client
    (NaN without clients), protection, and the time of all rounds.
    """
    protection = outcome[PROTECTION]
    strongest = protection["strongest"]
    return {
        **_prefixed(FINAL, last_server(outcome) or {}),
        **_prefixed("floor_base", outcome["floor"]["base"]),
        **_prefixed("floor_local_only", outcome["floor"]["local_only"]),
        "floor": protection["floor"][1],
        "strongest_client": math.nan if strongest is None else strongest[1],
        PROTECTION: math.nan if protection["value"] is None else protection["value"],
        "seconds/run": sum(record["seconds"]["total"] for record in outcome["history"]),
    }


def attack_metrics(report: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """By round: what attacks came to (the report of `fedlpp_ray.attack`), and the leak curve."""
    found: dict[int, dict[str, float]] = {}
    for each in report["attacks"]:
        found.setdefault(each["round"], {})[f"attacks/{each['name']}"] = each["metrics"][UTILITY]
    last, total = max(found), report[PROTECTION]
    value = math.nan if total["value"] is None else total["value"]
    found[last] |= {"attacks/strongest": total["strongest"][1], f"attacks/{PROTECTION}": value}
    for point in report.get("leak_curve", ()):
        found.setdefault(point["round"], {})["attacks/leak_curve"] = point[UTILITY]
    return dict(sorted(found.items()))


def probe_metrics(report: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """By round: what updates gave away (the report of `fedlpp_ray.probe`), and at the last all.

    Of membership over the clients of a round together, and over all updates (`.../all/...`); of
    inversion the mean over a round's updates.
    """
    found: dict[int, dict[str, float]] = {}
    for each in report["pooled"]:
        whole = each["round"] is None
        step = report["updates"][-1]["round"] if whole else each["round"]
        name = f"probe/membership{'/all' if whole else ''}/{each['score']}"
        found.setdefault(step, {})[f"{name}/auc"] = each["auc"]
        if each["tpr"] is not None:
            found[step][f"{name}/tpr"] = each["tpr"]
    for round in dict.fromkeys(each["round"] for each in report["updates"]):
        parts = [x["inversion"] for x in report["updates"] if x["round"] == round]
        for factor in dict.fromkeys(key for part in parts for key in part):
            for key in ("auc", "informed", "recall"):
                values = [part[factor][key] for part in parts if factor in part]
                name = f"probe/inversion/{factor}/{key}"
                found.setdefault(round, {})[name] = sum(values) / len(values)
    return dict(sorted(found.items()))


def reported(result: Mapping[str, Any]) -> dict[str, float]:
    """Of a trial's result those numbers that the run reported, without what Tune adds."""
    return {key: value for key, value in result.items() if key in _ALL}


def named_values(config: Mapping[str, Any], keys: Sequence[str]) -> str:
    """`rank=4 lr=0.00153`: the searched values of a trial, short enough to be a run's name."""
    return " ".join(f"{key.rpartition('.')[2]}={short(config[key])}" for key in keys)


def short(value: Any) -> str:
    """A value for people: a float in four digits, a list joined by plus signs."""
    if isinstance(value, list | tuple):
        return "+".join(map(short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{key}": x for key, x in values.items() if key not in _NOT_MEASURED}
