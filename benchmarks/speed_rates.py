"""The floor: how fast this machine multiplies by the text encoders' frozen weights, by every route PyTorch offers.

python benchmarks/speed_rates.py --model-folder DIR [--prompts 1,4,16] [--dtypes float32,bfloat16]

Weights are taken in turn out of a pool larger than the caches, as a model's layers are; none is zeros. Routes take
turns; a figure is the median of single products. Prints one JSON object.

A step multiplies each prompt's tokens by each weight twice: forward, x Wᵀ, and for the gradient of the
activations, g W. Frozen weights need no gradient of their own. So it costs 4 · P · T floating-point operations
per prompt: P numbers in the matrices of the encoders' blocks, T tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ENCODERS = ("text_encoder", "text_encoder_2")
DIRECTIONS = ("forward", "gradient")
POOL_BYTES = 640 * 2**20
MOST_WEIGHTS = 512
ROUNDS = 3
Product = Callable[["torch.Tensor", int], "torch.Tensor"]
Shape = tuple[int, int]  # (out, in)


@dataclass(frozen=True)
class Work:
    """What a step on a model costs. shapes: how many weights of each (out, in) its encoders' blocks have."""

    shapes: dict[Shape, int]
    tokens: int

    @property
    def parameters(self) -> int:
        """P: numbers in the matrices of the blocks."""
        return sum(out * inputs * count for (out, inputs), count in self.shapes.items())

    @property
    def flops(self) -> float:
        """Floating-point operations of one step, per prompt: 4 · P · T."""
        return 4.0 * self.parameters * self.tokens


def work_of(folder: Path) -> Work:
    """Read off the configs of a diffusers folder: per block q, k, v and out, fc1 and fc2."""
    shapes: Counter[Shape] = Counter()
    tokens = 0
    for encoder in ENCODERS:
        config = json.loads((folder / encoder / "config.json").read_text(encoding="utf-8"))
        width, inner, blocks = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
        shapes += Counter({(width, width): 4 * blocks, (inner, width): blocks, (width, inner): blocks})
        tokens = config["max_position_embeddings"]
    return Work(dict(shapes), tokens)


@dataclass(frozen=True)
class Route:
    """A way to multiply by the pool's weights. layout: how it needs them stored.

    `plain` (out, in) and `transposed` serve both directions; a packed layout only its own, so a second copy of the
    weights is needed for the other.
    """

    layout: str
    product: Product


def forward_routes(pool: Sequence[torch.Tensor], turned: Sequence[torch.Tensor], rows: int) -> dict[str, Route]:
    """x Wᵀ + b of x `(rows, in)`; turned: Wᵀ, contiguous."""
    import torch

    onednn, linear = torch.ops.mkldnn, torch.nn.functional.linear
    bias = torch.randn(pool[0].shape[0]).to(pool[0].dtype)
    packed = [onednn._reorder_linear_weight(weight, rows) for weight in pool]
    routes = {
        "linear": Route("plain", lambda x, i: linear(x, pool[i], bias)),
        "mm, W transposed": Route("transposed", lambda x, i: torch.addmm(bias, x, turned[i])),
        "oneDNN": Route("plain", lambda x, i: onednn._linear_pointwise(x, pool[i], bias, "none", [], "")),
        "oneDNN packed": Route("packed", lambda x, i: onednn._linear_pointwise(x, packed[i], bias, "none", [], "")),
    }
    if pool[0].dtype == torch.float32 and torch._C.has_mkl:
        mkl = [torch.ops.mkl._mkl_reorder_linear_weight(weight, rows) for weight in pool]
        routes["MKL packed"] = Route("packed", lambda x, i: torch.ops.mkl._mkl_linear(x, mkl[i], pool[i], bias, rows))
    if pool[0].dtype != torch.float32:
        routes["linear, upcast"] = Route("plain", lambda x, i: linear(x.float(), pool[i].float()).to(x.dtype) + bias)
    return routes


