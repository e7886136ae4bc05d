"""A tiny BERT, a tiny Llama and a tiny labelled text, made from nothing: what most tests run on.

`python -m tests.tiny FOLDER` writes them where a person can look at them.
"""

from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
)

TOPICS = {
    "animal": ["cat", "dog", "cow", "horse", "sheep"],
    "place": ["city", "river", "hill", "coast", "valley"],
    "number": ["one", "two", "seven", "many", "few"],
}
SPECIAL = ["[PAD]", "[UNK]", "[BOS]", "[EOS]"]
SIGNS = [".", ",", ":", "|", "user", "assistant", "system"]
KEY_VALUES = {"num_key_value_heads": 2, "intermediate_size": 128}
CHAT_TEMPLATE = (
    "{% for message in messages %}[BOS] {{ message.role }} : {{ message.content }} [EOS] "
    "{% endfor %}{% if add_generation_prompt %}[BOS] assistant : {% endif %}"
)
COMMON = ["the", "a", "of", "is", "what", "how", "where", "and", "with", "near"]


def make_model(
    folder: Path, *, hidden: int = 64, layers: int = 2, dropout: float = 0.1, seed: int = 0
) -> Path:
    """A random-init BERT with its tokenizer, as a Hugging Face folder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COMMON]
    words += [word for topic in TOPICS.values() for word in topic]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        num_hidden_layers=layers,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        max_position_embeddings=32,
    )
    BertForSequenceClassification(config).base_model.save_pretrained(folder)
    return folder


def make_decoder(folder: Path) -> Path:
    """A random-init Qwen2 whose tokenizer pads with one token and whose configuration names none.

    Qwen's own checkpoints are like that.
    """
    make_model(folder)
    words = BertTokenizerFast.from_pretrained(folder).backend_tokenizer
    for path in folder.iterdir():
        path.unlink()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=32,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    Qwen2Model(config).save_pretrained(folder)
    return folder


def make_generator(
    folder: Path,
    *,
    family: str = "llama",
    tied: bool = True,
    chat: bool = False,
    layers: int = 2,
    positions: int = 128,
) -> Path:
    """A random-init causal language model with its tokenizer.

    A word is a token, lower case; `SPECIAL` are the first four. Weights are drawn wide enough that
    what is written depends on every word before it.

    Args:
        folder: Where to.
        family: `model_type` of transformers: llama, gpt2, qwen2 or qwen3. AutoTokenizer takes
            every qwen2 tokenizer for Qwen's own byte pairs, so that one's words are lost.
        tied: Whether the language head is the embeddings.
        chat: Whether the tokenizer has `CHAT_TEMPLATE`.
        layers: Its depth.
        positions: Longest text, in tokens.
    """
    words = [*SPECIAL, *SIGNS, *COMMON, *(word for topic in TOPICS.values() for word in topic)]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), SPECIAL, strict=True)),
        chat_template=CHAT_TEMPLATE if chat else None,
    )
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(words),
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"n_inner": 128} if family == "gpt2" else KEY_VALUES),
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def make_writing(folder: Path, family: str) -> dict[str, object]:
    """A generation task on a model of `make_generator`, without dropout; its dotted keys."""
    model = make_generator(folder / "model", family=family)
    config = json.loads((model / "config.json").read_text())
    config |= {key: 0.0 for key in config if "pdrop" in key or "dropout" in key}
    (model / "config.json").write_text(json.dumps(config))
    draw = random.Random(0)
    rows = []
    for _ in range(200):
        word = draw.choice(draw.choice(list(TOPICS.values())))
        rows.append({"thing": f"{draw.choice(COMMON)} {word}", "says": f"a {word} is near"})
    return {
        "model.name": str(model),
        "task.name": "generation",
        "task.data": str(write_csv(folder / "data.csv", rows)),
        "task.prompt": "what is the {thing}",
        "task.target": "{says}",
        "task.held_out": 21,
        "task.max_length": 16,
        "generation.max_new_tokens": 6,
        "evaluation.batch_size": 6,
        "lora.rank": 4,
        "client.lr": 2e-2,
        "federation.clients": 4,
        "federation.client_fraction": 0.5,
        "federation.local_steps": 4,
    }


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts of a few words, one or two of which tell the label."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        label = rng.choice(list(TOPICS))
        words = rng.choices(COMMON, k=rng.randint(2, 6)) + rng.choices(TOPICS[label], k=2)
        rng.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    """Rows as a CSV file with a header."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json_lines(path: Path, rows: list[dict[str, str]]) -> Path:
    """Rows as one JSON object a line."""
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


if __name__ == "__main__":
    target = Path(sys.argv[1])
    make_model(target / "model")
    write_csv(target / "data.csv", make_rows(400))
