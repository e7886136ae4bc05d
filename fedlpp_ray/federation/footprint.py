"""Memory that a party will need, estimated before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from fedlpp_ray.aggregation import find_method
from fedlpp_ray.config import FULL_PRECISION, ClientConfig, Experiment
from fedlpp_ray.federation.folding import folding_bytes, residual_numbers
from fedlpp_ray.federation.held import bases_of
from fedlpp_ray.federation.watch import is_attackable
from fedlpp_ray.lora import adapted_numbers, add_adapter, add_residuals
from fedlpp_ray.models import (
    activation_bytes,
    cache_bytes,
    correction_bytes,
    layer_bytes,
    load_outline,
    logits_bytes,
    make_emulator,
    modules_named,
    quantized_bytes,
    trained_modules,
    unpacked_bytes,
    weight_bytes,
)

Role = Literal["server", "client", "process"]
"""A server, a client host, or both of them in one process."""

MIB = 1 << 20
FP32 = 4
"""Bytes of a number in full precision."""
PROCESS = 512 * MIB
"""A process on the CPU with torch, transformers, PEFT, a tokenizer and texts: measured, 480 to
560 MiB of which the imports are 435 (torch 2.13, Python 3.11). Large corpora come on top."""
WITH_DEEPSPEED = PROCESS + 96 * MIB
"""The same with DeepSpeed, which a rank that shares its base by ZeRO imports too."""
GATHERED = {"stage3_prefetch_bucket_size": 50_000_000, "stage3_max_live_parameters": 10**9}
"""DeepSpeed's keys, with its defaults, for how many numbers of the base are whole: gathered ahead;
and between a layer's forward and backward pass."""
CUDA_CONTEXT = 512 * MIB
"""What CUDA keeps of a card for each process outside of torch's allocator: about half a GiB."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one party at its peak.

    On a GPU `weights`, `trained`, `training` and `evaluation` are the card's.

    Attributes:
        process: The process itself, `PROCESS`.
        loading: W0 in fp32, in host memory, as it is read. On the CPU its pages stay mapped: they
            count in every process, but processes of one node share them.
        shared: What processes of one node map from one file too: packed or dequantized layers, and
            with client.compute 'bf16' the copy in bf16 of all that is frozen and not packed. 0 on a
            GPU, of bitsandbytes' formats and of an emulator.
        weights: What the base has beside these pages, of its own: the same where it is not
            `shared`; on a GPU all that is moved there, in the base's format.
        trained: Of t trained numbers in fp32: themselves, gradients, the optimizer's moments (two
            of adamw, one of momentum), and copies as states. With residuals, they are state too.
        folding: Of the server, in host memory (`folding_bytes`): the sum of the returns, one
            update, the server optimizer, and the returns that a method keeps, which alone grow
            with the cohort.
        training: Activations and logits of a step of client.batch_size texts of full length.
        evaluation: Merged and dequantized weights (`lora.merged`), of a server those that
            `server.base_correction` corrects, one layer's activations and the logits of
            evaluation.batch_size texts of full length, and the keys and values of a search.
        reading: Of a client host, in host memory: the broadcasts that it attacks, each decoded and
            with both ends of the cells of its codes (`adversary.watch_window` of them, or with
            `at_end` all). The models of `at_end` are in `evaluation`.
        on_gpu: Whether the party has a share of a GPU.

    Of a party that is spread over ranks, all is of one of them: by ZeRO-3 it has its part of the
    base, in `weights`, and what is gathered at a time.
    """

    process: int
    loading: int
    shared: int
    weights: int
    trained: int
    folding: int
    training: int
    evaluation: int
    reading: int
    on_gpu: bool

    @property
    def mapped(self) -> int:
        """Of the node's memory, what its processes share: counted in each, there once."""
        return self.loading + self.shared

    @property
    def certain(self) -> int:
        """What is there however short the texts are, on the device that computes."""
        own = self.weights + self.trained
        return own if self.on_gpu else own + self._on_host

    @property
    def _on_host(self) -> int:
        """What takes the node's memory even if a GPU computes."""
        return self.process + self.mapped + self.folding

    @property
    def peak(self) -> int:
        """On the device that computes. Training and evaluation do not come together."""
        return self.certain + self._work

    @property
    def _work(self) -> int:
        return max(self.training, self.evaluation + (0 if self.on_gpu else self.reading))

    @property
    def host_certain(self) -> int:
        """Of `certain`, and of what is loaded on the way to a GPU, what takes a node's memory."""
        return self._on_host if self.on_gpu else self.certain

    @property
    def host(self) -> int:
        """Of the node's memory."""
        return self.host_certain + self.reading if self.on_gpu else self.peak

    def words(self) -> str:
        """The terms in MiB."""
        trains = self._work == self.training
        terms = {
            "process": 0 if self.on_gpu else self.process,
            "weights": self.weights + (0 if self.on_gpu else self.mapped),
            "trained": self.trained,
            "folding": 0 if self.on_gpu else self.folding,
            "training": self.training if trains else 0,
            "evaluation": 0 if trains else self.evaluation,
            "reading": 0 if trains or self.on_gpu else self.reading,
        }
        return " + ".join(f"{name} {size / MIB:.0f}" for name, size in terms.items() if size) + (
            " MiB"
        )


