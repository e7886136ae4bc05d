"""Peak memory of a rank of a server whose model is spread by ZeRO-3, against the number of ranks.

    python -m benchmarks.zero [--quick] [--into benchmarks/README.md]

A random Llama of about 1e9 parameters, in bf16 in files of 200 MB, is loaded in fp32 by ranks that
are processes of this machine (gloo), then does what a server does with it: gives away its 4-bit
base layer by layer, evaluates (likelihood and writing), and trains a step. For each the kernel says
the largest resident set since the last (VmHWM, reset through /proc/self/clear_refs). Linux only.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import page

NAME = "benchmarks.zero"
RANKS = (1, 2, 4)
WORK = ("load", "client base", "evaluate", "train")
SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 18}
QUICK = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
LITTLE = 10_000_000
"""Numbers that DeepSpeed may gather ahead of their use, and keep for the next one: 40 MB in fp32.
Its defaults, 5e7 and 1e9, are for ranks with more memory than this model has."""
ZERO = {
    "stage": 3,
    "stage3_prefetch_bucket_size": LITTLE,
    "stage3_max_live_parameters": LITTLE,
    "stage3_max_reuse_distance": LITTLE,
}
MB = 1 << 20


def measure(sizes: dict[str, int], ranks: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row for a server that is not spread, and for each number of ranks; MB."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDLPP_RAY_CACHE"] = f"{folder}/cache"
        _together(1, _make_model, f"{folder}/model", sizes)
        _together(1, _serve, folder, 0)  # fills the cache
        rows = [{"server": "one actor", "ranks": 1} | _peaks(1, folder, 0)]
        rows += [{"server": "ZeRO-3", "ranks": n} | _peaks(n, folder, 3) for n in ranks]
    return rows


def _peaks(ranks: int, folder: str, stage: int) -> dict[str, Any]:
    """Of the rank that has most."""
    found = _together(ranks, _serve, folder, stage)
    return {key: max(each[key] for each in found) for key in found[0]}


def fit(rows: list[dict[str, Any]], work: str) -> tuple[float, float]:
    """Slope and constant of peak = slope * size / ranks + constant over the spread rows (least
    squares)."""
    import numpy as np

    spread = [row for row in rows if row["server"] == "ZeRO-3"]
    shares = [row["size"] / row["ranks"] for row in spread]
    slope, constant = np.polyfit(shares, [row[work] for row in spread], 1)
    return float(slope), float(constant)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table, with the line that fits each column."""
    cells = [
        [
            f"{row['server']}, {row['ranks']} rank{'s' * (row['ranks'] > 1)}",
            f"{row['size'] / row['ranks'] / MB:.0f}",
            f"{row['bare'] / MB:.0f}",
            *(f"{row[work] / MB:.0f}" for work in WORK),
        ]
        for row in rows
    ]
    lines = [fit(rows, work) for work in WORK]
    last = ["spread: slope x share + constant", "", ""]
    last += [f"{slope:.2f} x + {constant / MB:.0f}" for slope, constant in lines]
    columns = ["server", "its share of W0 in fp32", "imports", *WORK]
    return page.rows(
        [f"{column}, MB" if column != "server" else column for column in columns], [*cells, last]
    )


def _make_model(_group: Any, folder: str, sizes: dict[str, int]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests import tiny

    tiny.make_generator(Path(folder))
    for file in Path(folder).glob("*.safetensors"):
        file.unlink()
    config = LlamaConfig.from_pretrained(folder)
    config.update(sizes | {"vocab_size": 8192, "num_attention_heads": 16})
    config.update({"num_key_value_heads": 16, "head_dim": sizes["hidden_size"] // 16})
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200MB")
    tiny.write_csv(
        Path(folder) / "data.csv",
        [{"thing": f"{a} {b}", "says": f"a {b} is near"} for a in tiny.COMMON for b in tiny.COMMON],
    )


def _serve(group: Any, folder: str, stage: int) -> dict[str, int]:
    """What a server does, on this rank; bytes at the peak of each."""
    from fedlpp_ray.config import Experiment
    from fedlpp_ray.federation.data import FederatedText
    from fedlpp_ray.federation.server_model import ServerModel
    from fedlpp_ray.models import load_outline, weight_bytes
    from fedlpp_ray.training import process_peak

    if stage:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401
    zero = ZERO if stage else {}
    values = {
        "model.name": f"{folder}/model",
        "task.name": "generation",
        "task.data": f"{folder}/model/data.csv",
        "task.prompt": "what is the {thing}",
        "task.target": "{says}",
        "task.held_out": 4,
        "generation.examples": 4,
        "task.max_length": 12,
        "generation.max_new_tokens": 2,
        "generation.beams": 1,
        "evaluation.batch_size": 1,
        "client.base_bits": 4,
        "client.batch_size": 8,
        "federation.clients": 4,
        "server.examples": 8,
        "server.tune_steps": 1,
        **{f"server.zero.{key}": value for key, value in zero.items()},
    }
    experiment = Experiment().with_values(values)
    text = FederatedText(experiment, group)
    found = {"size": weight_bytes(load_outline(experiment.model, None)), "bare": process_peak()}

    def peak(work: str) -> None:
        found[work] = process_peak()
        Path("/proc/self/clear_refs").write_text("5")

    peak("bare")
    model = ServerModel(experiment, text, group)
    peak("load")
    if model.parts is not None:
        for number in range(len(model.parts)):
            model.parts.part(number, make=group.rank == 0)
    peak("client base")
    # All ranks call the methods themselves here: none leads.
    ServerModel.evaluate.__wrapped__(model, model.initial)  # type: ignore[attr-defined]
    peak("evaluate")
    ServerModel.tune.__wrapped__(model, 1, model.initial)  # type: ignore[attr-defined]
    peak("train")
    return found


def _together(ranks: int, work: Any, *arguments: Any) -> list[Any]:
    """Have so many new processes call `work(group, ...)` as the ranks of one group."""
    from tests.ranks import Ranks

    with tempfile.TemporaryDirectory() as meeting:
        started = Ranks(ranks, Path(meeting))
        try:
            return started.run(work, *arguments)
        finally:
            started.close()


def main() -> None:
    """Measure, print, and write where asked."""
    options = page.parser(NAME, __doc__).parse_args()
    sizes, ranks = (QUICK, (1, 2)) if options.quick else (SIZES, RANKS)
    page.deliver(NAME, options, lambda: markdown(measure(sizes, ranks)))


if __name__ == "__main__":
    main()