def gradient_routes(pool: Sequence[torch.Tensor], turned: Sequence[torch.Tensor], rows: int) -> dict[str, Route]:
    """g W of g `(rows, out)`."""
    import torch

    onednn, linear = torch.ops.mkldnn, torch.nn.functional.linear
    packed = [onednn._reorder_linear_weight(weight, rows) for weight in turned]
    routes = {
        "mm": Route("plain", lambda g, i: g @ pool[i]),
        "linear, W transposed": Route("transposed", lambda g, i: linear(g, turned[i])),
        "oneDNN": Route("plain", lambda g, i: onednn._linear_pointwise(g, pool[i].t(), None, "none", [], "")),
        "oneDNN packed": Route("packed", lambda g, i: onednn._linear_pointwise(g, packed[i], None, "none", [], "")),
    }
    if pool[0].dtype != torch.float32:
        routes["mm, upcast"] = Route("plain", lambda g, i: (g.float() @ pool[i].float()).to(g.dtype))
    return routes


def measure_shape(shape: Shape, tokens: int, prompts: int, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """GFLOP/s of every route in both directions, ready for JSON. seconds: spent on each route."""
    import torch

    out, inputs = shape
    rows = tokens * prompts
    count = max(2, min(MOST_WEIGHTS, POOL_BYTES // (out * inputs * dtype.itemsize)))
    pool = list((torch.randn(count, out, inputs) / inputs**0.5).to(dtype))
    turned = [weight.t().contiguous() for weight in pool]
    row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "prompts": prompts, "out": out, "in": inputs}
    for direction, make, width in zip(DIRECTIONS, (forward_routes, gradient_routes), (inputs, out), strict=True):
        routes = make(pool, turned, rows)
        given = torch.randn(rows, width).to(dtype)
        taken = _seconds(routes, given, count, seconds)
        row[direction] = {
            name: {"layout": routes[name].layout, "gflops": 2e-9 * rows * out * inputs / each}
            for name, each in taken.items()
        }
    return row


def _seconds(routes: dict[str, Route], given: torch.Tensor, count: int, budget: float) -> dict[str, float]:
    """Median seconds of one product by each route; a route that this machine lacks is left out."""
    taken: dict[str, list[float]] = {}
    turn = 0
    for name, route in routes.items():
        try:
            route.product(given, 0)
            taken[name] = []
        except (RuntimeError, NotImplementedError):
            continue
    for _ in range(ROUNDS):
        for name, times in taken.items():
            end = time.perf_counter() + budget / ROUNDS
            while True:
                turn += 1
                start = time.perf_counter()
                routes[name].product(given, turn % count)
                times.append(time.perf_counter() - start)
                if time.perf_counter() >= end:
                    break
    return {name: statistics.median(times) for name, times in taken.items()}


def step_rates(rows: Sequence[dict[str, Any]], shapes: dict[Shape, int]) -> dict[str, float]:
    """GFLOP/s of all matrix products of a step, each shape as often as it occurs, from the rows of one dtype and size.

    `best`: each product by its fastest route. `once`: by the fastest routes for which every weight is held once.
    """
    work, taken = 0.0, {"best": 0.0, "once": 0.0}
    for row in rows:
        products = 2.0 * shapes[row["out"], row["in"]] * row["out"] * row["in"]
        work += 2 * products
        taken["best"] += sum(products / _fastest(row[direction]) for direction in DIRECTIONS)
        taken["once"] += min(
            sum(products / _fastest(row[direction], layout) for direction in DIRECTIONS)
            for layout in ("plain", "transposed")
        )
    return {name: work / each for name, each in taken.items()}


def _fastest(routes: dict[str, Any], layout: str | None = None) -> float:
    return float(max(route["gflops"] for route in routes.values() if layout in (None, route["layout"])))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-folder", type=Path, required=True, help="diffusers folder; only its configs are read")
    parser.add_argument("--prompts", default="1,4,16", help="how many prompts share a product")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--seconds", type=float, default=0.25, help="spent on each route of each product")
    given = parser.parse_args()

    import torch

    work = work_of(given.model_folder)
    rows: list[dict[str, Any]] = []
    rates: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        for dtype in given.dtypes.split(","):
            rates[dtype] = {}
            for prompts in given.prompts.split(","):
                measured = [
                    measure_shape(shape, work.tokens, int(prompts), getattr(torch, dtype), given.seconds)
                    for shape in work.shapes
                ]
                rates[dtype][prompts] = step_rates(measured, work.shapes)
                rows += measured
    print(json.dumps({"threads": torch.get_num_threads(), "rates": rates, "products": rows}))


if __name__ == "__main__":
    main()
