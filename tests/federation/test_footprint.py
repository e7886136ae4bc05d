"""Memory that a party needs: estimated, compared with what a process really takes, remembered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedlpp_ray.aggregation import Method
from fedlpp_ray.aggregation.methods import mean_update
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation import Federation, footprint, peaks
from fedlpp_ray.federation.footprint import estimate, out_of_memory_advice
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.ladder import Ladder
from fedlpp_ray.federation.peaks import (
    expected_peak,
    in_process_line,
    known_peaks,
    remember_peaks,
)
from fedlpp_ray.federation.server import Server
from fedlpp_ray.federation.wire import Broadcast
from fedlpp_ray.lora import add_adapter, merged, store_in_bf16
from fedlpp_ray.models import (
    activation_bytes,
    layer_bytes,
    load_classifier,
    load_outline,
    quantize_base,
    quantized_bytes,
)
from fedlpp_ray.training.device import compute_dtype
from tests import tiny

MEASURE = """
import sys
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.client import ClientHost
from fedlpp_ray.federation.server import Server
from fedlpp_ray.training import process_peak
experiment = Experiment.model_validate_json(sys.stdin.read())
server = Server(experiment)
broadcast = server.encode_broadcast(1, [0])
host = ClientHost(experiment)
host.train(1, 0, broadcast)
host.evaluate(2, server.encode_broadcast(2, [0]))
print(process_peak())
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(peaks, "cache_folder", lambda: tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "size",
    [
        pytest.param((64, 2), id="tiny"),
        pytest.param((384, 6), id="as wide and deep as MiniLM"),
    ],
)
def test_the_estimate_is_near_what_a_process_takes(
    tiny_experiment: Experiment, tmp_path: Path, size: tuple[int, int]
) -> None:
    model = tiny.make_model(tmp_path, hidden=size[0], layers=size[1])
    experiment = tiny_experiment.with_values(
        {"model.name": str(model), "client.batch_size": 64, "evaluation.batch_size": 64}
    )
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        input=experiment.model_dump_json(),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    ratio = estimate(experiment, "process").peak / int(done.stdout.split()[-1])
    assert 0.7 < ratio < 1.6


@pytest.mark.parametrize(
    "values",
    [
        {"base_bits": 4},
        {"base_bits": 3, "base_scale": "fp16", "base_block": 32},
        {"base_bits": 2, "base_scale": "double", "base_kind": "int", "base_block": 256},
        {"base_bits": 8, "dequantize_at_load": True},
        {"base_bits": 32},
    ],
    ids=str,
)
def test_a_quantized_base_takes_what_is_said(
    tiny_experiment: Experiment, values: dict[str, object]
) -> None:
    experiment = tiny_experiment.with_values({f"client.{k}": v for k, v in values.items()})
    outline = load_outline(experiment.model, 3)
    dense, stored = quantized_bytes(outline, experiment.client)
    model = load_classifier(experiment.model, 3, 0, 0)
    before = _bytes(model)
    after = _bytes(quantize_base(model, experiment.client))
    # Codebooks and the groups of double scales are not counted.
    assert after - before == pytest.approx(stored - dense, rel=0.02)


def _bytes(model: torch.nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(
        tensor.nbytes
        for tensor in tensors
        if tensor.is_floating_point() or tensor.dtype == torch.uint8
    )


def test_activations_bound_what_a_step_keeps(tiny_experiment: Experiment) -> None:
    """Counted by torch, as what is saved for the backward pass."""
    base = load_classifier(tiny_experiment.model, 3, 0, 0)
    expected = activation_bytes(base, 8, 16)
    model = add_adapter(base, tiny_experiment.adapter, tiny_experiment.lora, 0).train()
    own = {
        tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]
    }
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ids = torch.randint(5, 20, (8, 16))
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.zeros(8, dtype=int))
    counted = sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in own)
    assert 0.5 * expected < counted < 1.1 * expected


def test_each_key_moves_its_own_term(tiny_experiment: Experiment) -> None:
    before = estimate(tiny_experiment, "client")
    rank = estimate(tiny_experiment.with_values({"lora.rank": 16}), "client")
    assert rank.trained > before.trained
    assert rank.training == before.training
    batch = estimate(tiny_experiment.with_values({"client.batch_size": 80}), "client")
    assert batch.training == 10 * before.training
    assert batch.trained == before.trained
    wide = {"evaluation.batch_size": 40}
    assert estimate(tiny_experiment.with_values(wide), "client").evaluation < before.evaluation
    assert estimate(tiny_experiment, "server").training == 0


