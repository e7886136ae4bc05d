"""Writing text with a causal language model: beam search in batches, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedlpp_ray.config import GenerationConfig
from fedlpp_ray.models import no_repeat
from fedlpp_ray.training.group import ALONE, Group

Tokens = list[int]


def write(
    model: nn.Module,
    prompts: Sequence[Tokens],
    config: GenerationConfig,
    *,
    pad: int,
    stop: Sequence[int],
    batch_size: int,
    device: torch.device,
    group: Group = ALONE,
) -> list[Tokens]:
    """What the model writes after each prompt; the likeliest text that the search finds.

    Nothing is random. Prompts are written to in the order of their length, so that little is spent
    on padding, and returned in the order given.

    Args:
        model: A causal language model in evaluation mode.
        prompts: Token ids, at least one each.
        config: Beams, length and its penalty, and runs that may not be repeated.
        pad: Token id to pad with.
        stop: Token ids that end a text.
        batch_size: Prompts at a time; each takes `config.beams` rows.
        device: Where the model is.
        group: Ranks that share the batches; all of them write at the same time.

    Returns:
        The tokens written after each prompt, up to a stop token, which is left out.
    """
    search: dict[str, Any] = {}
    if config.beams > 1:
        search = {"length_penalty": config.length_penalty, "early_stopping": False}
        search["num_beams"] = config.beams
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def complete(chosen: Sequence[int]) -> list[Tokens]:
        inputs = {k: v.to(device) for k, v in pad_left([prompts[i] for i in chosen], pad).items()}
        length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            output = model.generate(  # type: ignore[operator]
                **inputs,
                do_sample=False,
                **search,
                max_new_tokens=config.max_new_tokens,
                pad_token_id=pad,
                eos_token_id=list(stop),
                logits_processor=no_repeat(config.no_repeat_ngram, length),
                synced_gpus=group.size > 1,  # who is done goes on until all ranks are
            )
        return [_until(tokens, stop) for tokens in output[:, length:].tolist()]

    texts = (text for chunk in group.map(complete, chunks) for text in chunk)
    written = dict(zip(order, texts, strict=True))
    return [written[i] for i in range(len(prompts))]


def pad_left(prompts: Sequence[Tokens], pad: int) -> dict[str, Tensor]:
    """input_ids and attention_mask (prompts, longest), int64: all end at the last column."""
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _until(tokens: Tokens, stop: Sequence[int]) -> Tokens:
    ends: Any = (i for i, token in enumerate(tokens) if token in stop)
    return tokens[: next(ends, len(tokens))]
