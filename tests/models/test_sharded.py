"""A model spread over ranks: what each holds, what it computes, and what is sent of it."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fedlpp_ray.assets import AssetError
from fedlpp_ray.cache import Pages
from fedlpp_ray.config import (
    ClientConfig,
    ConfigError,
    Experiment,
    LoraConfig,
    ModelConfig,
    ZeroConfig,
)
from fedlpp_ray.lora import ModelState, add_lora, merged
from fedlpp_ray.models import (
    Base,
    BaseParts,
    check_zero,
    gathered,
    head_modules,
    is_sharded,
    shard,
    share_base,
)
from fedlpp_ray.training import Group
from tests import tiny
from tests.ranks import WHOLE, Ranks

SPREAD = ZeroConfig(stage=3, **WHOLE)
CPU = torch.device("cpu")


def generator(folder: Path) -> Base:
    return Base(ModelConfig(name=str(folder), sha256=None), None, 0, seed=0)


def classifier(folder: Path) -> Base:
    return Base(ModelConfig(name=str(folder), sha256=None), 3, 0, seed=0)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    folder = tmp_path_factory.mktemp("models")
    tiny.make_model(folder / "bert")
    for family in ("llama", "gpt2"):
        tiny.make_generator(folder / family, family=family)
    return {
        "bert": classifier(folder / "bert"),
        "llama": generator(folder / "llama"),
        "gpt2": generator(folder / "gpt2"),
    }


def spread(base: Base, zero: ZeroConfig = SPREAD) -> Any:
    model, _ = base.load(as_stored=True)
    head = [] if base.classes is None else head_modules(model)
    return shard(model, zero, CPU, head)


def held(group: Group, base: Base) -> tuple[int, int, bool]:
    """Numbers that a rank holds of the spread part, its numbers in all, and whether it is let go.

    After a pass too.
    """
    model = spread(base)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    found = [p for p in model.parameters() if hasattr(p, "ds_id")]
    empty = all(p.numel() == 0 for p in found)
    return sum(p.ds_tensor.numel() for p in found), sum(p.ds_numel for p in found), empty


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_a_rank_holds_its_share_and_no_more_also_after_a_pass(
    bases: dict[str, Base], two: Ranks, family: str
) -> None:
    whole, drawn = bases[family].load()
    numbers = sum(p.numel() for name, p in whole.named_parameters() if name not in drawn)
    for own, total, empty in two.run(held, bases[family]):
        assert total == numbers
        assert total / 2 <= own <= total / 2 + len(list(whole.parameters()))  # rounded up, each
        assert empty


def values(group: Group, base: Base) -> dict[str, torch.Tensor]:
    """All tensors of a spread model, gathered."""
    model, found = spread(base), {}
    for path, module in model.named_modules():
        with gathered(module):
            for name, tensor in module.named_parameters(recurse=False):
                found[f"{path}.{name}"] = tensor.detach().clone()
    return found


@pytest.mark.parametrize("kind", ["classifier", "generator"])
def test_a_sharded_bf16_checkpoint_is_read_as_one_process_reads_it(
    two: Ranks, tmp_path: Path, kind: str
) -> None:
    """Also the head that it lacks, which is drawn from the seed in fp32."""
    if kind == "classifier":
        tiny.make_model(tmp_path)
        model, base = AutoModel.from_pretrained(tmp_path), classifier(tmp_path)
    else:
        tiny.make_generator(tmp_path)
        model, base = AutoModelForCausalLM.from_pretrained(tmp_path), generator(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    expected = dict(base.load()[0].named_parameters(remove_duplicate=False))
    for found in two.run(values, base):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], tensor), name


def kept_whole(group: Group, base: Base, name: str) -> dict[str, torch.dtype]:
    """Types of a spread model's tensors, one of whose modules stays whole, and of its parts."""
    model, _ = base.load(as_stored=True)
    shard(model, SPREAD, CPU, [name])
    made = BaseParts(base, model, ClientConfig(base_bits=4), [name])
    found = {n: p.dtype for n, p in model.named_parameters() if p.is_floating_point()}
    for number in range(len(made)):
        payload = made.part(number, make=group.rank == 0)
        if payload:
            found |= {f"part {n}": t.dtype for n, t in safetensors.torch.load(payload).items()}
    return found


