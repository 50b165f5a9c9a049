"""Swin Transformers on ImageNet, as in the thesis: natural, GradNorm, edges, adversarial training.

    python examples/imagenet_swin.py --list
    python examples/imagenet_swin.py IMAGENET --dry-run
    torchrun --nproc-per-node 7 examples/imagenet_swin.py IMAGENET --form author_code

IMAGENET is a folder with train and val, each with a folder of images per class. The result is a checkpoint, weights
that timm reads, and a log. A run that was stopped goes on where it stood when it is started again. `recipes/README.md`
has what was published for each recipe, and where the thesis's text and its code differ.

To see the whole pipeline in minutes, without ImageNet and without a GPU:

    python examples/photographs.py results/photographs --split
    python examples/imagenet_swin.py results/photographs --recipe tiny_swin_gradnorm --workers 0
"""

from imagenet.command import main

if __name__ == "__main__":
    main("swin_b_gradnorm", __doc__)
