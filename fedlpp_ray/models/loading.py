"""Pretrained models and tokenizers from the hub, a folder, or an installed package."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging

from fedlpp_ray.assets import AssetError, check_sha256, files_identity, locate
from fedlpp_ray.config import ModelConfig
from fedlpp_ray.models import gguf
from fedlpp_ray.models.head import head_modules, within
from fedlpp_ray.models.linear import use_frozen_linears
from fedlpp_ray.seeds import global_seed


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer; one that has no padding token pads with its end token.

    Raises:
        AssetError: the model is missing, is not the expected one, has no tokenizer or one that
            cannot pad, or the hub cannot be reached.
    """
    with reading(config) as (name, options):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # Without tokenizer files transformers makes one up, which knows special tokens alone.
        raise AssetError(f"model.name = '{config.name}': it has no tokenizer files")
    if tokenizer.pad_token is None:  # decoders: padding is masked, so any token will do
        if tokenizer.eos_token is None:
            raise AssetError(
                f"model.name = '{config.name}': its tokenizer has neither a padding nor an end "
                "token; name one in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(config: ModelConfig, num_labels: int, pad: int, seed: int) -> torch.nn.Module:
    """The model W0 with a classification head, frozen, fp32, in evaluation mode.

    Parameters that the checkpoint lacks (the head) are drawn from `seed`, so that every process
    has the same ones; so is a head that the checkpoint has for another number of labels.

    Args:
        config: Which model.
        num_labels: Number of classes.
        pad: The tokenizer's padding token. A decoder classifies at the last token before it, and
            a checkpoint's own configuration may lack it or name another.
        seed: Of the new head.

    Raises:
        AssetError: as `load_tokenizer`; or weights of the backbone have other shapes than its
            configuration says.
    """
    return read_classifier(config, num_labels, pad, seed)[0]


def read_classifier(
    config: ModelConfig, num_labels: int, pad: int, seed: int, *, as_stored: bool = False
) -> tuple[torch.nn.Module, list[str]]:
    """As `load_classifier`, and the names of the parameters that were drawn from `seed`.

    Args:
        config, num_labels, pad, seed: As `load_classifier`.
        as_stored: Parameters are what the checkpoint has, in its dtype; those drawn are fp32.
    """
    with reading(config) as (name, options), quiet(), global_seed(seed, "model"):
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=num_labels,
            dtype="auto" if as_stored else torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    head = head_modules(model)
    mismatched = [key for key, *_ in loading["mismatched_keys"]]
    _check_shapes(config, [key for key in mismatched if not within(key, head)])
    drawn = sorted({*loading["missing_keys"], *mismatched})
    if as_stored:
        with global_seed(seed, "model"):
            _draw(model, drawn)
        _compute_buffers(model)
    return frozen(model, pad), drawn


def _draw(model: Any, names: Iterable[str]) -> None:
    """Draw parameters anew, in fp32; transformers draws what it has not marked."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        empty = torch.empty(getattr(module, leaf).shape, dtype=torch.float32)
        setattr(module, leaf, torch.nn.Parameter(empty))
        module._is_hf_initialized = False
    model.initialize_weights()


def load_generator(config: ModelConfig, pad: int, *, as_stored: bool = False) -> torch.nn.Module:
    """The causal language model W0 with its pretrained language head, frozen, fp32, in evaluation
    mode.

    Of the checkpoint's settings for decoding only the tokens that begin and end a text are kept:
    its temperature, lengths and forced tokens would otherwise decide what is written.

    Args:
        config: Which model.
        pad: The tokenizer's padding token.
        as_stored: Parameters are what the checkpoint has, in its dtype.

    Raises:
        AssetError: as `load_tokenizer`; or it is an encoder or an encoder-decoder; or its
            checkpoint lacks weights (a language head that is tied to the embeddings is there), or
            has other shapes than its configuration says.
    """
    with reading(config) as (name, options), quiet():
        check_causal(AutoConfig.from_pretrained(name, **options))
        model, loading = AutoModelForCausalLM.from_pretrained(
            name,
            dtype="auto" if as_stored else torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    _check_shapes(config, [key for key, *_ in loading["mismatched_keys"]])
    if missing := sorted(loading["missing_keys"]):
        raise AssetError(
            f"model.name = '{config.name}': its checkpoint lacks {', '.join(missing[:5])}, which "
            "generation needs trained; name a causal language model with its language head"
        )
    if as_stored:
        _compute_buffers(model)
    model.generation_config = decoding_of(model.generation_config, pad)
    return frozen(model, pad)


def _compute_buffers(model: Any) -> None:
    """Have buffers as in fp32: those that are computed were rounded to the checkpoint's dtype."""
    with init_empty_weights(include_buffers=False):
        computed = dict(type(model)._from_config(model.config, dtype=torch.float32).named_buffers())
    for path, module in model.named_modules():
        for leaf, own in module._buffers.items():
            if own is not None and own.is_floating_point():
                kept = leaf not in module._non_persistent_buffers_set
                name = f"{path}.{leaf}" if path else leaf
                module._buffers[leaf] = own.float() if kept else computed[name]


def decoding_of(own: GenerationConfig, pad: int) -> GenerationConfig:
    """What is kept of a checkpoint's settings for decoding."""
    return GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=pad
    )


