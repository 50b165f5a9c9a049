"""One small member, without weights, of every family of classifiers in torchvision and timm.

``python tests/zoo.py`` writes docs/zoo.md: what :func:`gradreg.smoothify` replaces in each and what it leaves, what a
run still meets, and what the exact penalty needs. ``integration/test_zoo.py`` tests the same models; ``make zoo`` does
both for all of them.
"""

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

from gradreg import (
    GradNormPenalty,
    Linf,
    PenalizedLoss,
    PreflightReport,
    Term,
    find_nonsmooth,
    preflight,
    smoothify,
)

LIBRARIES = ", ".join(f"{lib.__name__} {lib.__version__.split('+')[0]}" for lib in (torch, torchvision, timm))
PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"
CLASSES = 10
THESIS = PenalizedLoss(terms={"grad_norm": Term(GradNormPenalty(Linf(4 / 255)), 1.2)}, loss_weight=0.8)


@dataclass(frozen=True)
class Member:
    """A model of one of the two libraries, as small as its family allows.

    Attributes:
        library: ``"timm"`` or ``"torchvision"``.
        name: Its name there.
        image: Height and width of its images.
        options: What it is built with, besides ten classes; no more than is needed for small images, or a small model.
    """

    library: str
    name: str
    image: int = 64
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.library}-{self.name}"

    def build(self) -> nn.Module:
        """The model with fresh weights, always the same, in training mode."""
        with torch.random.fork_rng(), warnings.catch_warnings():
            torch.manual_seed(0)
            warnings.filterwarnings("ignore", message=".*(init_weights|default weight init|scipy).*")
            if self.library == "timm":
                return timm.create_model(self.name, num_classes=CLASSES, **self.options).train()
            return torchvision.models.get_model(self.name, weights=None, num_classes=CLASSES, **self.options).train()

    def batch(self) -> tuple[Tensor, Tensor]:
        """Two images with values in [0, 1], and their labels."""
        generator = torch.Generator().manual_seed(1)
        return torch.rand(2, 3, self.image, self.image, generator=generator), torch.tensor([0, 1])


