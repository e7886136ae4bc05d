"""Gradient inversion by spans, on a LoRA layer whose inputs are known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fedlpp_ray.privacy import (
    Gradient,
    Inversion,
    PrivacyError,
    clip_factor,
    gradient_of_step,
    measure_inversion,
    measure_scores,
    row_space,
    span_distances,
    spans_of_a,
    spans_of_b,
    token_distances,
)
from fedlpp_ray.privacy.dp import clipped, norm
from fedlpp_ray.quantization import Bits, Quantizer
from fedlpp_ray.state import State

VOCABULARY, WIDTH, OUT, RANK = 500, 64, 48, 8


class Layer:
    """h = W0 x + s B A x of a batch of tokens, with random gradients of h.

    Attributes:
        words: (vocabulary, 1, width) the input that each token makes.
        a, b: The factors.
        da, db: The gradients of a loss.
    """

    def __init__(self, tokens: int, *, zero_b: bool = False, layers: int = 1) -> None:
        random = torch.Generator().manual_seed(tokens)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random)

        self.words = normal(VOCABULARY, 1, WIDTH)
        self.present = torch.randperm(VOCABULARY, generator=random)[:tokens].tolist()
        x = self.words[self.present, 0]
        self.a, self.b = normal(layers, RANK, WIDTH), normal(layers, OUT, RANK)
        self.b *= not zero_b
        g = normal(layers, tokens, OUT)
        self.da = [b.T @ each.T @ x for b, each in zip(self.b, g, strict=True)]
        self.db = [each.T @ (x @ a.T) for a, each in zip(self.a, g, strict=True)]

    def by_a(self, gradients: Sequence[Tensor] | None = None, noise: float = 0.0) -> Inversion:
        gradients = self.da if gradients is None else gradients
        spans = spans_of_a([Gradient(each, noise) for each in gradients])
        return measure_inversion(spans, token_distances(spans, self.words), self.present)

    def by_b(self) -> Inversion:
        spans = spans_of_b([Gradient(each) for each in self.db], list(self.a))
        return measure_inversion(spans, token_distances(spans, self.words), self.present)


def sent(tensor: Tensor, bits: Bits) -> Tensor:
    return Quantizer(bits).quantize(tensor).dequantize()


@pytest.mark.parametrize("tokens", [1, 5, RANK])
def test_up_to_as_many_tokens_as_the_rank_are_read_off_a(tokens: int) -> None:
    found = Layer(tokens).by_a()
    assert (found.precision, found.recall, found.informed, found.auc) == (1, 1, 1, 1)
    assert (found.rank, found.full_rank) == (tokens, RANK)
    assert (found.tokens, found.accepted, found.candidates) == (tokens, tokens, VOCABULARY)


@pytest.mark.parametrize("tokens", [1, 5, RANK - 1])
def test_fewer_tokens_than_the_rank_are_read_off_b_even_where_b_is_zero(tokens: int) -> None:
    layer = Layer(tokens, zero_b=True)
    blind = layer.by_a()
    assert (blind.accepted, blind.recall, blind.auc, blind.rank) == (0, 0, 0.5, 0)
    assert blind.precision is None
    found = layer.by_b()
    assert (found.recall, found.informed, found.auc, found.rank) == (1, 1, 1, tokens)
    if tokens < RANK - 1:  # with one dimension left, chance brings others near
        assert found.precision == 1


@pytest.mark.parametrize("tokens", [RANK + 1, 2 * RANK, 40])
def test_more_tokens_than_the_rank_do_not_lie_in_the_rows_of_a(tokens: int) -> None:
    found = Layer(tokens).by_a()
    assert (found.accepted, found.recall) == (0, 0)
    assert found.rank == found.full_rank == RANK
    assert found.informed > 0.6  # but they lean towards them: by chance it is tokens / 500


@pytest.mark.parametrize("tokens", [RANK, 2 * RANK])
def test_with_as_many_tokens_as_the_rank_the_span_of_b_is_everything(tokens: int) -> None:
    found = Layer(tokens).by_b()
    assert (found.accepted, found.recall) == (VOCABULARY, 1)
    assert found.precision == tokens / VOCABULARY
    assert found.rank == found.full_rank


def test_several_matrices_of_one_input_span_more_together() -> None:
    tokens = RANK + 4
    one, two = Layer(tokens).by_a(), Layer(tokens, layers=2).by_a()
    assert one.recall == 0
    assert (two.precision, two.recall, two.rank, two.full_rank) == (1, 1, tokens, 2 * RANK)


def test_one_matrix_is_not_lost_beside_a_far_larger_one() -> None:
    layer = Layer(RANK + 4, layers=2)
    assert layer.by_a([layer.da[0] * 1e6, layer.da[1]]).recall == 1


def test_tokens_of_a_quantized_update_do_not_pass_but_are_nearest() -> None:
    layer = Layer(5)
    found: dict[Bits, Inversion] = {}
    for bits in (2, 4, 8):
        quantized = sent(layer.da[0], bits)
        noise = float((quantized - layer.da[0]).square().mean().sqrt())
        found[bits] = layer.by_a([quantized])
        assert found[bits].rank == RANK  # its errors fill the span
        assert layer.by_a([quantized], noise).rank <= 5  # known as noise, they do not count
    assert [found[bits].recall for bits in (2, 4, 8)] == [0, 0, 1]
    assert [found[bits].informed for bits in (2, 4, 8)] == [1, 1, 1]  # the nearest are theirs yet


def test_noise_as_large_as_the_clipped_update_leaves_nothing() -> None:
    """The Gaussian mechanism: clipped to norm 1, noise of standard deviation 1 on each entry."""
    layer = Layer(5)
    random = torch.Generator().manual_seed(0)
    clipped = layer.da[0] / layer.da[0].norm()
    noised = clipped + torch.randn(clipped.shape, generator=random)
    found = layer.by_a([noised])
    assert (found.accepted, found.informed) == (0, 0)
    assert 0.2 < found.auc < 0.8
    slight = layer.by_a([clipped + 1e-7 * (noised - clipped)])
    assert slight.recall == 1


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_sgd_gives_the_gradient_back_and_adamw_its_signs(weight_decay: float) -> None:
    torch.manual_seed(0)
    begin, gradient = torch.randn(6, 9).double(), torch.randn(6, 9).double()
    gradient[0, 0] = 0
    found = {}
    for name, kind in {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}.items():
        weight = torch.nn.Parameter(begin.clone())
        weight.grad = gradient.clone()
        kind([weight], lr=0.1, weight_decay=weight_decay).step()
        u = (weight - begin).detach()
        found[name] = gradient_of_step(
            u, begin, lr=0.1, weight_decay=weight_decay, optimizer=name
        ).values
    torch.testing.assert_close(found["sgd"], gradient)
    assert torch.equal(found["adamw"], gradient.sign())


def test_the_noise_of_a_gradient_is_what_rounding_and_the_uplink_make() -> None:
    random = torch.Generator().manual_seed(0)
    begin, gradient = torch.randn(2, 64, 256, generator=random)
    after = begin - 0.1 * gradient
    found = gradient_of_step(after - begin, begin, lr=0.1, weight_decay=0)
    error = float((found.values - gradient.double()).square().mean().sqrt())
    assert error < found.noise < 6 * error
    u = -0.1 * gradient
    coarse = sent(u, 4)
    share = float((coarse - u).norm() / u.norm())
    found = gradient_of_step(coarse, begin, lr=0.1, weight_decay=0, error=share)
    error = float((found.values - gradient.double()).square().mean().sqrt())
    assert found.noise == pytest.approx(error, rel=0.05)


OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


class Step:
    """One step in fp32 on a layer's A and B, and the same shortened by a clip.

    Attributes:
        begin: What it starts from.
        clipped: The update, `factor` times as long.
        known: Of `clip_factor` and `gradient_of_step`.
    """

    def __init__(self, layer: Layer, optimizer: str, factor: float, **whole: Tensor) -> None:
        self.begin: State = {"A": layer.a[0], "B": layer.b[0]}
        gradients = {"A": layer.da[0], "B": layer.db[0]} | whole
        torch.manual_seed(0)
        self.begin |= {name: torch.randn_like(tensor) for name, tensor in whole.items()}
        self.known = {"lr": 0.1, "weight_decay": 0.01, "optimizer": optimizer}
        weights = {n: torch.nn.Parameter(t.clone()) for n, t in self.begin.items()}
        for name, weight in weights.items():
            weight.grad = gradients[name].clone()
        OPTIMIZERS[optimizer](weights.values(), lr=0.1, weight_decay=0.01).step()
        free = {n: (w - self.begin[n]).detach() for n, w in weights.items()}
        self.clipped = clipped(free, factor * norm(free))

    def factor(self, **known: float) -> float:
        return clip_factor(self.clipped, self.begin, **self.known | known)  # type: ignore[arg-type]

    def gradient(self, name: str, **known: float) -> Gradient:
        given = self.known | known
        return gradient_of_step(self.clipped[name], self.begin[name], **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [1.0, 0.3, 1e-3])
@pytest.mark.parametrize("zero_b", [False, True])
def test_a_clip_does_not_hide_the_signs_of_adamw(zero_b: bool, factor: float) -> None:
    """Also where half of the gradient is zero, and weight decay alone moves A."""
    layer = Layer(5, zero_b=zero_b)
    step = Step(layer, "adamw", factor)
    found = step.factor()
    assert found == pytest.approx(factor, rel=1e-4)
    for name, gradient in (("A", layer.da[0]), ("B", layer.db[0])):
        assert torch.equal(step.gradient(name, factor=found).values, gradient.sign())


@pytest.mark.parametrize("factor", [1.0, 0.3, 1e-3])
@pytest.mark.parametrize("zero_b", [False, True])
def test_a_clip_does_not_hide_the_rank_of_a_step_of_sgd_with_weight_decay(
    zero_b: bool, factor: float
) -> None:
    layer = Layer(2, zero_b=zero_b)
    step = Step(layer, "sgd", factor)
    found = step.factor()
    assert found == pytest.approx(factor, rel=1e-3)
    a, b = (step.gradient(name, factor=found) for name in "AB")
    assert len(row_space([a])) == (0 if zero_b else 2)
    assert len(row_space([b])) == 2
    spans = spans_of_b([b], [layer.a[0]])
    seen = measure_inversion(spans, token_distances(spans, layer.words), layer.present)
    assert (seen.recall, seen.precision) == (1, 1)
    if factor < 1:
        assert len(row_space([step.gradient("A")])) == RANK  # its decay in full is not its decay


def test_a_head_whose_rows_add_up_to_zero_tells_the_clip_where_the_factors_do_not() -> None:
    """Of a softmax they do; 40 tokens fill both spans."""
    layer = Layer(40)
    head = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    with pytest.raises(PrivacyError, match=r"dp\.clip with client\.weight_decay.*weight_decay 0"):
        Step(layer, "sgd", 0.3).factor()
    with pytest.raises(PrivacyError, match="no gradient of less than full rank"):
        Step(layer, "sgd", 0.3, head=head).factor()
    step = Step(layer, "sgd", 0.3, head=head - head.mean(0))
    assert step.factor() == pytest.approx(0.3, rel=1e-3)


def test_without_weight_decay_or_with_more_noise_a_clip_changes_the_scale_alone() -> None:
    step = Step(Layer(40), "sgd", 0.3)
    assert step.factor(weight_decay=0.0) == 1
    assert step.factor(noise=0.1) == 1


def test_a_matrix_whose_decay_is_within_its_errors_says_nothing_of_the_clip() -> None:
    """Any f would pass there."""
    step = Step(Layer(40), "sgd", 0.3)
    for name in "AB":
        step.begin[f"{name} small"] = 1e-4 * step.begin[name]
        step.clipped[f"{name} small"] = 1e-6 * torch.randn_like(step.begin[name])
    with pytest.raises(PrivacyError, match="no gradient of less than full rank"):
        step.factor(noise=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_clients_noise_is_in_that_of_the_gradient(optimizer: str) -> None:
    """Of standard deviation std / (f lr); a twentieth of what it is of, it leaves the rank."""
    layer = Layer(2)
    step = Step(layer, optimizer, 0.3)
    std = 0.05 * float(step.clipped["B"].square().mean().sqrt())
    quiet = step.gradient("B", factor=0.3, optimizer="sgd")  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(0)
    for name, tensor in step.clipped.items():
        step.clipped[name] = tensor + std * torch.randn(tensor.shape, generator=random)
    loud = step.gradient("B", factor=0.3, noise=std, optimizer="sgd")  # type: ignore[arg-type]
    error = float((loud.values - quiet.values).square().mean().sqrt())
    assert loud.noise == pytest.approx(error, rel=0.1)
    if optimizer == "sgd":
        assert len(row_space([loud])) == 2


def test_signs_alone_do_not_span_the_inputs() -> None:
    layer = Layer(5)
    found = layer.by_a([layer.da[0].sign()])
    assert (found.recall, found.rank) == (0, RANK)
    assert found.informed == 1  # though they lean towards them


def test_distances_by_hand() -> None:
    rows = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [3.0, 1.0, 0.0]])
    basis = row_space([Gradient(rows)])
    assert basis.shape == (2, 3)
    inputs = torch.tensor([[5.0, -7, 0], [0, 0, 2], [3, 0, 4], [0, 0, 0]])
    assert span_distances(basis, inputs).tolist() == pytest.approx([0, 1, 0.8, 1])
    assert span_distances(basis[:0], inputs).tolist() == [1, 1, 1, 1]
    assert span_distances(torch.eye(3), inputs).tolist() == [0, 0, 0, 0]


def test_a_token_is_as_near_as_at_its_best_position() -> None:
    spans = spans_of_a([Gradient(torch.tensor([[1.0, 0.0, 0.0]]))])
    inputs = torch.tensor([[[0.0, 1, 0], [2, 0, 0]], [[0, 0, 1], [3, 4, 0]]])
    assert token_distances(spans, inputs).tolist() == pytest.approx([0, 0.8])
    found = measure_inversion(spans, token_distances(spans, inputs), {0})
    assert (found.recall, found.precision, found.informed) == (1, 1, 1)


def test_a_span_that_is_everything_does_not_hide_what_another_tells() -> None:
    telling, everything = (spans_of_a([Gradient(torch.eye(3)[:rows])])[0] for rows in (1, 3))
    inputs = torch.tensor([[[2.0, 0, 0]], [[3, 4, 0]]])
    for spans in ([telling, everything], [everything, telling]):
        assert token_distances(spans, inputs).tolist() == pytest.approx([0, 0.8])
    assert token_distances([everything, everything], inputs).tolist() == [0, 0]


def test_ties_among_the_nearest_count_as_drawn_by_chance() -> None:
    spans = spans_of_a([Gradient(torch.ones(1, 3))])
    found = measure_inversion(spans, torch.tensor([0.1, 0.5, 0.5, 0.5, 0.9]), {0, 1})
    assert found.informed == pytest.approx((1 + 1 / 3) / 2)
    assert (
        found.auc
        == measure_scores(
            -torch.tensor([0.1, 0.5]).numpy(), -torch.tensor([0.5, 0.5, 0.9]).numpy()
        ).auc
    )


def test_an_update_that_is_not_finite_is_refused() -> None:
    with pytest.raises(PrivacyError, match="not finite"):
        gradient_of_step(torch.tensor([float("nan")]), torch.zeros(1), lr=1, weight_decay=0)
    with pytest.raises(PrivacyError, match="not finite"):
        clip_factor(
            {"A": torch.full((2, 3), torch.nan)}, {"A": torch.ones(2, 3)}, lr=1, weight_decay=0.1
        )