def check_causal(outline: Any) -> None:
    """Refuse what transformers would load as a causal model although it reads both ways.

    Raises:
        ValueError: to be named by `reading`.
    """
    encoder = outline.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        outline, "is_decoder", False
    )
    known = outline.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if encoder or outline.is_encoder_decoder or not known:
        raise ValueError(
            f"'{outline.model_type}' is no causal language model, and generation needs one, for "
            "instance of the families of GPT-2, Llama or Qwen"
        )


def _check_shapes(config: ModelConfig, mismatched: list[str]) -> None:
    if mismatched:
        raise AssetError(
            f"model.name = '{config.name}': other shapes than its config.json says: "
            f"{', '.join(sorted(mismatched)[:5])}"
        )


def frozen(model: Any, pad: int) -> torch.nn.Module:
    """A model as all loaders return it."""
    model.config.pad_token_id = pad
    use_frozen_linears(model)
    return model.requires_grad_(False).eval()  # type: ignore[no-any-return]


def check_text(
    model: torch.nn.Module, config: ModelConfig, pad: int, max_length: int, tokens: int = 0
) -> None:
    """Refuse texts longer than the model has positions for, and a padding token it does not know.

    Args:
        model: The model, or its outline.
        config: Where it came from.
        pad: The tokenizer's padding token.
        max_length: Longest text, in tokens; of a generator, longest prompt plus longest answer.
        tokens: Length of a learnt prompt before each text.

    Raises:
        AssetError: naming the keys that give `max_length`, or the model.
    """
    # In RoBERTa and its like the first position is that after the padding token's number.
    reserved = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    positions = getattr(model.config, "max_position_embeddings", None) or -1
    if 0 < positions - sum(reserved) < max_length + tokens:
        generates = model.can_generate()  # type: ignore[operator]
        keys = "task.max_length" + " + generation.max_new_tokens" * generates
        keys += " + adapter.tokens" * bool(tokens)
        raise AssetError(
            f"{keys} = {max_length + tokens}: '{config.name}' has "
            f"{positions - sum(reserved)} positions"
        )
    known = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if pad >= known:
        raise AssetError(
            f"model.name = '{config.name}': its tokenizer pads with token {pad}, but it embeds "
            f"only {known} tokens"
        )


def model_identity(config: ModelConfig) -> object | None:
    """What tells the files of a model and its tokenizer from all others, for a cache.

    Files on this machine by path, size and times; those of the hub by their commit. None: nothing
    tells them.

    Raises:
        AssetError: as `load_tokenizer`.
    """
    with reading(config) as (name, options):
        if (path := Path(name)).exists():
            return files_identity(path)
        commit = getattr(AutoConfig.from_pretrained(name, **options), "_commit_hash", None)
        return None if commit is None else [name, commit]


@contextmanager
def reading(config: ModelConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where to load from and with which options; checks the file and names a failure."""
    path = locate(config.name)
    if path is None and config.sha256 is not None:
        raise AssetError(
            f"model.sha256 is checked on local folders and packages only, and '{config.name}' is "
            "a hub name: give model.sha256=null, and model.revision to pin a commit"
        )
    if path is not None and config.revision is not None:
        raise AssetError(
            f"model.revision = '{config.revision}' belongs to hub names; '{config.name}' is local"
        )
    packed = path is not None and path.suffix == gguf.SUFFIX
    if path is not None and config.sha256 is not None:
        check_sha256(path if packed else path / "model.safetensors", config.sha256)
    if path is not None and packed:
        with quiet():
            path = gguf.as_folder(path)
    try:
        yield (str(path), {}) if path else (config.name, {"revision": config.revision})
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise AssetError(f"model.name = '{config.name}': {error}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar, and no report of missing weights: they are expected, or refused in words."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