TINY = {"depth": 2, "embed_dim": 96, "num_heads": 3}
TORCHVISION = [
    Member("torchvision", "alexnet"),
    Member("torchvision", "convnext_tiny"),
    Member("torchvision", "densenet121"),
    Member("torchvision", "efficientnet_b0"),
    Member("torchvision", "googlenet", options={"init_weights": False}),
    Member("torchvision", "inception_v3", image=299, options={"init_weights": False}),
    Member("torchvision", "maxvit_t", image=224),
    Member("torchvision", "mnasnet0_5"),
    Member("torchvision", "mobilenet_v2"),
    Member("torchvision", "mobilenet_v3_small"),
    Member("torchvision", "regnet_y_400mf"),
    Member("torchvision", "resnet18"),
    Member("torchvision", "shufflenet_v2_x0_5"),
    Member("torchvision", "squeezenet1_1"),
    Member("torchvision", "swin_t"),
    Member("torchvision", "swin_v2_t", image=256),  # smaller ones are padded, see test_zoo
    Member("torchvision", "vgg11"),
    Member("torchvision", "vit_b_32", options={"image_size": 64}),
]
TIMM = [
    Member("timm", "beit_base_patch16_224", options={"img_size": 64, **TINY}),
    Member("timm", "halonet_h1", image=256),
    Member("timm", "mobileone_s1"),
    Member("timm", "cait_xxs24_224", options={"img_size": 64}),
    Member("timm", "coat_tiny", options={"img_size": 64}),
    Member("timm", "convit_tiny", options={"img_size": 64}),
    Member("timm", "convmixer_768_32"),
    Member("timm", "convnext_atto"),
    Member("timm", "cpubone_nano"),
    Member("timm", "crossvit_tiny_240"),
    Member("timm", "csatv2", image=128),
    Member("timm", "cs3darknet_focus_s"),
    Member("timm", "cspnext_tiny"),
    Member("timm", "davit_tiny"),
    Member("timm", "deepseek_vit_412m", image=126, options=TINY),
    Member("timm", "deit_tiny_patch16_224", options={"img_size": 64}),
    Member("timm", "densenet121"),
    Member("timm", "dla46x_c"),
    Member("timm", "dpn48b"),
    Member("timm", "edgenext_xx_small"),
    Member("timm", "efficientformer_l1", image=224),
    Member("timm", "efficientformerv2_s0", options={"img_size": 64}),
    Member("timm", "efficientnet_lite0"),
    Member("timm", "efficientvim_m1"),
    Member("timm", "efficientvit_b0"),
    Member("timm", "efficientvit_m0", options={"img_size": 64}),
    Member("timm", "vit_tiny_patch16_dinov3_qkvb", options={"img_size": 64}),
    Member("timm", "fasternet_t0"),
    Member("timm", "fastvit_t8"),
    Member("timm", "focalnet_tiny_srf"),
    Member("timm", "gcvit_xxtiny", options={"img_size": 64}),
    Member("timm", "gemma4_vit_167m", image=96, options=TINY),
    Member("timm", "ghostnet_050"),
    Member("timm", "hardcorenas_b"),
    Member("timm", "hgnetv2_b0"),
    Member("timm", "hiera_tiny_224", options={"img_size": 64}),
    Member("timm", "sam2_hiera_tiny"),
    Member("timm", "hrnet_w18_small"),
    Member("timm", "iformer_t"),
    Member("timm", "inception_next_atto"),
    Member("timm", "inception_resnet_v2", image=96),
    Member("timm", "inception_v3", image=96),
    Member("timm", "inception_v4", image=96),
    Member("timm", "lcnetv2_small"),
    Member("timm", "levit_128s", options={"img_size": 64}),
    Member("timm", "lowformer_b0"),
    Member("timm", "mambaout_femto"),
    Member("timm", "coatnet_pico_rw_224", options={"img_size": 64}),
    Member("timm", "poolformerv2_s12"),
    Member("timm", "gmlp_ti16_224", options={"img_size": 64}),
    Member("timm", "mobilenetv3_small_050"),
    Member("timm", "mobilenetv5_base"),
    Member("timm", "mobilevit_xxs", options={"img_size": 64}),
    Member("timm", "mvitv2_tiny", options={"img_size": 64}),
    Member("timm", "naflexvit_base_patch16_gap", options=TINY),
    Member("timm", "nasnetalarge", options={"stem_size": 32, "num_features": 1344}),
    Member("timm", "nest_tiny", options={"img_size": 64}),
    Member("timm", "nextvit_small"),
    Member("timm", "nf_regnet_b0"),
    Member("timm", "pit_ti_224", options={"img_size": 64}),
    Member("timm", "pnasnet5large"),
    Member("timm", "pvt_v2_b0"),
    Member("timm", "qwen3_vit_88m", options={"img_size": 64, **TINY}),
    Member("timm", "rdnet_tiny"),
    Member("timm", "regnetx_002"),
    Member("timm", "repghostnet_050"),
    Member("timm", "repvit_m1", options={"img_size": 64}),
    Member("timm", "res2next50"),
    Member("timm", "resnest14d"),
    Member("timm", "resnet18"),
    Member("timm", "resnetv2_18"),
    Member("timm", "rexnet_100"),
    Member("timm", "selecsls42"),
    Member("timm", "legacy_seresnet18"),
    Member("timm", "sequencer2d_s", options={"img_size": 64}),
    Member("timm", "shvit_s1"),
    Member("timm", "skresnet18"),
    Member("timm", "starnet_s050"),
    Member("timm", "swiftformer_xs", options={"img_size": 64}),
    Member("timm", "swin_tiny_patch4_window7_224", options={"img_size": 64}),
    Member("timm", "swinv2_tiny_window16_256", options={"img_size": 64}),
    Member("timm", "swinv2_cr_tiny_224", options={"img_size": 64}),
    Member("timm", "tiny_vit_5m_224"),
    Member("timm", "tnt_s_legacy_patch16_224", options={"img_size": 64}),
    Member("timm", "tresnet_m"),
    Member("timm", "twins_svt_small", options={"img_size": 64}),
    Member("timm", "vgg11_bn"),
    Member("timm", "visformer_tiny", options={"img_size": 64}),
    Member("timm", "vit_tiny_patch16_224", options={"img_size": 64}),
    Member("timm", "vit_tiny_r_s16_p8_224", options={"img_size": 64}),
    Member("timm", "vit_relpos_small_patch16_224", options={"img_size": 64}),
    Member("timm", "samvit_base_patch16_224", options={"img_size": 64, **TINY}),
    Member("timm", "vitamin_small_224", options={"img_size": 64}),
    Member("timm", "volo_d1_224", options={"img_size": 64}),
    Member("timm", "ese_vovnet19b_slim_dw"),
    Member("timm", "legacy_xception"),
    Member("timm", "xception41p"),
    Member("timm", "xcit_nano_12_p8_224", options={"img_size": 64}),
]
ZOO = {str(member): member for member in [*TORCHVISION, *TIMM]}


