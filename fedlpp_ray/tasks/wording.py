"""How a prompt and its target become tokens of a causal language model."""

from __future__ import annotations

from typing import Any

import torch

from fedlpp_ray.config import GenerationConfig
from fedlpp_ray.tasks.batches import IGNORED, Encoded, Label
from fedlpp_ray.tasks.examples import Prompts, TaskError


class Wording:
    """Prompts and targets in the words of one tokenizer.

    A text is [start token] prompt separator target [end token], or a user's message and its answer
    by the tokenizer's chat template. Prompt and target are cut into tokens apart, so that the
    prompt has the same tokens in training as when the model is to write.

    Args:
        tokenizer: Fast, with an end token.
        config: Separator or template, and how long a target may be.
        max_length: Longest prompt, in tokens, with all that surrounds it. What is too long is cut
            at the end of the prompt itself, never in the separator or the template.

    Attributes:
        stop: Ids of the tokens that end a text.

    Raises:
        TaskError: the tokenizer has no end token or no chat template, or its template does not go
            on from a prompt or does not end an answer, or `max_length` has no room for a prompt.
    """

    def __init__(self, tokenizer: Any, config: GenerationConfig, max_length: int) -> None:
        self._tokenizer, self._config = tokenizer, config
        if config.chat_template and tokenizer.chat_template is None:
            raise TaskError(
                "generation.chat_template: the model's tokenizer has no chat template; allowed: "
                "false"
            )
        if tokenizer.eos_token_id is None:
            raise TaskError("the model's tokenizer has no end token (eos_token): it cannot stop")
        self._start = _start_tokens(tokenizer)
        self._around = len(self._ask(""))
        self._room = max_length - self._around
        if self._room < 1:
            raise TaskError(
                f"task.max_length = {max_length}: what surrounds a prompt alone is {self._around} "
                "tokens"
            )
        # A template may end an answer with another token than the tokenizer's end token.
        last, other = self._answer("a", "b")[-1], self._answer("a", "c")[-1]
        if last != other:
            raise TaskError(
                "generation.chat_template: the tokenizer's template puts no end token after an "
                "answer; allowed: false"
            )
        self.stop = sorted({tokenizer.eos_token_id, last})

    def prompt(self, text: str) -> list[int]:
        """The tokens after which the model is to write; at most `max_length`."""
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in found["offset_mapping"][: self._room]]
        asked = self._ask(text if len(found["input_ids"]) <= self._room else text[: ends[-1]])
        while len(asked) > self._room + self._around and ends:
            # Some tokens are parts of one letter, and a cut text may be cut otherwise.
            ends.pop()
            asked = self._ask(text[: ends[-1]] if ends else "")
        return asked

    def target(self, prompt: str, text: str) -> list[int]:
        """The tokens to write, the end token included; at most `max_new_tokens`."""
        return self._answer(prompt, text)[: self._config.max_new_tokens]

    def read(self, tokens: list[int]) -> str:
        """What a model has written, without special tokens and without space around it."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def encode(self, examples: Prompts) -> Encoded:
        """Each reference after its prompt, unpadded; the labels of prompt tokens are IGNORED."""
        encoded: list[tuple[torch.Tensor, Label]] = []
        for prompt, references in zip(examples.prompts, examples.references, strict=True):
            asked = self.prompt(prompt)
            for reference in references:
                target = self.target(prompt, reference)
                labels = [IGNORED] * len(asked) + target
                encoded.append((torch.tensor(asked + target), torch.tensor(labels)))
        return encoded

    def _ask(self, prompt: str) -> list[int]:
        if self._config.chat_template:
            return self._ids(self._chat(prompt))
        return self._start + self._ids(prompt + self._config.separator)

    def _answer(self, prompt: str, target: str) -> list[int]:
        if not self._config.chat_template:
            return [*self._ids(target), self._tokenizer.eos_token_id]
        asked, whole = self._chat(prompt), self._chat(prompt, target)
        if not whole.startswith(asked):
            raise TaskError(
                "generation.chat_template: the tokenizer's template words a conversation with an "
                "answer in another way than one that awaits it; allowed: false"
            )
        return self._ids(whole[len(asked) :].rstrip())

    def _chat(self, prompt: str, answer: str | None = None) -> str:
        messages = [{"role": "user", "content": prompt}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        return str(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer is None
            )
        )

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _start_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text (Llama a start token, GPT-2 nothing)."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    before = range(len(whole) - len(bare) + 1)
    found = (list(whole[:i]) for i in before if whole[i : i + len(bare)] == bare)
    start = next(found, None)
    if start is None:
        raise TaskError("the model's tokenizer words a text otherwise beside special tokens")
    return start
