"""A run's numbers by name, flat, as Tune and MLflow take them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from fedlpp_ray.config import Experiment
from fedlpp_ray.config.adversary import ALL, Watched
from fedlpp_ray.federation.means import attacks_of
from fedlpp_ray.federation.records import EVALUATED, FAULTS, RoundRecord
from fedlpp_ray.federation.results import last_server, leak_of, utility_of
from fedlpp_ray.federation.watch import is_attackable
from fedlpp_ray.messages import total_bytes
from fedlpp_ray.privacy.attacks import ATTACKS
from fedlpp_ray.tasks import MEASURES, TEXT_MEASURES, UTILITY

PROTECTION = "protection"
"""NaN where it is undefined."""
THREAT = "threat"
"""In a result, a trial's last report and MLflow's tags: against whom protection is, in words."""
TOTAL_BYTES = "bytes/total"
ROUND = "round"
SERVER_UTILITY = f"server/{UTILITY}"
_DP = ("dp/epsilon", "dp/clip")
DP_BELOW = "dp/below"
"""The noised fraction of clients whose update was within the adaptive clip."""
_NOT_MEASURED = ("examples",)
_PHASES = ("broadcast", "train", "aggregate", "evaluate", "record", "client_compute", "overhead")
_SECONDS = (*_PHASES, "leak", "total", "simulated", "run")
LEAK = "leak"
"""Prefix of what attacks on the newest broadcasts came to, and of the strongest of them."""
LEAK_SHARE = "leak_share"
"""Of a run's time what these attacks took."""
ATTACK = "attack"
"""Prefix of what the ladder came to at the end of a run, and of the strongest of it."""
ATTACK_THREAT = f"{ATTACK}.{THREAT}"
"""In a trial's last report and MLflow's tags: whom the ladder is of, or why there was no attack."""
FINAL = "final"
"""Prefix of the metrics of the model that the server ends with: its final one, or the last
round's. Its utility is that of protection."""
FINAL_UTILITY = f"{FINAL}/{UTILITY}"
_FLOORS = ("floor_base", "floor_local_only")
_OF_ANY_TASK = (
    *(f"seconds/{phase}" for phase in _SECONDS),
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
    ladder = _ladder_names(experiment)
    return (*names, *_dp_names(experiment), *_leak_names(experiment), *ladder)


def _dp_names(experiment: Experiment) -> tuple[str, ...]:
    if experiment.dp.clip is None:
        return ()
    return (*_DP, DP_BELOW) if experiment.dp.adaptive else _DP


def _leak_names(experiment: Experiment) -> tuple[str, ...]:
    watched = experiment.adversary.watch
    if not watched or not is_attackable(experiment):
        return ()
    return (*(f"{LEAK}/{name}" for name in (*watched, "strongest")), LEAK_SHARE)


def _ladder_names(experiment: Experiment) -> tuple[str, ...]:
    asked = experiment.adversary.at_end
    if not asked or not is_attackable(experiment):
        return ()
    names, _ = attacks_of(experiment, None if asked == ALL else list(asked))
    return (*(f"{ATTACK}/{name}" for name in (*names, "strongest")), "seconds/ladder")


def _names(models: Sequence[str], measures: Sequence[str]) -> tuple[str, ...]:
    return (*(f"{model}/{m}" for model in models for m in (UTILITY, *measures)), *_OF_ANY_TASK)


_MODELS = (*EVALUATED, FINAL, *_FLOORS)
_ALL = {name for measures in MEASURES.values() for name in _names(_MODELS, measures)}
_ALL |= {*_DP, DP_BELOW, *(f"{LEAK}/{name}" for name in (*get_args(Watched), "strongest"))}
_ALL |= {LEAK_SHARE, "seconds/ladder", *(f"{ATTACK}/{n}" for n in (*ATTACKS, "strongest"))}


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
    (NaN without clients), protection, the time of all rounds, its share for what leaks, and the
    ladder's attacks, each in that of the adversary's bases in which it came to most.
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
        **_watched_metrics(outcome),
        **_ladder_metrics(outcome),
    }


def _watched_metrics(outcome: Mapping[str, Any]) -> dict[str, float]:
    watched = any(record.get(LEAK) for record in outcome["history"])
    seconds = outcome.get("seconds")  # an earlier version's result has none
    return {LEAK_SHARE: seconds["leak_share"]} if watched and seconds else {}


def _ladder_metrics(outcome: Mapping[str, Any]) -> dict[str, float]:
    if not (report := outcome.get("ladder")):
        return {}
    found: dict[str, list[float]] = {}
    for each in report["attacks"]:
        found.setdefault(each["attack"], []).append(utility_of(each["metrics"]))
    best = {name: max(x, key=lambda u: (not math.isnan(u), u)) for name, x in found.items()}
    if strongest := report[PROTECTION]["strongest"]:
        best["strongest"] = strongest[1]
    return _prefixed(ATTACK, best) | {"seconds/ladder": outcome["seconds"]["ladder"]}


def attack_metrics(report: Mapping[str, Any]) -> dict[int, dict[str, float | None]]:
    """By round: what attacks came to (the report of `fedlpp_ray.attack`), and the leak curve.

    With the newest broadcasts protection, its interval (`attacks/protection_low`, `..._high`) and
    the utilities that it is of; and by level (`attacks/broadcast/protection`) the same.
    """
    found: dict[int, dict[str, float | None]] = {}
    for each in report["attacks"]:
        found.setdefault(each["round"], {})[f"attacks/{each['name']}"] = each["metrics"][UTILITY]
    last, total = max(found), report[PROTECTION]
    found[last] |= _prefixed("attacks", _protected(total))
    found[last] |= {"attacks/server": total["server"], "attacks/floor": total["floor"][1]}
    for level, each in report["levels"].items():
        found[last] |= _prefixed(f"attacks/{level}", _protected(each))
    for point in report.get("leak_curve", ()):
        found.setdefault(point["round"], {})["attacks/leak_curve"] = point[UTILITY]
    return dict(sorted(found.items()))


def _protected(found: Mapping[str, Any]) -> dict[str, Any]:
    """The strongest utility, protection against it, and the interval's ends where there is one."""
    ends = {f"{PROTECTION}_{end}": found["interval"][end] for end in ("low", "high")}
    return {"strongest": found["strongest"][1], PROTECTION: found["value"], **ends}


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


def threats(outcome: Mapping[str, Any]) -> dict[str, str]:
    """Of a result: against whom its protection is, and whom `attack/...` are of, if it has any.

    None of an earlier version's, which does not say.
    """
    ladder = outcome.get("ladder") or {}
    found = {THREAT: outcome.get(THREAT), ATTACK_THREAT: ladder.get(THREAT)}
    return {key: str(words) for key, words in found.items() if words is not None}


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
