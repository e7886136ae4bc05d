"""A learnt prompt before every text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import LogitsProcessor, LogitsProcessorList

from fedlpp_ray.seeds import generator

IGNORED = -100
"""The label, in transformers' losses, of a token that is not to be learnt."""


class Prompted(nn.Module):
    """A model that reads `tokens` learnt embeddings before every text.

    Prompt tuning (Lester et al., arXiv 2104.08691): the embeddings are the only thing trained in a
    frozen model, and begin as those of random words (their section 3.2). It computes what PEFT's
    PROMPT_TUNING computes: the prompt comes first, so an encoder that pools its first position
    pools the prompt's first token, which has read the text, instead of [CLS]. And it does what
    that cannot: the embeddings are those of new tokens of the vocabulary, so the model still sees
    token ids. With embeddings, a decoder would not know where a padded text ends, to classify
    there, and positions in generation would depend on the padding.

    Args:
        model: A frozen model.
        tokens: Length of the prompt.
        seed: Of the prompt's first values.
    """

    def __init__(self, model: nn.Module, tokens: int, seed: int) -> None:
        super().__init__()
        words: Any = model.get_input_embeddings()  # type: ignore[operator]
        self._known: int = words.num_embeddings
        chosen = torch.randint(self._known, (tokens,), generator=generator(seed, "prompt"))
        with torch.no_grad():
            start = words(chosen.to(words.weight.device)).clone()
        # Before the model, which has it too: a parameter is known by its first name.
        self.prompt_embeddings = nn.Parameter(start)
        self.base_model = model
        model.set_input_embeddings(_Vocabulary(words, self.prompt_embeddings))  # type: ignore[operator]
        self._generates = bool(model.can_generate())  # type: ignore[operator]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Any:
        """As the model; logits of tokens are those of the text. The prompt is of type 0."""
        inputs = self._prompted(input_ids, attention_mask)
        if token_type_ids is not None:
            inputs["token_type_ids"] = pad(token_type_ids, (len(self.prompt_embeddings), 0))
        if labels is not None and labels.dim() == 2:
            labels = pad(labels, (len(self.prompt_embeddings), 0), value=IGNORED)
        output = self.base_model(**inputs, labels=labels)
        if self._generates:
            output.logits = output.logits[:, len(self.prompt_embeddings) :]
        return output

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_processor: LogitsProcessorList | None = None,
        **options: Any,
    ) -> Tensor:
        """As the model: the text and what is written after it, without the prompt."""
        tokens = len(self.prompt_embeddings)
        written: Tensor = self.base_model.generate(  # type: ignore[operator]
            **self._prompted(input_ids, attention_mask),
            logits_processor=LogitsProcessorList(
                [_OfText(rule, tokens) for rule in logits_processor or []]
            ),
            **options,
        )
        return written[:, tokens:]

    def _prompted(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        tokens = len(self.prompt_embeddings)
        prompt = torch.arange(self._known, self._known + tokens, device=input_ids.device)
        return {
            "input_ids": torch.cat((prompt.expand(len(input_ids), -1), input_ids), 1),
            "attention_mask": pad(attention_mask, (tokens, 0), value=1),
        }

    def save(self, folder: Path, state: dict[str, Tensor]) -> None:
        """The files of a PEFT adapter: PEFT's names are `prompt_embeddings` and base_model.*."""
        config = peft.PromptTuningConfig(
            task_type=peft.TaskType.CAUSAL_LM if self._generates else peft.TaskType.SEQ_CLS,
            base_model_name_or_path=getattr(self.base_model.config, "_name_or_path", None),
            num_virtual_tokens=len(self.prompt_embeddings),
            token_dim=self.prompt_embeddings.shape[1],
            num_transformer_submodules=1,
            inference_mode=True,
        )
        config.save_pretrained(str(folder))
        safetensors.torch.save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})


class _Vocabulary(nn.Module):
    """Word embeddings, and after the last word those of the prompt."""

    def __init__(self, words: nn.Module, prompt: nn.Parameter) -> None:
        super().__init__()
        self.words, self.prompt = words, prompt

    def forward(self, ids: Tensor) -> Tensor:
        """ids (batch, tokens) to (batch, tokens, width)."""
        known: int = self.words.num_embeddings  # type: ignore[assignment]
        found: Tensor = self.words(ids.clamp(max=known - 1))
        prompt = self.prompt.to(found.dtype)[(ids - known).clamp(min=0)]
        return torch.where((ids >= known).unsqueeze(-1), prompt, found)


class _OfText(LogitsProcessor):  # type: ignore[misc]
    """A rule of decoding that does not see the prompt's tokens, which are no words."""

    def __init__(self, rule: Any, tokens: int) -> None:
        self._rule, self._tokens = rule, tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._rule(input_ids[:, self._tokens :], scores)  # type: ignore[no-any-return]
