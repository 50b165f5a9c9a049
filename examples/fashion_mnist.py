"""What is robust to small perturbations, and at what cost: many ways to train the same networks on Fashion-MNIST.

    python examples/fashion_mnist.py --afresh                          # one network, one seed, short: some minutes
    python examples/fashion_mnist.py --nets convnet vit --eps 8/255 0.1 --steps 500 2000 --seeds 0 1 2 3 4
    python examples/fashion_mnist.py --report                          # tables, claims and figures from what there is

Every run, one network trained in one way and attacked, is a file in the output folder. Runs that have one are not
repeated, so that a study can be interrupted, started again, and done by several processes (`--shard 0/2`). `--report`
gathers all runs in `docs/fashion-mnist/runs.json`, and draws from it. What is on record there counts as done, too,
unless it is to be done `--afresh`.
"""

import argparse
import itertools
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from gradreg import GradregWarning

from study import report
from study.data import DIGITS, FASHION_MNIST, load
from study.methods import ALL, METHODS
from study.models import NETS
from study.runs import Run, perform


def wanted(args: argparse.Namespace) -> list[Run]:
    """The runs that are asked for: all of one seed before the next, the short ones first."""
    axes = itertools.product(args.seeds, sorted(args.steps), args.nets, args.eps, args.methods)
    return [Run(net, eps, steps, method, seed, args.split, args.data) for seed, steps, net, eps, method in axes]


def main(argv: Sequence[str] | None = None) -> None:
    """Do the runs that are missing, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=["convnet"])
    parser.add_argument("--eps", nargs="+", default=["0.1"], help="largest change of a pixel, such as 8/255")
    parser.add_argument("--steps", type=int, nargs="+", default=[500], help="of training, 128 images each")
    parser.add_argument("--methods", nargs="+", choices=list(ALL), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="images to evaluate on")
    parser.add_argument("--autoattack", nargs="*", choices=list(ALL), default=[], metavar="METHOD",
                        help="standard AutoAttack, too, for these methods (a minute or more each)")  # fmt: skip
    parser.add_argument("--data", choices=[FASHION_MNIST, DIGITS], default=FASHION_MNIST, help="images")
    parser.add_argument("--folder", type=Path, help="with the four files of Fashion-MNIST")
    parser.add_argument("--output", type=Path, default=Path("results/fashion_mnist"), help="folder to write into")
    parser.add_argument("--shard", default="0/1", help="K/N: this process does every N-th run, from the K-th on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--afresh", action="store_true", help="do again what is on record in docs/fashion-mnist")
    parser.add_argument("--report", action="store_true", help="gather, tabulate and draw; train nothing")
    args = parser.parse_args(argv)
    if args.report:
        report.write(args.output)
        return
    torch.set_num_threads(args.threads)
    # GradNorm on ReLU is a row to show what this very warning says.
    warnings.filterwarnings("ignore", message=".*piecewise linear", category=GradregWarning)
    index, count = map(int, args.shard.split("/"))
    done = report.gathered(args.output, record=not args.afresh)
    missing = [
        run
        for run in wanted(args)[index::count]
        if run not in done or (run.method in args.autoattack and "autoattack" not in done[run])
    ]
    if not missing:
        print("Nothing to do: all of these runs are done or on record. --afresh repeats what is on record, --report "
              "tabulates.", file=sys.stderr)  # fmt: skip
        return
    data = load(args.split, args.folder, args.data)
    with tqdm(total=sum(run.steps for run in missing), unit="step", smoothing=0.02) as bar:
        for run in missing:
            bar.set_description(f"{run.net} {run.eps} {run.method}")
            result = perform(run, data, args.output, autoattack=run.method in args.autoattack, bar=bar)
            tqdm.write(
                f"{run.net:8s} eps {run.eps:6s} {run.steps:5d} steps, seed {run.seed}, {run.method:34s} "
                f"clean {100 * result['clean'] / result['clean_of']:.1f} %, "
                f"robust {100 * result['robust'] / result['robust_of']:.1f} %",
                file=sys.stderr,
            )


if __name__ == "__main__":
    main()
