"""The local steps of a federation in a bare loop of PyTorch and PEFT: the process for it.

    python -m benchmarks.bare CONFIG KEY=VALUE ... -- WORKER WORKERS {ours,qlora}

It holds one model. For a client the adapter is set back to what it was, and AdamW is new; the
batches are those that the client has in the federation, tokenized beforehand. Told the number of a
round on a line of its input, it trains every `WORKERS`-th client of that round's cohort, beginning
with number `WORKER`, and answers with the tokens that these have, without padding.

The model is a transformers model in the same format as the clients', wrapped by PEFT, and the loss
is theirs: of a language model no more logits are computed than have a label. With `qlora` it is
loaded as QLoRA's authors do, transformers' nf4 through bitsandbytes, computing in bf16, and the
loss is transformers' own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

NICENESS = 15
"""That of Ray's workers."""
Tokens = int


class Bare:
    """So many processes, each with its share of every cohort, that wait between rounds.

    Args:
        config: YAML file of the experiment.
        keys: `key=value` overrides of it.
        workers: Number of processes.
        environment: Variables of each.
        model: `ours` or `qlora`.
    """

    def __init__(
        self,
        config: str,
        keys: Sequence[str],
        workers: int,
        environment: dict[str, str],
        model: str = "ours",
    ) -> None:
        command = [sys.executable, "-m", "benchmarks.bare", config, *keys, "--"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._processes = [
            subprocess.Popen(
                [*command, str(worker), str(workers), model], env=os.environ | environment, **pipes
            )
            for worker in range(workers)
        ]

    def wait(self) -> None:
        """Until all are ready."""
        for process in self._processes:
            _told(process, "ready")

    def round(self, number: int) -> tuple[float, Tokens]:
        """Seconds until the clients of a round are trained, all processes at once; and tokens."""
        start = time.perf_counter()
        for process in self._processes:
            process.stdin.write(f"{number}\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        tokens = sum(_told(process, "tokens") for process in self._processes)
        return time.perf_counter() - start, tokens

    def close(self) -> None:
        """End them."""
        for process in self._processes:
            process.communicate()


@contextmanager
def bare(*arguments: Any) -> Iterator[Bare]:
    """A `Bare` for the time of the block."""
    found = Bare(*arguments)
    try:
        found.wait()
        yield found
    finally:
        found.close()


def _told(process: Any, word: str) -> int:
    for line in process.stdout:
        if line.startswith(f"{word} "):
            return int(line.split()[1])
    raise RuntimeError(f"a process ended: {process.args}")


class Loop:
    """The bare loop in this process.

    Args:
        experiment: An `Experiment`.
        worker: Number of this process.
        workers: Number of processes.
        model: `ours` or `qlora`.
    """

    def __init__(self, experiment: Any, worker: int, workers: int, model: str) -> None:
        import torch

        from fedlpp_ray.federation.data import FederatedText
        from fedlpp_ray.federation.schedule import Schedule
        from fedlpp_ray.lora import add_lora, store_in_bf16, trainable
        from fedlpp_ray.training import configure_torch

        runtime = experiment.runtime
        self._device = configure_torch(runtime.threads, runtime.client_gpus)
        self._experiment, self._text = experiment, FederatedText(experiment)
        self._plain = model == "qlora"
        make = _qlora if self._plain else _ours
        base = make(experiment, self._text, self._device)
        self._model: Any = add_lora(base, experiment.lora, experiment.seed).to(self._device)
        self._half = experiment.client.compute == "bf16"
        if self._half and not self._plain:
            store_in_bf16(self._model)
        self._trained = list(trainable(self._model).values())
        with torch.no_grad():
            self._initial = [parameter.clone() for parameter in self._trained]
        plans = Schedule(experiment, self._text.examples).plans()
        rounds = islice(plans, experiment.federation.rounds)
        cohorts = {plan.round: [each.client for each in plan.cohort] for plan in rounds}
        self._shares = {number: clients[worker::workers] for number, clients in cohorts.items()}
        self._examples = {
            client: list(self._text.client(client))
            for clients in self._shares.values()
            for client in clients
        }

    def round(self, number: int) -> Tokens:
        """Train this process's clients of a round; returns their tokens."""
        return sum(self._train(number, client) for client in self._shares[number])

    def _train(self, number: int, client: int) -> Tokens:
        import torch
        from torch.optim import AdamW

        config = self._experiment.client
        with torch.no_grad():
            for parameter, initial in zip(self._trained, self._initial, strict=True):
                parameter.copy_(initial)
        optimizer = AdamW(self._trained, lr=config.lr, weight_decay=config.weight_decay)
        self._model.train()
        tokens, losses = 0, []
        for batch in self._batches(number, client):
            tokens += int(batch["attention_mask"].sum())
            with torch.autocast(self._device.type, torch.bfloat16) if self._half else nullcontext():
                loss = self._loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.stack(losses).tolist()  # on a GPU: until all is done
        return tokens

    def _loss(self, batch: dict[str, Any]) -> Any:
        from fedlpp_ray.training import predictions, smoothed_loss

        if self._plain:
            placed = {name: tensor.to(self._device) for name, tensor in batch.items()}
            return self._model(**placed).loss
        logits, labels = predictions(self._model, batch, self._device)
        return smoothed_loss(logits, labels, 0.0)

    def _batches(self, number: int, client: int) -> Iterator[dict[str, Any]]:
        """Those of the client's `Training` in the round."""
        from fedlpp_ray.seeds import derive, generator
        from fedlpp_ray.tasks import collate, epoch_order

        examples, config = self._examples[client], self._experiment.client
        size = config.batch_size
        order = generator(derive(self._experiment.seed, "local", number, client), "order")
        queue: list[int] = []
        for _ in range(self._text.steps(client)):
            if not queue:
                queue = epoch_order(examples, size, order, by_length=config.group_by_length)
            chosen, queue = queue[:size], queue[size:]
            yield collate([examples[i] for i in chosen], self._text.pad)


def _ours(experiment: Any, text: Any, _: Any) -> Any:
    from fedlpp_ray.federation.emulation import load_client_base

    return load_client_base(experiment, text)


def _qlora(experiment: Any, text: Any, device: Any) -> Any:
    import torch
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from benchmarks.flower.settings import model_folder

    base = AutoModelForCausalLM.from_pretrained(
        model_folder(experiment),
        dtype=torch.bfloat16,
        device_map={"": device.type},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
    )
    base.config.use_cache = False
    base.config.pad_token_id = text.pad
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


def _serve(arguments: Sequence[str]) -> None:
    os.nice(NICENESS)
    from fedlpp_ray.config import load_experiment

    split = arguments.index("--")
    worker, workers, model = arguments[split + 1 :]
    experiment = load_experiment(arguments[0], list(arguments[1:split]))
    loop = Loop(experiment, int(worker), int(workers), model)
    print("ready 0", flush=True)
    for line in sys.stdin:
        print("tokens", loop.round(int(line)), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1:])
