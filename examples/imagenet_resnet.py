r"""ResNet-50 with ReLU, GELU or SiLU on ImageNet, as in section 4.3 of the thesis.

    python examples/imagenet_resnet.py IMAGENET --recipe resnet50_gelu_finetune --output results/gelu
    python examples/imagenet_resnet.py IMAGENET --recipe resnet50_gelu_gradnorm \
        --set model.weights=results/gelu/raw.safetensors

The first command swaps the activations of a trained network and trains it for a few epochs, since the swap alone takes
its accuracy to 0; the second starts there. Everything else is as in imagenet_swin.py: --list, --dry-run, torchrun.
"""

from imagenet.command import main

if __name__ == "__main__":
    main("resnet50_gelu_gradnorm", __doc__)