def test_a_final_model_and_a_corrected_base_count_at_the_server(
    tiny_experiment: Experiment,
) -> None:
    """A tiny BERT has 2 layers of 4 (64, 64), (128, 64) and (64, 128), and a pooler (64, 64)."""
    quantized = tiny_experiment.with_values({"client.base_bits": 4})
    before = estimate(quantized, "server")
    corrected = estimate(quantized.with_values({"server.base_correction": 8}), "server")
    assert corrected.weights - before.weights == 4 * 8 * (9 * 128 + 4 * 192)
    assert corrected.evaluation - before.evaluation == 4 * (9 * 64 * 64 + 4 * 128 * 64)
    averaged = estimate(quantized.with_values({"server.final_average": 2}), "server")
    trained = before.trained // 5  # the state, and its four copies
    assert averaged.trained - before.trained == 2 * trained
    final = {"server.final_tune_steps": 1, "server.examples": 8}
    assert estimate(quantized.with_values(final), "server").training > 0


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"downlink.bits": 2, "federation.rounds": 9, "downlink.every": 2},
        {"downlink.bits": 2, "downlink.rotate": "client", "adversary.colluders": 2},
    ],
    ids=str,
)
def test_reading_counts_the_broadcasts_that_a_ladder_holds(
    tiny_experiment: Experiment, values: dict[str, object]
) -> None:
    experiment = tiny_experiment.with_values(
        {"adversary.at_end": "all", "federation.clients": 2, "federation.client_fraction": 1.0}
        | values
    )
    kept: dict[int, Broadcast] = {}
    federation = Federation(experiment, InProcess(experiment), kept.__setitem__)
    list(federation.run())
    received = Ladder(experiment, kept, federation.history).view.received
    most = footprint.attacked_at_once(experiment)
    # After the last round, of editions, only the client that is measured is sent one.
    assert len(received) == most - ("downlink.rotate" in values)
    ends = [end for each in received for pair in each.cells.values() for end in pair]
    held = sum(t.nbytes for each in received for t in each.state.values())
    # The head has three classes, the estimate two.
    each = estimate(experiment, "client").reading / most
    assert each * len(received) == pytest.approx(held + sum(end.nbytes for end in ends), rel=0.05)


def test_who_attacks_at_the_end_has_the_models_for_it(tiny_experiment: Experiment) -> None:
    plain = tiny_experiment.with_values({"client.base_bits": 4, "downlink.bits": 2})
    watching, ladder = estimate(plain, "client"), plain.with_values({"adversary.at_end": "all"})
    card = {"runtime.client_gpus": 0.5}
    found, base = estimate(ladder.with_values(card), "client"), watching.loading
    before = estimate(plain.with_values(card), "client")
    assert found.evaluation - before.evaluation == before.weights + base
    assert estimate(ladder, "client").evaluation == watching.evaluation  # mapped, once a node
    corrected = ladder.with_values({"server.base_correction": 8})
    assert estimate(corrected, "client").evaluation == watching.evaluation + base
    proprietary = ladder.with_values(card | {"adversary.base": "proprietary"})
    assert estimate(proprietary, "client").evaluation - before.evaluation == before.weights
    blind = estimate(plain.with_values({"adversary.watch": []}), "client")
    assert (blind.reading, estimate(ladder, "server").reading) == (0, 0)
    assert 0 < watching.reading <= estimate(ladder, "client").reading
    assert found.host == found.host_certain + found.reading


def _of_cohort(experiment: Experiment, cohort: int, method: str) -> int:
    values = {"clients": 1000, "client_fraction": None, "cohort": cohort}
    values = {f"federation.{key}": value for key, value in values.items()}
    made = experiment.with_values(values | {"server.aggregation": method})
    return estimate(made, "server").host_certain


def test_the_server_does_not_grow_with_what_it_folds(tiny_experiment: Experiment) -> None:
    assert _of_cohort(tiny_experiment, 1000, "fedit") == _of_cohort(tiny_experiment, 4, "fedit")
    # Its factors are stacked where those of a cohort are smaller than the matrix, else summed.
    stacked = [_of_cohort(tiny_experiment, cohort, "flexlora") for cohort in (1, 2)]
    summed = [_of_cohort(tiny_experiment, cohort, "flexlora") for cohort in (400, 1000)]
    assert stacked[0] < stacked[1]
    assert summed[0] == summed[1]


KEEPS = Method(direction=mean_update)


def test_a_method_that_keeps_returns_grows_with_the_cohort(tiny_experiment: Experiment) -> None:
    ours = f"{__name__}:KEEPS"
    sizes = [_of_cohort(tiny_experiment, cohort, ours) for cohort in (4, 5, 1000)]
    update = sizes[1] - sizes[0]
    assert update > 0
    assert sizes[2] - sizes[0] == 996 * update


