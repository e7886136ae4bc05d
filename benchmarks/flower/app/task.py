"""Model, data and local training of a client, from plain transformers and PEFT.

`config` is what the server sends with each message; `settings.app_config` makes it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
)

Config = Mapping[str, Any]
Batch = dict[str, torch.Tensor]


def get_model(config: Config) -> Any:
    """The pretrained model with LoRA; a causal model's base in bitsandbytes' nf4."""
    base: Any
    if config["labels"]:
        task = TaskType.SEQ_CLS
        base = AutoModelForSequenceClassification.from_pretrained(
            config["model"], num_labels=config["labels"], dtype=torch.float32
        )
    else:
        task = TaskType.CAUSAL_LM
        base = AutoModelForCausalLM.from_pretrained(
            config["model"],
            dtype=torch.float32,
            device_map={"": "cpu"},
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.float32,
            ),
        )
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    lora = LoraConfig(task_type=task, r=config["rank"], lora_alpha=config["alpha"])
    return get_peft_model(base, lora)


@cache
def load_shares(path: str) -> list[list[tuple[str, Any]]]:
    """Every client's pairs of a text and its label, or of a prompt and its target."""
    with open(path, encoding="utf-8") as file:
        found: list[list[tuple[str, Any]]] = json.load(file)
    return found


def load_data(client: int, config: Config) -> DataLoader[Any]:
    """A client's share, tokenized, in random batches padded to their longest text."""
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    share = load_shares(config["shares"])[client]
    encode = _labelled if config["labels"] else _prompted
    kind = DataCollatorWithPadding if config["labels"] else DataCollatorForSeq2Seq
    return DataLoader(
        encode(share, tokenizer, config),  # type: ignore[arg-type]
        batch_size=config["batch-size"],
        shuffle=True,
        collate_fn=kind(tokenizer),
    )


def _labelled(share: list[tuple[str, Any]], tokenizer: Any, config: Config) -> list[Any]:
    texts, labels = zip(*share, strict=True)
    found = tokenizer(list(texts), truncation=True, max_length=config["max-length"])
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(
            found["input_ids"], found["attention_mask"], labels, strict=True
        )
    ]


def _prompted(share: list[tuple[str, Any]], tokenizer: Any, config: Config) -> list[Any]:
    """Prompt, separator, target, end token; only the target and the end token are learnt."""
    prompts, targets = zip(*share, strict=True)
    asked = tokenizer(
        [f"{prompt}{config['separator']}" for prompt in prompts],
        truncation=True,
        max_length=config["max-length"],
    )["input_ids"]
    told = tokenizer(list(targets), truncation=True, max_length=config["max-new-tokens"] - 1)
    examples = []
    for prompt, target in zip(asked, told["input_ids"], strict=True):
        answer = [*target, tokenizer.eos_token_id]
        examples.append(
            {
                "input_ids": prompt + answer,
                "attention_mask": [1] * (len(prompt) + len(answer)),
                "labels": [-100] * len(prompt) + answer,
            }
        )
    return examples


def train(model: Any, loader: DataLoader[Any], config: Config) -> tuple[float, float]:
    """Make `local-steps` steps of AdamW.

    Returns:
        The mean loss, and the seconds of forward, backward and step, without collating batches.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, config["lr"], weight_decay=config["weight-decay"])
    model.train()
    batches, total, seconds = _endless(loader), 0.0, 0.0
    for _ in range(config["local-steps"]):
        batch = next(batches)
        start = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        seconds += time.perf_counter() - start
    return total / config["local-steps"], seconds


def _endless(loader: DataLoader[Any]) -> Iterator[Batch]:
    while True:
        yield from loader
