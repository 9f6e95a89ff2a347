"""The ways in which a model of the zoo is run, and what comes of one of them: what was found in it, and whether it is right."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
import torch._inductor.config
from torch import Tensor, nn

from attnfuse.backend import attnfuse, listening
from attnfuse.remark import Report
from tests import models, zoo
from tests.numerics import Errors, assert_close_in_draws, errors
from tests.terms import Terms
from tests.zoo.entry import Inputs

DTYPES: Final = {"f32": torch.float32, "bf16": torch.bfloat16}
MODES: Final = ("inference", "training", "dropout")
PROBABILITY: Final = 0.1
# So small that no element is ever dropped: the graph is that of any other probability, the result that without dropout.
NEVER: Final = 1e-9
# Weights with which a model is compared whose errors are beyond the limit with its own.
DRAWS: Final = 15


@dataclass(frozen=True)
class Cell:
    """A model in one of its implementations, modes ("dropout" is training with dropout) and types, with or without a mask."""

    model: str
    implementation: str
    mode: str
    dtype: str
    masked: bool

    @property
    def name(self) -> str:
        return "-".join((self.model, *self.column))

    @property
    def column(self) -> tuple[str, str, str, str]:
        """What the cell shares with cells of other models."""
        return self.implementation, self.mode, self.dtype, "mask" if self.masked else "none"

    @property
    def entry(self) -> zoo.Entry:
        return zoo.ENTRIES[self.model]


def cells(name: str) -> list[Cell]:
    """All cells of a model."""
    entry = zoo.ENTRIES[name]
    masks = (True, False) if entry.takes_mask else (False,)
    return [Cell(name, *rest) for rest in itertools.product(entry.implementations, MODES, DTYPES, masks)]


def sample() -> list[Cell]:
    """One cell of each model, such that every pair of implementation, mode, type and mask is among them."""
    found = []
    for number, name in enumerate(zoo.ENTRIES):
        every = cells(name)
        # 7 has no divisor in common with the number of a model's cells, so that models of a kind get different ones
        found.append(every[7 * number % len(every)])
    return found


def outputs(model: nn.Module, given: Inputs) -> tuple[Tensor, ...]:
    out = zoo.call(model, given)
    return out if isinstance(out, tuple) else (out,)


def results(
    model: nn.Module, given: Inputs, training: bool, dynamo: Mapping[str, object] | None = None
) -> dict[str, Tensor]:
    """Outputs by name and, in training, the gradients of a weighted sum of them; `dynamo` is as in an entry."""
    model.zero_grad()
    # BigBird seeds numpy for its random blocks; by default Dynamo draws others
    known = {key: value for key, value in (dynamo or {}).items() if hasattr(torch._dynamo.config, key)}
    settings = torch._dynamo.config.patch(use_numpy_random_stream=True, **known)
    with torch.set_grad_enabled(training), settings:
        outs = outputs(model, given)
        found = {f"output {at}": out.detach() for at, out in enumerate(outs)}
        if training:
            total = torch.zeros((), dtype=torch.float64)
            for out in outs:
                if out.requires_grad:
                    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
                    total = total + (out * weight).double().sum()
            total.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name.removeprefix("_orig_mod.")] = parameter.grad.clone()
    return found


def build(cell: Cell, dropout: float = 0.0) -> nn.Module:
    """The cell's model in its mode, the same weights at every call."""
    model = cell.entry.build(cell.implementation, dropout if cell.mode == "dropout" else 0.0).to(DTYPES[cell.dtype])
    return model.train(cell.mode != "inference")


@dataclass
class Graph:
    """A graph that was compiled, what is reported of it, and how often its code ran: alike layers may share one."""

    reports: list[Report] = field(default_factory=list)
    runs: int = 0

    @property
    def report(self) -> Report:
        return Report(()).merge(*self.reports)


def compiled(
    model: nn.Module, given: Inputs, training: bool, dynamo: Mapping[str, object], downstream: str
) -> tuple[dict[str, Tensor], list[Graph]]:
    """The results of a copy of the model, compiled with attnfuse, and its graphs."""
    graphs: list[Graph] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(graph := Graph())
        run = attnfuse(gm, example_inputs, options={"downstream": downstream})

        def counted(*args: Any) -> Any:
            graph.runs += 1
            return run(*args)

        return counted

    torch._dynamo.reset()
    # what is said of a backward comes later
    with listening(lambda report: graphs[-1].reports.append(report)):
        return results(torch.compile(copy.deepcopy(model), backend=backend), given, training, dynamo), graphs