def test_folding_counts_what_a_server_holds(tiny_experiment: Experiment) -> None:
    adam = tiny_experiment.with_values({"server.optimizer": "fedadam"})
    server = Server(adam)
    numbers = sum(tensor.numel() for tensor in server._state.values())
    folding = estimate(adam, "server").folding
    # The head has three classes, the estimate two. Sum, update and two moments.
    assert folding == pytest.approx((16 + 8 + 16) * numbers, rel=0.05)
    assert estimate(tiny_experiment, "server").folding < folding
    assert estimate(adam, "client").folding == 0


def test_a_copy_in_bf16_is_one_for_all_actors_on_a_cpu(tiny_experiment: Experiment) -> None:
    full = estimate(tiny_experiment, "client")
    half = estimate(tiny_experiment.with_values({"client.compute": "bf16"}), "client")
    assert half.shared - full.shared == pytest.approx(full.loading / 2, rel=0.02)
    assert half.weights == full.weights == 0
    packed = {"client.base_bits": 4}
    fp32 = estimate(tiny_experiment.with_values(packed), "client")
    bf16 = estimate(tiny_experiment.with_values({"client.compute": "bf16"} | packed), "client")
    assert 0 < bf16.shared - fp32.shared < half.shared
    assert bf16.weights == 0
    card = {"client.compute": "bf16", "runtime.client_gpus": 0.5}
    assert estimate(tiny_experiment.with_values(card), "client").shared == 0


def test_quantized_layers_are_mapped_but_for_bitsandbytes(tiny_experiment: Experiment) -> None:
    packed = estimate(tiny_experiment.with_values({"client.base_bits": 4}), "client")
    assert packed.shared > 0
    assert packed.weights == 0
    dense = {"client.base_bits": 4, "client.dequantize_at_load": True}
    assert estimate(tiny_experiment.with_values(dense), "client").shared > packed.shared
    bnb = {"client.base_bits": 4, "client.base_format": "bitsandbytes"}
    own = estimate(tiny_experiment.with_values(bnb), "client")
    assert (own.shared, own.weights) == (0, packed.shared)
    card = {"client.base_bits": 4, "runtime.client_gpus": 0.5}
    assert estimate(tiny_experiment.with_values(card), "client").shared == 0


def _merged_bytes(experiment: Experiment) -> int:
    """Of the layers that stand in a client's model while it is evaluated, and are new."""
    model = load_classifier(experiment.model, 2, 0, 0)
    model = quantize_base(model, experiment.client)
    model = add_adapter(model, experiment.adapter, experiment.lora, 0).eval()
    if experiment.client.compute == "bf16":
        store_in_bf16(model)
    before = {id(p) for p in model.parameters()}
    with merged(model, compute_dtype(model)):
        return sum(p.nbytes for p in model.parameters() if id(p) not in before)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("bits", [32, 4])
def test_evaluation_counts_merged_weights(
    tiny_experiment: Experiment, compute: str, bits: int
) -> None:
    values = {"client.compute": compute, "client.base_bits": bits}
    experiment = tiny_experiment.with_values(values)
    rows = min(experiment.evaluation.batch_size, experiment.task.held_out)
    layer = layer_bytes(load_outline(experiment.model, 2), rows, 16)
    assert estimate(experiment, "client").evaluation - layer == _merged_bytes(experiment)


def test_residuals_and_emulators_count(tiny_experiment: Experiment) -> None:
    exact = tiny_experiment.with_values({"server.aggregation": "fedex-lora"})
    assert estimate(exact, "server").trained > estimate(tiny_experiment, "server").trained
    assert estimate(exact, "client").trained == estimate(tiny_experiment, "client").trained
    gpu = tiny_experiment.with_values({"runtime.client_gpus": 0.5})
    shared = gpu.with_values({"emulator.kind": "shared-layer"})
    assert estimate(shared, "client").weights < estimate(gpu, "client").weights


def test_on_a_gpu_the_process_is_the_hosts(tiny_experiment: Experiment) -> None:
    found = estimate(tiny_experiment.with_values({"runtime.client_gpus": 0.5}), "client")
    here = estimate(tiny_experiment, "client")
    assert found.weights == here.loading
    blind = estimate(tiny_experiment.with_values({"adversary.watch": []}), "client")
    assert found.peak == blind.peak - footprint.PROCESS
    assert found.host == footprint.PROCESS + here.loading + here.reading