def logits_of(output: object) -> Tensor:
    """The logits in what a model returns; in training mode torchvision's Inception networks add auxiliary ones."""
    return output if isinstance(output, Tensor) else output.logits  # type: ignore[attr-defined]


def smoothified(model: nn.Module, x: Tensor) -> tuple[nn.Module, list[str]]:
    """The smooth model and what was replaced by what; the list is empty if there is nothing to replace."""
    smooth, report = smoothify(model, x=x, return_report=True)
    return smooth, [f"{entry.old} → {entry.new}" for entry in report.replaced]


def met(model: nn.Module, x: Tensor) -> list[str]:
    """What a run on x meets; guards that changed nothing are left out."""
    return [found.kind for found in find_nonsmooth(model, x) if found.share != 0]


def verdict(report: PreflightReport) -> str:
    """What the exact penalty needs, in a word for each error."""
    words = {
        "fused attention": "math attention",
        "Hardsigmoid": "smoothify",
        "kept": "train mode",
    }
    needs = [next(word for text, word in words.items() if text in error.problem) for error in report.errors]
    return "works" if report.ok else ", ".join(dict.fromkeys(needs))


def counted(things: Iterable[str]) -> str:
    """Things with their numbers, as a cell of the table."""
    return ", ".join(f"{number} {thing}" for thing, number in Counter(things).items()) or "–"


def row(member: Member) -> str:
    """The row of the table for one model."""
    model, (x, y) = member.build(), member.batch()
    smooth, replaced = smoothified(model, x)
    left = [found.kind for found in find_nonsmooth(smooth)]
    cells = [member.library, member.name, counted(replaced), counted(left), counted(met(smooth, x))]
    cells += [verdict(preflight(THESIS, each, x, y)) for each in (model, smooth)]
    return f"| {' | '.join(cells)} |"


HEAD = """# smoothify and the exact penalty on the models of torchvision and timm

One small model of each family, built without weights and run on two random images in training mode:
{libraries}. `make zoo` writes this page (`python tests/zoo.py`) and tests what it says.

* **replaced**: the exchanges that `smoothify(model, x=x)` makes; a dash where nothing has to be replaced.
* **left by type**: the modules of the smooth model that `find_nonsmooth(smooth)` lists by their types.
* **met**: what `find_nonsmooth(smooth, x)` meets in a run, without guards that changed nothing.
* **exact penalty**: the verdict of `preflight` on the model, before and after `smoothify`. *Math attention*: run the
  forward pass under `sdpa_kernel(SDPBackend.MATH)`, or set `fused_attn = False` in timm. *Smoothify*: hard gates have
  no second derivative.

{summary}

| library | model | replaced | left by type | met | exact penalty | after smoothify |
|---|---|---|---|---|---|---|
{rows}
"""


def summary(rows: list[str]) -> str:
    """The table in three sentences."""
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in rows]
    replaced = sum(cell[2] != "–" for cell in cells)
    something = [cell[4] for cell in cells if cell[4] != "–"]
    pools = sum("pool" in cell.lower() for cell in something)
    before, after = (Counter(cell[column] for cell in cells) for column in (5, 6))
    return (
        f"Of {len(cells)} models, {replaced} have activations to replace. After that, a run still meets something in "
        f"{len(something)}, and in {pools} of these it is a max pooling.\nThe exact penalty works as it is on "
        f"{before['works']}, after `smoothify` on {after['works']}, and with math attention on "
        f"{after['works'] + after['math attention']}."
    )


def main() -> None:
    """Write the page."""
    torch.set_num_threads(1)
    rows = [row(member) for member in tqdm(ZOO.values(), desc="zoo", unit="model")]
    PAGE.write_text(HEAD.format(libraries=LIBRARIES, summary=summary(rows), rows="\n".join(rows)))


if __name__ == "__main__":
    main()