def found_in(cell: Cell, downstream: str = "aot_eager") -> list[Graph]:
    """The graphs of the cell's model, with a dropout that drops."""
    given = cell.entry.inputs(cell.masked)
    training = cell.mode != "inference"
    found, graphs = compiled(build(cell, PROBABILITY), given, training, cell.entry.dynamo, downstream)
    for key, value in found.items():
        assert value.isfinite().all() or cell.mode != "dropout", f"{key} is not finite with dropout"
    return graphs


class Compared(NamedTuple):
    """A cell that is right: the graphs of its model, and with how many weights it was compared."""

    graphs: list[Graph]
    draws: int


def compared(cell: Cell, downstream: str = "aot_eager") -> Compared:
    """Compiles the cell's model and compares it with the original and with float64 by the numerics contract.

    Where gradients in bfloat16 are beyond the limit the same is done with other weights, and the contract holds for the medians of all
    draws.

    Raises:
        AssertionError: an output or a gradient is wrong.
    """
    found, graphs = _measured(cell, build(cell, NEVER), downstream)
    for key, one in found.items():
        if cell.dtype == "f32" or key.startswith("output"):
            one.judge(f"{cell.name} {key}")
    drawn = not all(one.within for one in found.values())
    if drawn:
        others = [_measured(cell, moved(build(cell, NEVER), seed), downstream)[0] for seed in range(1, DRAWS)]
        for key in found:
            # experts that get no token have no gradient
            draws = [one[key] for one in (found, *others) if key in one]
            assert_close_in_draws(draws, what=f"{cell.name} {key}")
    return Compared(graphs, DRAWS if drawn else 1)


def _measured(cell: Cell, model: nn.Module, downstream: str) -> tuple[dict[str, Errors], list[Graph]]:
    """The errors of outputs and gradients."""
    training = cell.mode != "inference"
    given = cell.entry.inputs(cell.masked)
    # Inductor's own random numbers are multiples of 2^-24, and zero is below every probability
    with torch._inductor.config.patch(fallback_random=True):
        actual, graphs = compiled(model, given, training, cell.entry.dynamo, downstream)
        original = results(_original(model, downstream), given, training, cell.entry.dynamo)
    if cell.entry.float64:
        exact, scales = models.exact(model, lambda double: _exactly(double, given, training))
    else:
        exact, scales = _exactly(copy.deepcopy(model).float(), given, training)
        exact = {key: value.double() for key, value in exact.items()}
    assert actual.keys() == original.keys() == exact.keys()
    found = {}
    for key, value in exact.items():
        what, scale = f"{cell.name} {key}", max(scales.get(key, 0.0), float(value.abs().max()))
        found[key] = errors(actual[key], original[key], value, scale, what)
    return found, graphs


def _original(model: nn.Module, downstream: str) -> nn.Module:
    """What a result is compared with: eager, or, where Inductor compiles all of the model in its own way, stock's compilation."""
    if downstream != "inductor":
        return model
    torch._dynamo.reset()
    stock: nn.Module = torch.compile(copy.deepcopy(model), backend="inductor")
    return stock


def moved(model: nn.Module, seed: int) -> nn.Module:
    """The model with each weight moved by up to an eighth of itself."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            share = torch.rand(parameter.shape, generator=generator, dtype=torch.float32).sub_(0.5).div_(4)
            parameter.mul_(1 + share.to(parameter.dtype))
    return model


def _exactly(wide: nn.Module, given: Inputs, training: bool) -> tuple[dict[str, Tensor], dict[str, float]]:
    if hasattr(wide, "set_experts_implementation"):
        # the fused product of experts takes no float64
        wide.set_experts_implementation("batched_mm")
    with models.gradient_scales(wide) as scales, Terms() as terms:
        found = results(wide, given, training)
    for name, value in found.items():
        if not name.startswith("output"):
            scales[name] = max(scales.get(name, 0.0), terms.greatest(value))
    return found, scales


def pairs(chosen: list[Cell]) -> Iterator[tuple[str, str]]:
    """All pairs of values of two axes that occur in cells."""
    for cell in chosen:
        yield from itertools.combinations(cell.column, 2)
