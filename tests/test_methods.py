"""Aggregation methods against the dense sum of (alpha / r_i) B_i A_i, and the field's mistakes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlpp_ray.aggregation import (
    METHODS,
    Method,
    Plan,
    Return,
    RoundSum,
    find_method,
    make_optimizer,
)
from fedlpp_ray.aggregation.products import Product, combine, norm, pad, product, rank_of, truncate
from fedlpp_ray.errors import UserError
from fedlpp_ray.state import State, layers_of, name_of, part, schema_of, state_digest

LAYERS = {"model.one": (7, 5), "model.two": (4, 9)}
ALPHA = 6.0
RANK = 3


def random_state(seed: int, rank: int = RANK, scale: float = 1.0) -> State:
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for layer, (d_out, d_in) in LAYERS.items():
        state[name_of(layer, "A")] = scale * torch.randn(rank, d_in, generator=generator)
        state[name_of(layer, "B")] = scale * torch.randn(d_out, rank, generator=generator)
    state["head.weight"] = torch.randn(3, 4, generator=generator)
    return dict(sorted(state.items()))


def with_residuals(state: State) -> State:
    zeros = {name_of(layer, "residual"): torch.zeros(LAYERS[layer]) for layer in LAYERS}
    return dict(sorted((state | zeros).items()))


def dense(state: State, layer: str) -> Tensor:
    """What a model of this state adds to its weights, (alpha / r) (B A + residual), float64."""
    total = state[name_of(layer, "B")].double() @ state[name_of(layer, "A")].double()
    total = total + state.get(name_of(layer, "residual"), torch.zeros(LAYERS[layer])).double()
    return ALPHA / rank_of(state) * total


def run(
    name: str,
    state: State,
    clients: list[State],
    weights: list[float],
    *,
    rule: str = "residual",
    lr: float = 1.0,
    broadcast: State | None = None,
) -> State:
    """One round in which client i starts from the broadcast cut to its rank and returns states."""
    method = find_method(name)
    broadcast = state if broadcast is None else broadcast
    returns = []
    for client, weight in zip(clients, weights, strict=True):
        received = truncate(broadcast, rank_of(client))
        trained = method.trained(1) & method.travels
        update = {n: client[n] - received[n] for n in client if part(n) in trained}
        returns.append(Return(pad(received, RANK), pad(update, RANK), weight))
    return fold(method, state, broadcast, returns, rule=rule, lr=lr)


def fold(
    method: Method,
    state: State,
    broadcast: State,
    returns: list[Return],
    *,
    rule: str = "residual",
    lr: float = 1.0,
    planned: int | None = None,
) -> State:
    """The next state from the returns of clients 0, 1, ..."""
    schema = schema_of(returns[0].update)
    total = RoundSum(Plan(method, schema, broadcast, rule, lr, planned or len(returns)))
    for client, each in enumerate(returns):
        total.add(client, each)
    optimizer = make_optimizer("fedavg", schema_of(state), lr=lr)
    return total.next_state(state, broadcast, optimizer, torch.Generator())


WEIGHTS = st.lists(st.floats(0.1, 1), min_size=1, max_size=4).map(
    lambda drawn: [w / sum(drawn) for w in drawn]
)
SEEDS = st.integers(0, 10**6)


@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
@pytest.mark.parametrize("rule", ["residual", "replace", "pull"])
@settings(max_examples=15, deadline=None)
@given(weights=WEIGHTS, seed=SEEDS)
def test_methods_that_write_the_base_are_exact(
    name: str, rule: str, weights: list[float], seed: int
) -> None:
    clients = [random_state(seed + i) for i in range(len(weights))]
    after = run(name, with_residuals(random_state(seed + 99)), clients, weights, rule=rule)
    for layer in LAYERS:
        expected = sum(w * dense(c, layer) for c, w in zip(clients, weights, strict=True))
        torch.testing.assert_close(dense(after, layer), expected, atol=1e-4, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(weights=WEIGHTS, seed=SEEDS, ranks=st.lists(st.integers(1, RANK), min_size=4, max_size=4))
def test_flora_is_exact_at_any_mixture_of_ranks(
    weights: list[float], seed: int, ranks: list[int]
) -> None:
    """With the scale alpha / r_i of each client; the server starts from B = 0, as FLoRA does."""
    clients = [random_state(seed + i, rank) for i, rank in zip(range(len(weights)), ranks)]  # noqa: B905
    start = with_residuals(random_state(seed + 99))
    start |= {name_of(layer, "B"): torch.zeros(LAYERS[layer][0], RANK) for layer in LAYERS}
    after = run("flora", start, clients, weights)
    for layer in LAYERS:
        expected = sum(w * dense(c, layer) for c, w in zip(clients, weights, strict=True))
        torch.testing.assert_close(dense(after, layer), expected, atol=1e-4, rtol=1e-5)
        assert not after[name_of(layer, "B")].any()
        bound = 1 / math.sqrt(LAYERS[layer][1])
        assert after[name_of(layer, "A")].abs().max() <= bound
        assert not torch.equal(after[name_of(layer, "A")], start[name_of(layer, "A")])


@settings(max_examples=15, deadline=None)
@given(weights=WEIGHTS, seed=SEEDS)
def test_ffa_lora_is_exact_with_one_a_for_all(weights: list[float], seed: int) -> None:
    start = random_state(seed + 99)
    shared = {n: t for n, t in start.items() if part(n) == "A"}
    clients = [random_state(seed + i) | shared for i in range(len(weights))]
    after = run("ffa-lora", start, clients, weights)
    for layer in LAYERS:
        expected = sum(w * dense(c, layer) for c, w in zip(clients, weights, strict=True))
        torch.testing.assert_close(dense(after, layer), expected, atol=1e-4, rtol=1e-5)


def test_rolora_alternates_and_moves_only_what_was_trained() -> None:
    rolora = find_method("rolora")
    assert [rolora.trained(r) for r in (1, 2, 3)] == [
        {"B", "head"},
        {"A", "head"},
        {"B", "head"},
    ]
    start, client = random_state(0), random_state(1)
    after = run("rolora", start, [client], [1.0], rule="replace", broadcast=random_state(2))
    for name in start:
        expected = start if part(name) == "A" else client
        torch.testing.assert_close(after[name], expected[name], atol=1e-6, rtol=0)


@settings(max_examples=15, deadline=None)
@given(weights=WEIGHTS, seed=SEEDS, ranks=st.lists(st.integers(1, RANK), min_size=4, max_size=4))
def test_flexlora_is_the_best_approximation_of_the_dense_mean(
    weights: list[float], seed: int, ranks: list[int]
) -> None:
    clients = [random_state(seed + i, rank) for i, rank in zip(range(len(weights)), ranks)]  # noqa: B905
    after = run("flexlora", random_state(seed + 99), clients, weights, rule="pull")
    for layer in LAYERS:
        mean = sum(w * dense(c, layer) for c, w in zip(clients, weights, strict=True))
        assert isinstance(mean, Tensor)
        s = torch.linalg.svdvals(mean)
        error = torch.linalg.norm(dense(after, layer) - mean)
        assert error.item() == pytest.approx(s[RANK:].norm().item(), abs=1e-4)
        # What a client of a smaller rank receives is the best of its rank, in its own scale.
        for rank in range(1, RANK + 1):
            error = torch.linalg.norm(dense(truncate(after, rank), layer) - mean)
            assert error.item() == pytest.approx(s[rank:].norm().item(), abs=1e-4)
        b, a = after[name_of(layer, "B")], after[name_of(layer, "A")]
        torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1), atol=1e-4, rtol=1e-4)


def test_hetlora_weights_by_norm_and_dilutes_what_few_have() -> None:
    one, two = random_state(1, 2), random_state(2, 3)
    after = run("hetlora", random_state(0), [one, two], [0.9, 0.1])
    norms = [
        math.sqrt(sum(float((dense(c, x)).square().sum()) for x in LAYERS)) for c in (one, two)
    ]
    weights = [n / sum(norms) for n in norms]
    for name in after:
        if part(name) == "head":
            expected = weights[0] * one[name] + weights[1] * two[name]
        else:
            axis = 0 if part(name) == "A" else 1
            grown = torch.cat([one[name], torch.zeros_like(one[name]).narrow(axis, 0, 1)], axis)
            # alpha / 2 at the client is alpha / 3 at the server with factors sqrt(3 / 2) as large.
            expected = weights[0] * grown * math.sqrt(3 / 2) + weights[1] * two[name]
        torch.testing.assert_close(after[name], expected, atol=1e-5, rtol=1e-5)


def test_lora_fair_minimises_its_objective_and_is_nearer_than_fedit() -> None:
    clients, weights = [random_state(i) for i in range(3)], [0.5, 0.3, 0.2]
    start = random_state(99)
    fedit, fair = (run(name, start, clients, weights) for name in ("fedit", "lora-fair"))
    for layer in LAYERS:
        mean = sum(w * dense(c, layer) for c, w in zip(clients, weights, strict=True))
        assert (dense(fair, layer) - mean).norm() < (dense(fedit, layer) - mean).norm()
        a = fair[name_of(layer, "A")].double()
        assert torch.equal(a, fedit[name_of(layer, "A")].double())
        base = fedit[name_of(layer, "B")].double()
        moved = (fair[name_of(layer, "B")].double() - base).requires_grad_()
        goal = mean * RANK / ALPHA
        mu = 0.01 * (a @ a.T).diagonal().mean()
        loss = (goal - (base + moved) @ a).square().sum() + mu * moved.square().sum()
        (gradient,) = torch.autograd.grad(loss, moved)
        assert gradient.abs().max() < 1e-3


def test_fedit_averages_the_factors_and_is_not_exact() -> None:
    clients = [random_state(i) for i in range(2)]
    after = run("fedit", random_state(99), clients, [0.25, 0.75])
    for name in after:
        expected = 0.25 * clients[0][name] + 0.75 * clients[1][name]
        torch.testing.assert_close(after[name], expected, atol=1e-5, rtol=1e-5)
    layer = "model.one"
    mean = 0.25 * dense(clients[0], layer) + 0.75 * dense(clients[1], layer)
    assert (dense(after, layer) - mean).norm() > 0.1


@pytest.mark.parametrize("name", ["flexlora", "fedex-lora", "flora"])
def test_quantization_noise_of_the_broadcast_cancels_under_residual(name: str) -> None:
    """Clients that return what they received leave the server's product where it was."""
    start, noisy = with_residuals(random_state(0)), with_residuals(random_state(0, scale=1.3))
    after = run(name, start, [noisy, noisy], [0.5, 0.5], broadcast=noisy)
    for layer in LAYERS:
        torch.testing.assert_close(dense(after, layer), dense(start, layer), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_no_method_changes_its_inputs(name: str) -> None:
    method = METHODS[name]
    start = random_state(0)
    start = with_residuals(start) if method.writes_base else start
    start = {n: t for n, t in start.items() if part(n) in method.travels | {"residual"}}
    if name == "fedsa-lora":
        assert method.personal == {"B"}
    before = {n: t.clone() for n, t in start.items()}
    update = {n: torch.ones_like(t) for n, t in start.items() if part(n) in method.trained(1)}
    returns = [Return(start, update, 0.5), Return(start, update, 0.5)]
    after = fold(method, start, start, returns)
    assert after.keys() == start.keys()
    assert all(torch.equal(start[n], before[n]) for n in start)
    assert {n: tuple(t.shape) for n, t in after.items()} == dict(schema_of(start))
    assert all(t.dtype == torch.float32 for t in after.values())


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, rank=st.integers(1, RANK), cut=st.integers(1, RANK))
def test_truncating_and_padding_keep_the_scaled_product(seed: int, rank: int, cut: int) -> None:
    state = random_state(seed, rank)
    for layer in LAYERS:
        torch.testing.assert_close(
            dense(pad(state, RANK), layer), dense(state, layer), atol=1e-5, rtol=1e-5
        )
    whole = random_state(seed)
    small = truncate(whole, cut)
    for layer in LAYERS:
        b, a = whole[name_of(layer, "B")], whole[name_of(layer, "A")]
        expected = ALPHA / RANK * (b[:, :cut].double() @ a[:cut].double())
        torch.testing.assert_close(dense(small, layer), expected, atol=1e-5, rtol=1e-5)
    assert truncate(whole, RANK) == whole or all(
        torch.equal(x, y)
        for x, y in zip(truncate(whole, RANK).values(), whole.values(), strict=True)
    )


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, rank=st.integers(1, 12))
def test_the_svd_of_a_product_is_that_of_its_matrix(seed: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(7, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, 5, generator=generator, dtype=torch.float64)
    found = Product(left, right)
    u, s, vh = found.svd()
    torch.testing.assert_close(u @ torch.diag(s) @ vh, left @ right)
    torch.testing.assert_close(s, torch.linalg.svdvals(left @ right)[: len(s)])
    both = combine([found, found], [0.5, 2.0])
    torch.testing.assert_close(both.dense(), 2.5 * (left @ right))


def test_the_norm_of_a_state_is_that_of_its_products() -> None:
    state = random_state(3)
    squares = sum(float(product(state, layer).dense().square().sum()) for layer in layers_of(state))
    assert norm(state) == pytest.approx(math.sqrt(squares))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fedx", r"allowed: fedit, ffa-lora.* or package\.module:NAME"),
        ("no_such_module:X", "No module named"),
        ("math:nothing", "nothing"),
        ("math:pi", "allowed: fedit"),
    ],
)
def test_an_unknown_method_is_refused(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        find_method(name)


def federation(seed: int, clients: int, width: int = 40) -> tuple[State, list[Return]]:
    """D with layers of `width`, and returns of uneven weights."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"A": (RANK, width), "B": (width, RANK)}
    names = {name_of(layer, kind): shape for layer in LAYERS for kind, shape in shapes.items()}

    def draw(scale: float) -> State:
        return {n: scale * torch.randn(shape, generator=generator) for n, shape in names.items()}

    broadcast = draw(1.0)
    zeros = {name_of(layer, "residual"): torch.zeros(width, width) for layer in LAYERS}
    start = dict(sorted((broadcast | zeros).items()))
    return start, [Return(start, draw(0.1), 7.0 + 3 * i) for i in range(clients)]


def only_median(returns: list[Return], _broadcast: State) -> State:
    names = returns[0].update
    return {n: torch.stack([r.update[n].double() for r in returns]).median(0).values for n in names}


OF_ALL = METHODS | {"median": Method(direction=only_median)}


@pytest.mark.parametrize("planned", [5, 1000])
@pytest.mark.parametrize("rule", ["residual", "replace", "pull"])
@pytest.mark.parametrize("name", OF_ALL)
def test_no_order_and_no_grouping_changes_a_bit(name: str, rule: str, planned: int) -> None:
    """A part comes as tensors, as from a node; factors are kept (5) or summed (1000)."""
    start, returns = federation(0, 5)
    trained = OF_ALL[name].trained(1) & OF_ALL[name].travels
    returns = [
        Return(r.received, {n: t for n, t in r.update.items() if part(n) in trained}, r.weight)
        for r in returns
    ]
    plan = Plan(OF_ALL[name], schema_of(returns[0].update), start, rule, 0.5, planned)

    def finished(total: RoundSum) -> str:
        optimizer = make_optimizer("fedavg", schema_of(start), lr=0.5)
        random = torch.Generator().manual_seed(1)
        return state_digest(total.next_state(start, start, optimizer, random))

    digests = set()
    for order, cut in (([0, 1, 2, 3, 4], 0), ([4, 2, 0, 3, 1], 2), ([3, 1, 4, 0, 2], 4)):
        total, node = RoundSum(plan), RoundSum(plan)
        for client in order[cut:]:
            node.add(client, returns[client])
        for client in order[:cut]:
            total.add(client, returns[client])
        tensors = node.tensors()
        found = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
        assert found == total.parts(node.kinds, node.clients)
        weights = {client: returns[client].weight for client in node.clients}
        total.absorb(tensors, weights, lambda client: returns[client].received)
        assert total.clients == {0, 1, 2, 3, 4}
        digests.add(finished(total))
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["flora", "fedex-lora", "flexlora", "lora-fair"])
@pytest.mark.parametrize("rule", ["residual", "replace", "pull"])
def test_products_that_are_summed_are_those_that_are_stacked(name: str, rule: str) -> None:
    """Five clients of rank 3 fit a matrix of 100 by 100 many times, and a thousand do not."""
    start, returns = federation(1, 5, width=100)
    method, schema = METHODS[name], schema_of(returns[0].update)
    few, many = (Plan(method, schema, start, rule, 0.5, clients) for clients in (5, 1000))
    assert (len(few.kept()), len(few.summed())) == (4, 0)
    assert (len(many.kept()), len(many.summed())) == (0, 2)
    one, other = (
        fold(method, start, start, returns, rule=rule, lr=0.5, planned=plan.clients)
        for plan in (few, many)
    )
    for layer in LAYERS:
        torch.testing.assert_close(dense_of(one, layer), dense_of(other, layer), atol=1e-5, rtol=0)


def dense_of(state: State, layer: str) -> Tensor:
    return product(state, layer).dense() + state[name_of(layer, "residual")].double()


def test_what_is_held_does_not_grow_with_the_returns() -> None:
    start, returns = federation(2, 1)
    for name in METHODS:
        plan = Plan(METHODS[name], schema_of(returns[0].update), start, "residual", 1.0, 500)
        total, held = RoundSum(plan), set()
        for client in range(20):
            total.add(client, returns[0])
            held.add(sum(t.nbytes for t in total.tensors().values()))
        assert len(held) == 1


def test_hetlora_counts_clients_that_hold_nothing_only_where_all_do() -> None:
    start, (one, two) = random_state(0), (random_state(1), random_state(2))
    empty = {n: torch.zeros_like(t) for n, t in one.items() if part(n) == "B"}
    nothing = run("hetlora", start, [one | empty, two | empty], [0.9, 0.1])
    for name in start:
        expected = ((one | empty)[name] + (two | empty)[name]) / 2
        torch.testing.assert_close(nothing[name], expected, atol=1e-6, rtol=1e-6)
    alone = run("hetlora", start, [one | empty, two], [0.9, 0.1])
    for name in start:
        torch.testing.assert_close(alone[name], two[name], atol=1e-6, rtol=1e-6)


def test_a_return_that_cannot_be_added_changes_nothing() -> None:
    start, (one, two) = federation(3, 2)
    for name in ("fedit", "flexlora", "hetlora"):
        plan = Plan(METHODS[name], schema_of(one.update), start, "residual", 1.0, 1000)
        total = RoundSum(plan)
        total.add(0, one)
        before = state_digest(total.tensors())
        last = max(two.update)
        for bad in (math.nan, math.inf, 1e30):
            update = two.update | {last: torch.full_like(two.update[last], bad)}
            with pytest.raises(OverflowError):
                total.add(1, Return(start, update, 7.0))
        with pytest.raises(ValueError, match="client 0 has been added"):
            total.add(0, two)
        with pytest.raises(ValueError, match="client 0 has been added"):
            total.merge(total)
        assert state_digest(total.tensors()) == before
        assert total.clients == {0}


def test_a_return_whose_products_alone_are_too_large_changes_nothing() -> None:
    start = random_state(0)
    plan = Plan(find_method("flexlora"), schema_of(start), start, "residual", 1.0, 1000)
    total = RoundSum(plan)
    assert plan.summed()
    total.add(0, Return(start, random_state(1), 1.0))
    before = {name: tensor.clone() for name, tensor in total.tensors().items()}
    huge = {name: 1e7 * tensor for name, tensor in random_state(2).items()}
    with pytest.raises(OverflowError):
        total.add(1, Return(start, huge, 1.0))
    assert total.clients == {0}
    assert state_digest(total.tensors()) == state_digest(before)
