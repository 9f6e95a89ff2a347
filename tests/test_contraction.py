"""Every spelling of a product as labels: an einsum of the labels gives the product again."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from attnfuse.passes.contraction import Contraction, Labels, contraction
from attnfuse.passes.normalise import normalise
from tests.harness import randn


def products(fn: Callable[..., Tensor], *inputs: Tensor) -> list[tuple[Contraction | None, dict[fx.Node, Any]]]:
    """The contraction of the last operator in `fn`, with the values of all nodes."""
    found: list[tuple[Contraction | None, dict[fx.Node, Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = normalise(gm)
        values: dict[fx.Node, Any] = {}

        class Recorder(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                values[n] = super().run_node(n)
                return values[n]

        last = [n for n in graph.graph.nodes if n.op == "call_function"][-1]
        found.append((contraction(last), values))
        return Recorder(graph).run

    torch._dynamo.reset()
    torch.compile(fn, backend=backend)(*inputs)
    return found


def by_labels(found: Contraction, values: dict[fx.Node, Any]) -> Tensor:
    """The product computed from what the Contraction says."""
    letters = {
        label: chr(ord("a") + at) for at, label in enumerate(dict.fromkeys((*found.lhs_labels, *found.rhs_labels)))
    }

    def operand(node: fx.Node, labels: Labels) -> tuple[Tensor, str]:
        x = values[node]
        for dim in reversed([at for at, label in enumerate(labels) if not label]):
            assert x.shape[dim] == 1
            x = x.squeeze(dim)
        return x, "".join(letters[label] for label in labels if label)

    (a, left), (b, right) = (operand(node, labels) for node, labels in found.sides())
    out = "".join(letters[label] for label in found.out_labels)
    assert letters[found.summed] not in out
    product = torch.einsum(f"{left},{right}->{out}", a, b) * found.alpha
    return product if found.added is None else product + values[found.added] * found.beta


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((3, 4), (4, 5)),
        ((2, 3, 4), (2, 4, 5)),
        ((2, 3, 4), (4, 5)),
        ((3, 4), (2, 4, 5)),
        ((2, 6, 3, 4), (2, 6, 4, 5)),
        ((2, 6, 3, 4), (2, 1, 4, 5)),
        ((1, 6, 3, 4), (2, 6, 4, 5)),
        ((2, 6, 3, 4), (6, 4, 5)),
        ((1, 1, 3, 4), (1, 1, 4, 5)),
        ((2, 3, 2, 3, 4), (2, 3, 1, 4, 5)),
        ((2, 3, 1), (2, 1, 5)),
        ((2, 1, 4), (2, 4, 1)),
    ],
)
def test_matmul(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = randn(*left, seed=1), randn(*right, seed=2)
    ((found, values),) = products(lambda a, b: a @ b, a, b)
    assert found is not None
    assert found.summed == "sum"
    torch.testing.assert_close(by_labels(found, values), a @ b)


def test_mm_and_bmm() -> None:
    for fn, a, b in ((torch.mm, randn(3, 4), randn(4, 5)), (torch.bmm, randn(2, 3, 4), randn(2, 4, 5))):
        ((found, values),) = products(lambda a, b, fn=fn: fn(a, b), a, b)
        assert found is not None
        torch.testing.assert_close(by_labels(found, values), fn(a, b))


@pytest.mark.parametrize("added", [(2, 3, 5), (1, 1, 5), (5,), ()])
def test_baddbmm(added: tuple[int, ...]) -> None:
    c, a, b = randn(*added, seed=3), randn(2, 3, 4, seed=1), randn(2, 4, 5, seed=2)

    def fn(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.baddbmm(c, a, b, beta=0.5, alpha=2)

    ((found, values),) = products(fn, c, a, b)
    assert found is not None
    assert (found.alpha, found.beta) == (2, 0.5)
    torch.testing.assert_close(by_labels(found, values), fn(c, a, b))


def test_addmm() -> None:
    c, a, b = randn(5, seed=3), randn(3, 4, seed=1), randn(4, 5, seed=2)
    ((found, values),) = products(lambda c, a, b: torch.addmm(c, a, b, alpha=3), c, a, b)
    assert found is not None
    assert found.beta == 1
    torch.testing.assert_close(by_labels(found, values), torch.addmm(c, a, b, alpha=3))


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("bhid,bhjd->bhij", (2, 3, 4, 5), (2, 3, 6, 5)),
        ("bqhd,bkhd->bhqk", (2, 4, 3, 5), (2, 6, 3, 5)),
        ("bhqk,bkhd->bqhd", (2, 3, 4, 6), (2, 6, 3, 5)),
        (" b i d , b j d -> b i j ", (2, 4, 5), (2, 6, 5)),
        ("id,jd->ij", (4, 5), (6, 5)),
        ("ij,hd->ih", (4, 1), (3, 1)),
        ("...id,...jd->...ij", (2, 3, 4, 5), (2, 3, 6, 5)),
        ("...id,jd->...ij", (2, 3, 4, 5), (6, 5)),
        ("...id,...jd->...ij", (2, 3, 4, 5), (3, 6, 5)),
        ("b...d,bkd->b...k", (2, 3, 4, 5), (2, 6, 5)),
        ("bhgmd,bhnd->bhgmn", (2, 3, 2, 4, 5), (2, 3, 6, 5)),
        ("bhid,bhjd->bhij", (2, 3, 4, 5), (2, 1, 6, 5)),
        ("bnd,hd->bhn", (2, 4, 5), (3, 5)),
    ],
)
def test_einsum(equation: str, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = randn(*left, seed=1), randn(*right, seed=2)
    ((found, values),) = products(lambda a, b: torch.einsum(equation, a, b), a, b)
    if equation == "ij,hd->ih":
        assert found is None, "each operand is summed by itself"
        return
    assert found is not None
    torch.testing.assert_close(by_labels(found, values), torch.einsum(equation, a, b))


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bij->bji", [(2, 3, 4)]),
        ("bid,bjd,bj->bi", [(2, 3, 4), (2, 5, 4), (2, 5)]),
        ("bii,bij->bij", [(2, 3, 3), (2, 3, 4)]),
        ("bhid,bhjd->bij", [(2, 3, 4, 5), (2, 3, 6, 5)]),
        ("bid,bjd->bijd", [(2, 3, 4), (2, 5, 4)]),
        ("bid,bjd->bi", [(2, 3, 4), (2, 5, 4)]),
    ],
)
def test_einsums_that_are_no_product_over_one_label(equation: str, shapes: list[tuple[int, ...]]) -> None:
    inputs = [randn(*shape, seed=at) for at, shape in enumerate(shapes)]
    ((found, _),) = products(lambda *xs: torch.einsum(equation, *xs), *inputs)
    assert found is None


def test_other_operators_are_none() -> None:
    x, y = randn(3, 4), randn(4)
    for fn in (lambda a, b: a * b, lambda a, b: a @ b, lambda a, b: (a * b).sum(-1)):
        ((found, _),) = products(fn, x, y)
        assert found is None


def test_index_of_an_operand() -> None:
    ((found, _),) = products(lambda a, b: a @ b, randn(2, 6, 3, 4), randn(1, 6, 4, 5))
    assert found is not None
    b, h, m, n, d = ((x,) for x in "bhmnd")
    values: Any = dict(zip(found.out_labels, (b, h, m, n), strict=True)) | {found.summed: d}
    assert found.index(found.lhs_labels, values) == (b, h, m, d)
    assert found.index(found.rhs_labels, values) == ((), h, d, n)
