"""The matrix products of one forward alone, and the whole forward without attention: what a step can't go below.

    python bench/gemm_chain.py --device cuda [--models 1.5B,7B,8B] [--rows 32,128,512] [--compile]
        [--out bench/results/h100/gemm_chain.json]

Real geometries with random weights. Times are those of cuda_timing.py; the weights are far larger than the L2, so every
product reads them cold. floor = max(weights, inputs and outputs / 3.05 TB/s, flops with rows padded to 64 /
700 TFLOP/s), summed over the products. The forward is hidden() and logits() of all rows after Transformer.optimize();
its attention hands back a buffer, so forward - products is the price of norms, rotary, activation and launches.
TORCH_BLAS_PREFER_CUBLASLT=1 in the environment has torch ask cublasLt, whose choices differ for `down`.
"""

import argparse
from collections.abc import Callable

import torch
from cuda_timing import capture, median_us
from gpu_bench import finish, gpu_name
from torch import Tensor
from torch.nn.functional import linear

from mage_ext.evaluation.speed import products
from mage_ext.models.geometry import GEOMETRIES, random_model
from mage_ext.models.transformer import Transformer

BLOCK = 32  # rows of a request


def product_calls(model: Transformer, rows: int) -> dict[str, list[Callable[[], Tensor]]]:
    """The products of an optimized model's forward over random rows: a call per layer by name, one of the head."""
    config, device = model.config, model.embed_tokens.weight.device
    sizes = {config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size}
    inputs = {size: torch.randn(rows, size, device=device, dtype=model.embed_tokens.weight.dtype) for size in sizes}

    def call(weight: Tensor, bias: Tensor | None = None) -> Callable[[], Tensor]:
        return lambda: linear(inputs[weight.shape[1]], weight, bias)

    layers = model.packed_layers
    return {
        "qkv": [call(layer.qkv, layer.qkv_bias) for layer in layers],
        "o": [call(layer.o) for layer in layers],
        "gate_up": [call(layer.gate_up) for layer in layers],
        "down": [call(layer.down) for layer in layers],
        "lm_head": [call(model.lm_head.weight)],
    }


def time_products(model: Transformer, rows: int, replays: int = 15) -> dict:
    """The chain of products of one forward in a CUDA graph, in the model's order.

    Args:
        model: optimized, on a GPU. rows: tokens of the forward. replays: of the graph, the median counts.
    Returns:
        us, bytes, flops and floor_us of the chain; parts: for each product's name its us and floor_us.
    """
    calls = product_calls(model, rows)
    per_layer = [calls[name] for name in ("qkv", "o", "gate_up", "down")]
    chain = [call for layer in zip(*per_layer, strict=True) for call in layer] + calls["lm_head"]

    def run(those: list[Callable[[], Tensor]]) -> None:
        for call in those:
            call()

    graphs = {name: capture([lambda those=those: run(those)]) for name, those in {**calls, "chain": chain}.items()}
    us = median_us(graphs, replays)
    facts = products(model.config)
    return {
        "us": us["chain"],
        "bytes": sum(product.bytes(rows) for product in facts),
        "flops": sum(product.flops(rows) for product in facts),
        "floor_us": sum(product.floor_us(rows) for product in facts),
        "parts": {product.name: (us[product.name], product.floor_us(rows)) for product in facts},
    }


def time_forward(model: Transformer, rows: int, replays: int = 15) -> float:
    """Microseconds of hidden() and logits() of `rows` tokens in a CUDA graph, attention left out.

    Args:
        model: on a GPU. rows: tokens, a multiple of 32 (the block). replays: of the graph, the median counts.
    """
    config, weight = model.config, model.embed_tokens.weight
    if rows < BLOCK or rows % BLOCK:
        raise ValueError(f"time_forward: rows must be a positive multiple of {BLOCK}, got {rows}")
    tokens = torch.randint(config.vocab_size, (rows // BLOCK, BLOCK), device=weight.device)
    positions = torch.arange(BLOCK, device=weight.device).expand_as(tokens).contiguous()
    out = torch.randn(*tokens.shape, config.num_heads, config.head_dim, device=weight.device, dtype=weight.dtype)

    def call() -> Tensor:
        return model(tokens, positions, lambda layer, q, k, v: out)

    with torch.no_grad():
        return median_us({"forward": capture([call])}, replays)["forward"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cuda"], default="cuda")
    parser.add_argument("--models", default="1.5B,7B,8B", help="by commas")
    parser.add_argument("--rows", default="32,128,512", help="of a forward, multiples of 32, by commas")
    parser.add_argument("--compile", action="store_true", help="Transformer.optimize(compile=True)")
    parser.add_argument("--replays", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="result file, written on an H100 only")
    args = parser.parse_args(argv)
    models = args.models.split(",")
    if not set(models) <= set(GEOMETRIES):
        parser.error(f"--models must be of {', '.join(GEOMETRIES)}, got {args.models!r}")
    try:
        row_counts = [int(rows) for rows in args.rows.split(",")]
    except ValueError:
        row_counts = [0]
    if any(rows < BLOCK or rows % BLOCK for rows in row_counts):
        parser.error(f"--rows must be positive multiples of {BLOCK} by commas, got {args.rows!r}")
    device = gpu_name(args, parser)
    print(f"{device}, torch {torch.__version__}, random weights, compile {args.compile}")
    names = "".join(f"{name + '%':>9}" for name in ("qkv", "o", "gate_up", "down", "lm_head"))
    print(f"{'model':>6}{'rows':>5}{'products us':>12}{'floor':>8}{'fl%':>5}{names}{'forward us':>12}{'ratio':>7}")
    results = []
    for name in models:
        model = random_model(name, device="cuda", seed=args.seed).optimize(compile=args.compile)
        for rows in row_counts:
            chain, forward = time_products(model, rows, args.replays), time_forward(model, rows, args.replays)
            us, floor = chain["us"], chain["floor_us"]
            parts = "".join(f"{100 * floor / us:9.0f}" for us, floor in chain["parts"].values())
            line = f"{name:>6}{rows:>5}{us:12.1f}{floor:8.1f}{100 * floor / us:5.0f}{parts}"
            print(f"{line}{forward:12.1f}{forward / us:7.3f}", flush=True)
            for part, taken in (("products", us), ("forward", forward)):
                case = {"model": name, "rows": rows, "part": part, "compile": args.compile, "cache": "cold"}
                row = {"case": case, "us": round(taken, 2), "floor_us": round(floor, 2)}
                results.append(
                    row | {"fraction": round(floor / taken, 3), "peer": None, "peer_us": None, "ratio": None}
                )
        del model
        torch.cuda.empty_cache()
    finish(args, "gemm_chain", device, results)


if __name__ == "__main__":
    main()
