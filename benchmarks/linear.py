"""What oneDNN is worth to a frozen model's linear layers on this CPU, shape by shape.

    python benchmarks/linear.py --threads 2
    python benchmarks/linear.py --model path/to/model --rows 1 64 1024

GFLOPS of each kind of float32 linear layer that the model has, by torch's own product and by
``cartridge_distill.model.frozen_linear``, forward and backward (gradient of the input). The last
line says which of the two this machine uses. Results are compared before they are timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.bases import demo_model, machine  # noqa: E402
from cartridge_distill.model.frozen_linear import (  # noqa: E402
    onednn_is_faster,
    use_frozen_linear,
    use_torch_linear,
)
from cartridge_distill.model.loading import load_model  # noqa: E402
from cartridge_distill.util.errors import CartridgeDistillError  # noqa: E402
from cartridge_distill.util.processes import say  # noqa: E402


def kinds(model: nn.Module) -> list[nn.Linear]:
    """One layer of each shape, in the model's order."""
    found: dict[tuple[int, int], nn.Linear] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            found.setdefault((module.in_features, module.out_features), module)
    return list(found.values())


def product(layer: nn.Linear, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = layer(x)
    return found


def gradient(output: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    """Of the layer's input; the forward is done before."""
    return torch.autograd.grad(output, x, grad, retain_graph=True)[0]


def gflops(work: Callable[[], Tensor], operations: float, seconds: float) -> float:
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return operations / timer.blocked_autorange(min_run_time=seconds).median / 1e9


def measure_layer(layer: nn.Linear, rows: int, seconds: float) -> list[float]:
    """GFLOPS: forward by torch and by oneDNN, backward by torch and by oneDNN."""
    x = torch.randn(1, rows, layer.in_features)
    grad = torch.randn(1, rows, layer.out_features)
    operations = 2.0 * rows * layer.in_features * layer.out_features
    forwards, backwards, results = [], [], []
    for change in (use_torch_linear, use_frozen_linear):
        change(layer)
        asked = x.clone().requires_grad_()
        output = layer(asked)
        results.append((output.detach(), gradient(output, asked, grad)))
        forwards.append(gflops(partial(product, layer, x), operations, seconds))
        backwards.append(gflops(partial(gradient, output, asked, grad), operations, seconds))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-3)
    return [*forwards, *backwards]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--model", help="folder or hub id (default: SmolLM2-135M-Instruct)")
    option("--rows", type=int, nargs="+", default=[8, 48, 768], help="tokens (8 48 768)")
    option("--threads", type=int, help="CPU threads (torch's choice)")
    option("--seconds", type=float, default=0.3, help="of each measurement (%(default)s)")
    options = parser.parse_args(arguments)
    if min(options.rows) < 1:
        parser.error(f"--rows {min(options.rows)}: must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        model = load_model(options.model or demo_model())
    except (CartridgeDistillError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    here = onednn_is_faster()
    say(f"machine: {machine('cpu')}; torch {torch.__version__}")
    say("  rows     in     out   forward: torch   oneDNN   backward: torch   oneDNN")
    for layer in kinds(model):
        for rows in options.rows:
            found = measure_layer(layer, rows, options.seconds)
            shape = f"{rows:>6}{layer.in_features:>7}{layer.out_features:>8}"
            say(shape + f"{found[0]:>17.0f}{found[1]:>9.0f}{found[2]:>18.0f}{found[3]:>9.0f}")
    say(f"GFLOPS; this machine uses {'oneDNN' if here else 'torch'}'s product")
    return 0


if __name__ == "__main__":
    sys.exit(main())
