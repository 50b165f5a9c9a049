"""What fused attention, which cannot be differentiated twice, saves in time and memory, and what does without it cost.

    python benchmarks/attention.py --threads 1
    python benchmarks/attention.py --device cuda --batch-size 64 --dtype bfloat16

A ViT of timm at 196 tokens (images of 224x224 pixels) and at 1,024 (512x512). README.md beside this file says how to
read the tables.
"""

from collections.abc import Sequence

import torch
from torch import nn

import turns
from memory import Contender, measure, table_of
from step_cost import METHODS, RECOMMENDED, transformer

PATCH = 16  # pixels


def unfused(model: nn.Module) -> nn.Module:
    """The model with attention written out, as timm has it where it does not fuse."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


exact = METHODS["GradNorm, PenalizedLoss"]
CONTENDERS: dict[str, Contender] = {
    "natural, fused": Contender(METHODS["natural"]),
    "natural, unfused": Contender(METHODS["natural"], unfused, same_as="natural, fused"),
    "exact, math attention": Contender(exact),  # which a method that differentiates twice is given
    "exact, unfused": Contender(exact, unfused, same_as="exact, math attention"),
    "finite differences, fused": Contender(METHODS["finite differences"]),
    f"{RECOMMENDED}, fused": Contender(METHODS[RECOMMENDED]),
    "PGD-3, fused": Contender(METHODS["PGD-3"]),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write the numbers."""
    parser = turns.parser_of(__doc__, output="results/attention", rounds=5, warm_up=1)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="a ViT of timm with patches of 16 pixels")
    parser.add_argument("--tokens", type=int, nargs="+", default=[196, 1024], help="square numbers (default 196 1024)")
    parser.add_argument("--depth", type=int, help="blocks, where not all are wanted")
    args = parser.parse_args(argv)
    device = turns.prepare(parser, args)

    lengths: dict[str, dict[str, dict[str, object]]] = {}
    for tokens in args.tokens:
        side = round(tokens**0.5) * PATCH
        depth = {} if args.depth is None else {"depth": args.depth}
        model = transformer(args.model, img_size=side, **depth).eval().to(device)
        x = torch.rand(args.batch_size or 4, 3, side, side).to(device)
        y = (torch.arange(len(x)) % 10).to(device)
        title = f"{tokens} tokens"
        lengths[str(tokens)] = measure(CONTENDERS, model, x, y, args, title)
        print(f"\n{title}, batch {len(x)}\n\n{table_of(lengths[str(tokens)])}", flush=True)
    clock = next(iter(lengths[str(args.tokens[0])]["natural, fused"]["seconds"]))
    report = {
        **turns.circumstances("attention", argv, args, device, "timm"),
        "model": args.model,
        "batch_size": args.batch_size or 4,
        "tokens": lengths,
    }
    path = args.output / turns.stem(args.model, args.dtype, device)
    turns.write(report, path.with_suffix(".json"))
    print(f"\n{report['machine']}")
    series = {}
    for tokens, rows in lengths.items():
        series[f"time, {tokens} tokens"] = {name: row["time_ratio"][clock] for name, row in rows.items()}
        series[f"memory, {tokens} tokens"] = {name: turns.point(row["peak_ratio"]) for name, row in rows.items()}
    turns.plot(series, {}, "of a natural step with fused attention", path.with_suffix(".png"))


if __name__ == "__main__":
    main()