def test_what_stays_whole_of_a_bf16_checkpoint_is_fp32_too(two: Ranks, tmp_path: Path) -> None:
    """It will be trained; and one tensor in bf16 would have the whole model compute in it."""
    tiny.make_generator(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    for found in two.run(kept_whole, generator(tmp_path), "model.norm"):
        floats = {name: dtype for name, dtype in found.items() if dtype.is_floating_point}
        assert set(floats.values()) == {torch.float32}


def test_computed_buffers_are_those_of_fp32_whatever_the_checkpoints_type(tmp_path: Path) -> None:
    """Gemma 3 multiplies its embeddings by the root of their width, a buffer."""
    tiny.make_generator(tmp_path)  # its tokenizer
    config = AutoConfig.for_model(
        "gemma3_text",
        vocab_size=40,
        hidden_size=40,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    base = generator(tmp_path)
    expected, found = (dict(base.load(as_stored=x)[0].named_buffers()) for x in (False, True))
    assert found.keys() == expected.keys()
    assert any("embed_scale" in name for name in found)
    for name, buffer in expected.items():
        assert found[name].dtype == buffer.dtype
        assert torch.equal(found[name], buffer), name


def parts(group: Group, base: Base, config: ClientConfig, zero: ZeroConfig) -> dict[str, Any]:
    model = spread(base, zero)
    made = BaseParts(base, model, config, [])
    found: dict[str, Any] = {}
    for number in range(len(made)):
        payload = made.part(number, make=group.rank == 0)
        if group.rank:
            assert payload == b""
        else:
            found |= safetensors.torch.load(payload)
    return found


FORMATS = {
    "dense": ClientConfig(),
    "nf4": ClientConfig(base_bits=4),
    "int2 of 16, double scales": ClientConfig(
        base_bits=2, base_kind="int", base_block=16, base_scale="double"
    ),
    "dequantized": ClientConfig(base_bits=4, dequantize_at_load=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_parts_are_the_base_that_a_client_would_make_of_the_checkpoint(
    bases: dict[str, Base], two: Ranks, family: str, form: str
) -> None:
    """Bit for bit, and the server's own base is as it was afterwards."""
    base, config = bases[family], FORMATS[form]
    found = two.run(parts, base, config, SPREAD)[0]
    own = share_base(base, config)
    expected = {**dict(own.named_parameters()), **dict(own.named_buffers())}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert two.run(parts, base, ClientConfig(), SPREAD)[0].keys() >= {
        name for name, _ in base.load()[0].named_parameters()
    }


def alive(group: Group, bases: list[Base]) -> list[bool]:
    """Of several models made one after the other in one process: which are still there."""
    seen = []
    for base in bases:
        model = spread(base)
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        seen.append(weakref.ref(model))
        del model
    gc.collect()
    return [each() is not None for each in seen]


def test_deepspeed_can_begin_again_and_again_and_keeps_no_model(
    bases: dict[str, Base], two: Ranks
) -> None:
    found = two.run(alive, list(bases.values()) * 2)
    assert found == [[False] * 6] * 2
    # And what was made last computes what it should.
    assert two.run(logits, bases["llama"])[0].equal(logits(Group(), bases["llama"]))


def logits(group: Group, base: Base) -> torch.Tensor:
    model = spread(base) if group.size > 1 else base.load()[0]
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def adapter(group: Group, base: Base) -> dict[str, Any]:
    """What a written adapter does, and what is read of one, on a spread base."""
    model = spread(base) if group.size > 1 else base.load()[0]
    adapted = add_lora(model, LoraConfig(rank=2), seed=1).eval()
    state = ModelState(adapted)
    first, found = state.read(), {}
    ids = torch.tensor([[5, 6, 7, 8]])

    def run() -> torch.Tensor:
        with torch.no_grad(), merged(adapted):
            return adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    found["shapes"] = {name: tuple(tensor.shape) for name, tensor in first.items()}
    found["spread"] = [name for name, module in adapted.named_modules() if is_sharded(module)]
    found["begin"] = run()
    draw = torch.Generator().manual_seed(0)
    other = {name: torch.randn(x.shape, generator=draw) / 4 for name, x in first.items()}
    state.write(other)
    found["written"] = run()
    found["read"] = all(torch.equal(tensor, other[name]) for name, tensor in state.read().items())
    with torch.no_grad():
        found["branches"] = adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    state.write(first)
    found["back"] = run()
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_are_whole_on_every_rank_and_what_is_written_is_used(
    bases: dict[str, Base], two: Ranks, family: str
) -> None:
    """Other systems read tensors of shape (0,), or write where only the optimizer looks."""
    alone = adapter(Group(), bases[family])
    for found in two.run(adapter, bases[family]):
        assert found["shapes"] == alone["shapes"]
        assert all(0 not in shape for shape in found["shapes"].values())
        assert found["spread"]
        assert not [name for name in found["spread"] if "lora_" in name]
        for name in ("begin", "written", "back"):
            assert torch.equal(found[name], alone[name])
        assert torch.equal(found["begin"], found["back"])
        assert not torch.allclose(found["written"], found["begin"], atol=1e-3)
        # One product with W0 + (alpha/r) B A, or the branches beside it: rounding alone differs.
        assert torch.allclose(found["branches"], found["written"], atol=1e-5)
        assert found["read"]


def kept_between_passes(group: Group, base: Base) -> tuple[float, float]:
    """MB of the model, and by how much a rank has grown between a forward and a backward pass."""
    few = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    model = spread(base, ZeroConfig(**SPREAD.model_dump(), stage3_prefetch_bucket_size=0, **few))
    adapted = add_lora(model, LoraConfig(rank=2), seed=1).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    for _ in range(2):  # in the first, what is used for the first time is made
        before = _anonymous()
        loss = adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum()
        grown = _anonymous() - before
        loss.backward()
    return sum(p.ds_numel for p in model.parameters() if hasattr(p, "ds_id")) * 4 / 2**20, grown


def _anonymous() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def test_no_layer_stays_gathered_between_its_forward_and_backward_pass(
    two: Ranks, tmp_path: Path
) -> None:
    """torch's linear function keeps the gathered weight: the whole model, when all have run."""
    tiny.make_generator(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.update({"hidden_size": 768, "intermediate_size": 2048, "head_dim": 192})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for size, grown in two.run(kept_between_passes, generator(tmp_path)):
        assert size > 40
        assert grown < size / 4


def tied(group: Group, base: Base) -> bool:
    model = spread(base)
    return model.lm_head.weight is model.model.embed_tokens.weight


def test_what_is_tied_is_one_tensor_when_spread(bases: dict[str, Base], two: Ranks) -> None:
    assert two.run(tied, bases["llama"]) == [True, True]


def test_deepspeed_judges_its_own_keys_before_anything_starts() -> None:
    check_zero(ZeroConfig(), "server.zero")
    check_zero(ZeroConfig(stage=3, offload_param={"device": "cpu"}), "server.zero")
    nvme = {"device": "nvme", "nvme_path": "/local_nvme"}
    check_zero(ZeroConfig(stage=3, offload_param=nvme), "server.zero")
    with pytest.raises(ConfigError, match=r"server\.zero: DeepSpeed says: stag3_param"):
        check_zero(ZeroConfig(stage=3, stag3_param_persistence_threshold=0), "server.zero")
    with pytest.raises(ConfigError, match=r"client\.zero: DeepSpeed says: offload_param.device"):
        check_zero(ZeroConfig(stage=3, offload_param={"device": "moon"}), "client.zero")
    with pytest.raises(ConfigError, match=r"server\.zero\.offload_param needs .*stage 2 or 3"):
        check_zero(ZeroConfig(offload_param={"device": "cpu"}), "server.zero")


def without_libaio(group: Group, base: Base) -> str:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    own, AsyncIOBuilder.is_compatible = AsyncIOBuilder.is_compatible, lambda *_, **__: False
    try:
        spread(base, ZeroConfig(stage=3, offload_param={"device": "nvme", "nvme_path": "/tmp"}))
    except AssetError as error:
        return str(error)
    finally:
        AsyncIOBuilder.is_compatible = own
    return "nothing was said"


def test_nvme_on_a_machine_that_cannot_is_refused_in_words(
    bases: dict[str, Base], two: Ranks
) -> None:
    for said in two.run(without_libaio, bases["llama"]):
        assert "libaio-dev" in said


def offloaded(group: Group, base: Base) -> torch.Tensor:
    model = spread(base, ZeroConfig(**SPREAD.model_dump(), offload_param={"device": "cpu"}))
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_offload_to_the_cpu_is_passed_through(bases: dict[str, Base], two: Ranks) -> None:
    expected = logits(Group(), bases["llama"])
    assert all(found.equal(expected) for found in two.run(offloaded, bases["llama"]))


def test_keys_of_deepspeed_come_from_yaml_and_from_dotted_overrides() -> None:
    values = {"server": {"zero": {"stage": 3, "offload_param": {"device": "cpu"}}}}
    experiment = Experiment.from_dict(values)
    assert experiment.server.zero.model_dump()["offload_param"] == {"device": "cpu"}
    again = experiment.with_values({"server.zero.stage3_prefetch_bucket_size": 7})
    assert again.server.zero.model_dump()["stage3_prefetch_bucket_size"] == 7
    assert again.server.zero.model_dump()["offload_param"] == {"device": "cpu"}
    with pytest.raises(ConfigError, match=r"server\.zero\.stage: allowed"):
        Experiment.from_dict({"server": {"zero": {"stage": 1}}})


def test_pages_that_were_let_go_are_read_again_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    written = torch.arange(1 << 20, dtype=torch.float32)
    safetensors.torch.save_file({"x": written}, path)
    mapped, own = safetensors.torch.load_file(path)["x"], written.clone()
    assert mapped.sum() == written.sum()
    pages, before = Pages(), _resident(path)
    pages.forget(mapped)
    assert _resident(path) < before / 4
    pages.forget(own)
    assert torch.equal(mapped, written)
    assert torch.equal(own, written)


def _resident(path: Path) -> int:
    """KiB of a mapped file in this process's memory."""
    inside, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
@pytest.mark.parametrize("called", [True, False])
def test_what_is_freed_goes_back_to_the_system(called: bool) -> None:
    """Without it the C library keeps pieces that are as large as layers."""
    code = """
import sys, torch
from fedlpp_ray.cache import return_large_blocks

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

if sys.argv[1] == "True":
    return_large_blocks()
torch.empty(30 << 20, dtype=torch.uint8)  # from now on glibc keeps blocks of this size
before, small, large = anonymous(), [], []
for _ in range(20):
    large.append(torch.ones(4 << 20, dtype=torch.uint8))
    small.append(torch.ones(120_000, dtype=torch.uint8))  # stays, between two that go
large.clear()
print(anonymous() - before)
"""
    command = [sys.executable, "-c", code, str(called)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = int(done.stdout) >> 10
    assert grown < 20 if called else grown > 40
