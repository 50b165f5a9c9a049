"""Two small networks on pixels in [0, 1], which they normalise themselves."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradreg import smoothify, with_normalization

from study.data import MEAN, STD


def convnet() -> nn.Module:
    """Three convolutions and two linear layers, 130,502 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, kernel_size=4, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, kernel_size=4, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 4 * 4, 100), nn.ReLU()),
        nn.Linear(100, 10),
    )


class VisionTransformer(nn.Module):
    """Two blocks of attention between 16 patches of 7x7 pixels, 41,674 parameters.

    The attention is plain arithmetic: PyTorch's fused one has no second derivative, and its other form brings nothing
    at 16 tokens.
    """

    def __init__(self, width: int = 48, depth: int = 2, heads: int = 3, patch: int = 7) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (28 // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images (B, 1, 28, 28)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class Block(nn.Module):
    """Attention and two layers at each token, both beside a connection that skips them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, n, width), mixed."""
        batch, count, width = tokens.shape
        of_heads = self.queries_keys_values(self.norm_1(tokens)).view(batch, count, 3, self.heads, width // self.heads)
        q, k, v = of_heads.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) * (width // self.heads) ** -0.5).softmax(3)
        tokens = tokens + self.out((weights @ v).transpose(1, 2).reshape(batch, count, width))
        return tokens + self.mlp(self.norm_2(tokens))


NETS: dict[str, Callable[[], nn.Module]] = {"convnet": convnet, "vit": VisionTransformer}


def build(net: str, activation: str, seed: int) -> nn.Module:
    """A fresh network, with its ReLUs or with a smooth activation in their place."""
    torch.manual_seed(seed)
    model = NETS[net]()
    if activation != "relu":
        model = smoothify(model, act=activation)
    return with_normalization(model, mean=[MEAN], std=[STD])


class UnshuffledConv2d(nn.Conv2d):
    """A convolution of one channel, as one of stride 1 of all pixels of a stride: ``pixel_unshuffle`` of x and weight.

    Its input gradient takes a quarter of the time on a CPU, which is a third of the time of an attack on these
    networks. The stride has to divide the size of the kernel and that of the padded image.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The same as of ``nn.Conv2d``, but for rounding."""
        (padding, _), (stride, _) = self.padding, self.stride
        padded = F.pad(x, (padding, padding, padding, padding))
        return F.conv2d(_unshuffled(padded, stride), _unshuffled(self.weight, stride), self.bias)


def _unshuffled(x: Tensor, stride: int) -> Tensor:
    """Images (B, 1, H, W) as (B, stride², H / stride, W / stride), in a way whose derivative is quick, too."""
    batch, _, height, width = x.shape
    cells = x.view(batch, height // stride, stride, width // stride, stride)
    return cells.permute(0, 2, 4, 1, 3).reshape(batch, stride**2, height // stride, width // stride)


def quick(model: nn.Module) -> nn.Module:
    """The model itself, its convolutions of one channel turned to :class:`UnshuffledConv2d`; its state stays."""
    for module in model.modules():
        if type(module) is nn.Conv2d and module.in_channels == 1:
            module.__class__ = UnshuffledConv2d
    return model