def estimate(experiment: Experiment, role: Role) -> Footprint:
    """The footprint of a party, from the outline of its model; no weight is read.

    It is an upper bound where texts are shorter than task.max_length, and it knows nothing of the
    kernels' own workspace.

    Raises:
        AssetError, LoraError, LayersError: as the preflight check.
    """
    if role == "process" and experiment.method == "federated":
        return _together(estimate(experiment, "server"), estimate(experiment, "client"))
    trains = role == "client" or experiment.method != "federated"
    on_gpu = bool(
        experiment.runtime.client_gpus if role == "client" else experiment.runtime.server_gpus
    )
    # Two classes: how many there are makes no difference here, and the data need not be read.
    classes = 2 if experiment.task.kind == "classification" else None
    base = load_outline(experiment.model, classes)
    loading = weight_bytes(base)
    config = ClientConfig()
    if trains and experiment.method != "centralised":  # it has what clients have
        config = experiment.client
        if experiment.emulator.kind != "none":
            base = make_emulator(base, experiment.emulator, experiment.adapter.outer)
    kept = modules_named(base, experiment.lora.modules_to_save)
    kept += trained_modules(base, experiment.adapter)
    dense, stored = quantized_bytes(base, config, kept)
    unpacked = 0 if on_gpu else unpacked_bytes(base, config, kept)
    moved = weight_bytes(base) - dense + stored
    party = experiment.client if role == "client" else experiment.server
    correction = 0 if trains else experiment.server.base_correction
    fitted, folded = correction_bytes(base, correction, kept)
    server = experiment.server
    learns = trains or server.tune_steps > 0 or server.final_tune_steps > 0
    training = _training(base, experiment, party.num_workers) if learns else 0
    largest = FP32 * max(parameter.numel() for parameter in base.parameters())
    evaluation = _evaluation(base, experiment)
    model = _adapted(base, experiment, trains=trains)  # from here on the base has an adapter
    maps = config.base_format == "packed" and experiment.emulator.kind == "none" and not on_gpu
    half = trains and experiment.client.compute == "bf16"
    merged = max(unpacked, _adapted_bytes(model, config))
    made = stored
    if half:  # of what is frozen, packed layers excepted
        made += (_frozen_bytes(model) - dense + stored * config.dequantize_at_load) // 2
    attacks = role == "client" and attacked_at_once(experiment) > 0
    weights = fitted + (moved if on_gpu else 0 if maps else made)
    whole = Footprint(
        process=PROCESS,
        loading=loading,
        shared=made if maps else 0,
        weights=weights,
        trained=_trained(model, experiment, trains=trains),
        folding=0 if trains else folding_bytes(model, experiment),
        training=training + folded * learns,
        evaluation=evaluation
        + folded
        + (merged // 2 if half else merged)
        + (_attacking(experiment, weights, loading, on_gpu) if attacks else 0),
        reading=_reading(model, experiment) if attacks else 0,
        on_gpu=on_gpu,
    )
    if party.zero.stage != 3:
        return whole
    set_here = party.zero.model_extra or {}
    ahead, live = (min(moved, FP32 * int(set_here.get(k, n))) for k, n in GATHERED.items())
    streamed = experiment.server.zero.stage == 3
    makes = role == "client" and not streamed  # the base first, on one rank of a node
    return replace(
        whole,
        process=WITH_DEEPSPEED,
        loading=whole.loading * makes,  # mapped pages are let go when they have been read
        shared=whole.shared * (role == "client"),  # it is written there, by one rank of a node
        weights=-(-moved // party.num_workers) + 2 * largest + ahead,
        training=training + live * learns,
        evaluation=evaluation + largest,
    )


def _adapted_bytes(model: nn.Module, config: ClientConfig) -> int:
    """In fp32, of the layers that are merged: bitsandbytes' keep their branch."""
    keeps = config.base_format == "bitsandbytes" and config.base_bits != FULL_PRECISION
    return 0 if keeps else FP32 * adapted_numbers(model)


def _frozen_bytes(model: nn.Module) -> int:
    return FP32 * sum(p.numel() for p in model.parameters() if not p.requires_grad)


def _together(server: Footprint, client: Footprint) -> Footprint:
    """Both parties in one process; they work in turn, and share what is mapped."""
    return Footprint(
        process=PROCESS,
        loading=max(server.loading, client.loading),
        shared=max(server.shared, client.shared),
        weights=server.weights + client.weights,
        trained=server.trained + client.trained,
        folding=server.folding,
        training=client.training,
        evaluation=max(server.evaluation, client.evaluation),
        reading=client.reading,
        on_gpu=client.on_gpu,
    )


def _attacking(experiment: Experiment, weights: int, loading: int, on_gpu: bool) -> int:
    """The models of `adversary.at_end`: the client's once more, W0, and W0 + R."""
    if not experiment.adversary.at_end:
        return 0
    bases = bases_of(experiment)
    return weights + loading * (("corrected" in bases) + (on_gpu and "public" in bases))


def attacked_at_once(experiment: Experiment) -> int:
    """Number of broadcasts that a client host reads at most to attack them; an edition is one."""
    config, downlink = experiment.adversary, experiment.downlink
    if not is_attackable(experiment):
        return 0
    made = 1 + experiment.federation.rounds // downlink.every
    read = made if config.at_end else min(made, config.watch_window) if config.watch else 0
    return read * (config.colluders if downlink.individual else 1)


def _reading(model: nn.Module, experiment: Experiment) -> int:
    """Of these broadcasts."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ends = 2 * (experiment.downlink.bits != FULL_PRECISION)
    return FP32 * trained * (1 + ends) * attacked_at_once(experiment)


def _length(experiment: Experiment) -> int:
    """Tokens of the longest text."""
    generates, adapter = experiment.task.kind == "generation", experiment.adapter
    written = experiment.generation.max_new_tokens if generates else 0
    prompt = adapter.tokens if adapter.kind == "prompt" else 0
    return experiment.task.max_length + written + prompt


def _training(base: nn.Module, experiment: Experiment, ranks: int) -> int:
    """Of a rank's part of a batch."""
    batch = -(-experiment.client.batch_size // ranks), _length(experiment)
    return activation_bytes(base, *batch) + logits_bytes(base, *batch)


def _evaluation(base: nn.Module, experiment: Experiment) -> int:
    rows = min(experiment.evaluation.batch_size, experiment.task.held_out)
    length, generation = _length(experiment), experiment.generation
    likelihood = layer_bytes(base, rows, length) + logits_bytes(base, rows, length)
    if experiment.task.kind == "classification" or generation.examples == 0:
        return likelihood
    searched = max(1, rows // generation.beams) * generation.beams
    return max(likelihood, cache_bytes(base, searched, length) + logits_bytes(base, searched, 1))


_STATES = 4
"""Copies of a party's state at once: as it began, received, after training, as a message."""
_MOMENTS = {"adamw": 2, "sgd": 1}


def _adapted(base: nn.Module, experiment: Experiment, *, trains: bool) -> nn.Module:
    """The base with its adapter, and with residuals where the party has them."""
    model = add_adapter(base, experiment.adapter, experiment.lora, seed=0)
    writes = find_method(experiment.server.aggregation).writes_base
    if writes and (not trains or experiment.server.send_residual):
        add_residuals(model)
    return model


def _trained(model: nn.Module, experiment: Experiment, *, trains: bool) -> int:
    """Bytes of what is trained, with its gradients, moments and copies."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    copies = 1 + _STATES + (1 + _MOMENTS[experiment.client.optimizer] if trains else 0)
    copies += 2 * (not trains and experiment.server.final_average > 1)  # their sum, in float64
    return FP32 * (trained * copies + residual_numbers(model) * (1 + _STATES))


def out_of_memory_advice(experiment: Experiment, error: BaseException) -> str:
    """One line for a party that ran out of memory: what it met, and which keys to change.

    Args:
        experiment: What was run.
        error: For instance torch.OutOfMemoryError, or what tells that a process was killed.
    """
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    runtime, client = experiment.runtime, experiment.client
    lower = [
        f"client.batch_size ({client.batch_size})",
        f"evaluation.batch_size ({experiment.evaluation.batch_size})",
        f"task.max_length ({experiment.task.max_length})",
        f"runtime.client_actors ({runtime.client_actors})",
    ]
    if client.base_bits == FULL_PRECISION or client.dequantize_at_load:
        lower.insert(0, "the client's base (client.base_bits=4 client.dequantize_at_load=false)")
    advice = f"out of memory: {first.rstrip('. ')}. Lower {', '.join(lower)}"
    shares = {"client_gpus": runtime.client_gpus, "server_gpus": runtime.server_gpus}
    capped = [f"runtime.{key} ({share:g})" for key, share in shares.items() if 0 < share < 1]
    if capped:
        advice += f"; or raise {' and '.join(capped)}: a share of a GPU caps its actor's memory"
    return advice