def test_a_generator_counts_its_logits(tmp_path: Path, tiny_experiment: Experiment) -> None:
    values = {
        "model.name": str(tiny.make_generator(tmp_path)),
        "task.name": "generation",
        "task.prompt": "{label}",
        "task.target": "{text}",
        "generation.max_new_tokens": 8,
    }
    experiment = tiny_experiment.with_values(values)
    base = load_outline(experiment.model, None)
    vocabulary = base.config.vocab_size
    logits = estimate(experiment, "client").training - activation_bytes(base, 8, 16 + 8)
    assert logits == 4 * 4 * 8 * (16 + 8) * vocabulary


def test_measured_comes_before_estimated(cache: Path, tiny_experiment: Experiment) -> None:
    assert known_peaks(tiny_experiment) == {}
    assert "estimated: process 512" in in_process_line(tiny_experiment)
    remember_peaks(tiny_experiment, {"client": 5 << 30})
    remember_peaks(tiny_experiment, {"client": 3 << 30, "process": 7 << 30})
    assert known_peaks(tiny_experiment) == {"client": 5 << 30, "process": 7 << 30}
    found = expected_peak(tiny_experiment, "client")
    assert (found.size, found.why()) == (5 << 30, "measured in an earlier run")
    assert not expected_peak(tiny_experiment, "server").measured
    line = "placement one process, 1 thread, about 7.0 GiB (measured in an earlier run)"
    assert in_process_line(tiny_experiment) == line
    # What memory does not depend on.
    same = {"seed": 3, "client.lr": 0.5, "federation.rounds": 9, "runtime.client_actors": 1}
    assert known_peaks(tiny_experiment.with_values(same))
    for key, value in {
        "client.batch_size": 4,
        "lora.rank": 2,
        "client.base_bits": 4,
        "task.max_length": 8,
        "runtime.client_gpus": 1.0,
        "evaluation.batch_size": 3,
        "adversary.at_end": "all",
    }.items():
        assert known_peaks(tiny_experiment.with_values({key: value})) == {}


@pytest.mark.parametrize("text", ["", "[]", '{"client": null}', "nonsense"])
def test_a_spoilt_note_is_none(cache: Path, tiny_experiment: Experiment, text: str) -> None:
    remember_peaks(tiny_experiment, {"client": 1})
    (note,) = (cache / "peaks").iterdir()
    note.write_text(text)
    assert known_peaks(tiny_experiment) == {}


def test_a_cache_that_cannot_be_written_stops_nothing(
    cache: Path, tiny_experiment: Experiment
) -> None:
    (cache / "peaks").write_text("a file")
    remember_peaks(tiny_experiment, {"client": 1})
    assert known_peaks(tiny_experiment) == {}


def test_the_advice_names_keys_that_can_help(tiny_experiment: Experiment) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    full = out_of_memory_advice(tiny_experiment, error)
    assert full.startswith("out of memory: CUDA out of memory. Tried to allocate 2 GiB. Lower ")
    assert "client.base_bits=4" in full
    assert "client.batch_size (8)" in full
    assert "client_gpus" not in full
    values = {"client.base_bits": 4, "runtime.client_gpus": 0.25}
    shared = out_of_memory_advice(tiny_experiment.with_values(values), MemoryError())
    assert shared.startswith("out of memory: MemoryError. ")
    assert "client.base_bits=4" not in shared
    assert "raise runtime.client_gpus (0.25)" in shared
    assert "\n" not in full + shared


def test_a_rank_of_a_spread_party_has_its_part_of_the_base(tiny_experiment: Experiment) -> None:
    """The more ranks, the less; what is gathered at a time does not shrink, and is DeepSpeed's."""
    few = {"server.zero.stage": 3, "server.zero.stage3_prefetch_bucket_size": 10}
    found = {
        ranks: estimate(tiny_experiment.with_values({"server.num_workers": ranks} | few), "server")
        for ranks in (1, 2, 4)
    }
    whole = estimate(tiny_experiment, "server")
    numbers = whole.loading  # W0 in fp32
    assert found[1].weights - found[2].weights == numbers // 2
    assert found[2].weights - found[4].weights == pytest.approx(numbers / 4, abs=1)
    assert found[4].loading == found[4].shared == 0
    assert found[4].evaluation < whole.evaluation
    tuned = few | {"server.num_workers": 2, "server.tune_steps": 1, "server.examples": 8}
    live = {"server.zero.stage3_max_live_parameters": 100}
    much = estimate(tiny_experiment.with_values(tuned), "server").training
    assert much - estimate(tiny_experiment.with_values(tuned | live), "server").training == (
        numbers - 400
    )
    halves = [
        estimate(tiny_experiment.with_values({"client.num_workers": n}), "client").training
        for n in (1, 2)
    ]
    assert halves[1] == halves[0] // 2
