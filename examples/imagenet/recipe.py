"""What a run is: everything that decides the trained weights, in one frozen value, read from YAML.

A file holds one experiment of the thesis in several forms. A form is laid over ``all`` of its file, which is laid over
``recipes/common.yaml``; what the command line sets is laid over that. There are no other defaults.
"""

import difflib
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

FOLDER = Path(__file__).parents[1] / "recipes"
FORMS = ("thesis", "author_code", "pixel")
NO_RECIPES = ("common", "differences")  # the other files of the folder


class RecipeError(ValueError):
    """A recipe that does not exist, is misspelt, or cannot be run."""


def _number(value: object) -> object:
    """Fractions are written as the papers write them: 4/255."""
    if not isinstance(value, str) or "/" not in value:
        return value
    try:
        return float(Fraction(value))
    except ZeroDivisionError:
        raise ValueError("a fraction of 0") from None


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Channels = tuple[Number, Number, Number]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Model(_Part):
    """What is trained.

    Attributes:
        name: Of timm.
        pretrained: Start from timm's weights, which are downloaded.
        starts_from: The recipe whose result is to be given as ``weights``; null if there is none.
        weights: A checkpoint or an exported file to start from.
        activation: What takes the place of ReLU; null leaves the model as it is.
        mode: Of all modules while they are trained. ``eval`` freezes the statistics of BatchNorm and switches dropout
            off.
        options: What timm builds the model with.
    """

    name: str
    pretrained: bool
    starts_from: str | None
    weights: Path | None
    activation: Literal["gelu", "silu"] | None
    mode: Literal["train", "eval"]
    options: dict[str, Any]


class Data(_Part):
    """Images and labels.

    Attributes:
        inputs: What the model is given: images ``normalized`` by the loader, as published, or ``pixel`` values in [0,
            1] that its first layer normalises.
        mean: Of each channel, in pixels.
        std: Of each channel, in pixels.
        size: Height and width.
        crop_scale: Smallest and largest share of an image that a training crop takes.
        hflip: Probability of a horizontal flip.
        interpolation: Of crops.
        auto_augment: In timm's notation.
        erase: Probability that a rectangle is erased, after normalisation, so that pixels may leave [0, 1].
        erase_mode: With what; ``pixel`` is normal noise.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of cutmix; 0 for none.
        mixup_switch: Probability of cutmix where both are on.
        label_smoothing: Of the labels, mixed or not.
        eval_crop: Share of the shorter side that a validation image keeps.
    """

    inputs: Literal["normalized", "pixel"]
    mean: Channels
    std: Channels
    size: Annotated[int, Field(gt=0)]
    crop_scale: tuple[Share, Share]
    hflip: Share
    interpolation: Literal["bicubic", "bilinear", "random"]
    auto_augment: str | None
    erase: Share
    erase_mode: Literal["const", "rand", "pixel"]
    mixup: NonNegative
    cutmix: NonNegative
    mixup_switch: Share
    label_smoothing: Share
    eval_crop: Share


class Batch(_Part):
    """The batch of an optimiser step.

    Attributes:
        total: Images of a step, over all processes and parts.
        accumulation: Parts that a process takes one after the other.
        reduction: Whether the gradients of the parts are averaged, or added up as published: clipping sees the sum.
    """

    total: Annotated[int, Field(gt=0)]
    accumulation: Annotated[int, Field(gt=0)]
    reduction: Literal["mean", "sum"]

    def of_a_part(self, processes: int) -> int:
        """Images of one part of one process; an error if the batch cannot be shared so."""
        parts = processes * self.accumulation
        if self.total % parts:
            raise RecipeError(
                f"batch: {self.total} images cannot be shared by {processes} processes of {self.accumulation} parts "
                f"each. Set batch.total to a multiple of {parts}, or batch.accumulation."
            )
        return self.total // parts


class Optimizer(_Part):
    """The optimiser.

    Attributes:
        name: Of timm.
        lr: Peak learning rate.
        lr_batch: The batch for which ``lr`` is meant: it is multiplied by ``batch.total / lr_batch``. Null for no
            scaling.
        weight_decay: Of all parameters but biases, vectors and what the model itself exempts.
        eps: Of Adam.
        clip_grad: Largest norm of the gradient of a step; null for none.
    """

    name: str
    lr: Positive
    lr_batch: Annotated[int, Field(gt=0)] | None
    weight_decay: NonNegative
    eps: Positive
    clip_grad: Positive | None


class Schedule(_Part):
    """The learning rate: linear warm-up, then a cosine over all epochs, constant within an epoch."""

    epochs: Annotated[int, Field(gt=0)]
    warmup_epochs: Count
    warmup_lr: NonNegative
    min_lr: NonNegative


class Ramp(_Part):
    """A factor of a weight: ``start`` at first, rising by ``per_epoch``, iteration by iteration, up to ``end``."""

    start: NonNegative
    per_epoch: NonNegative
    end: NonNegative

    @model_validator(mode="after")
    def _rises(self) -> "Ramp":
        if self.end < self.start or (self.end > self.start) != (self.per_epoch > 0):
            raise ValueError(f"a ramp from {self.start} to {self.end} cannot rise by {self.per_epoch} per epoch")
        return self


class GradNorm(_Part):
    """The gradient-norm penalty (equation 4.1 of the thesis).

    Attributes:
        weight: Of the penalty, at the end of its ramp.
        eps: Radius in pixels of [0, 1].
        sigma: The one standard deviation by which eps is divided where inputs are normalised; null takes each
            channel's own.
        ramp: Of the weight.
    """

    weight: Positive
    eps: Positive
    sigma: Positive | None
    ramp: Ramp


class Edges(_Part):
    """The alignment of an input gradient with the image's edges (equations 5.1 and 5.2).

    Attributes:
        weight: Of one minus the cosine, before the ramp.
        ramp: Factor of the weight.
        energy: The edge map: the text's, or that of the released code.
        sigma: Width of the edge filter in pixels.
        level: One cosine for each image, or one for each part of a batch.
        temperature: Of the class whose logit is differentiated, drawn from the prediction; null differentiates the
            loss.
    """

    weight: Positive
    ramp: Ramp
    energy: Literal["oriented", "contour"]
    sigma: Positive
    level: Literal["sample", "batch"]
    temperature: Positive | None


class Attack(_Part):
    """The attack of adversarial training.

    Attributes:
        kind: ``pgd``, from a random start; or ``nfgsm``: one step of eps from noise of twice that size, not projected.
        eps: Radius in pixels.
        steps: Gradient steps.
        step_size: In pixels, at the end of the warm-up.
        warmup_epochs: Epochs e < warmup_epochs take steps of ``step_size * e / warmup_epochs``.
        best: Train on the ``last`` point, on each ``sample``'s own best, or on the best point of the whole ``batch``,
            as the released code does.
        final_check: Give the last point to the model without normalisation when it is compared with the best of the
            others: a slip of the released code that is part of its results.
    """

    kind: Literal["pgd", "nfgsm"]
    eps: Positive
    steps: Annotated[int, Field(gt=0)]
    step_size: Positive
    warmup_epochs: Count
    best: Literal["last", "sample", "batch"]
    final_check: Literal["normalized", "raw"]


class Objective(_Part):
    """What is minimised: the loss, with penalties, on clean or on attacked images.

    Attributes:
        loss_weight: Of the cross-entropy.
        grad_norm: Null for none.
        edges: Null for none.
        attack: Null trains on clean images.
        differentiation: How the penalties' gradients reach the weights.
    """

    loss_weight: NonNegative
    grad_norm: GradNorm | None
    edges: Edges | None
    attack: Attack | None
    differentiation: Literal["exact", "finite_difference"]


class Validation(_Part):
    """PGD on validation images after every so many epochs, for the raw and the averaged weights."""

    every: Annotated[int, Field(gt=0)]
    eps: Positive
    steps: Annotated[int, Field(gt=0)]
    step_size: Positive
    images: Annotated[int, Field(gt=0)] | None


class Recipe(_Part):
    """A run.

    Attributes:
        recipe: Name of the file.
        form: Which form of it.
        title: What it is.
        published: Results, with their source.
        notes: What the sources leave open, or cannot be expressed.
        ema: Decay of the averaged weights, per step; null for none.
        precision: Of the forward pass.
        seed: Of everything random.
    """

    recipe: str
    form: Literal["thesis", "author_code", "pixel"]
    title: str
    published: dict[str, Any]
    notes: list[str]
    model: Model
    data: Data
    batch: Batch
    optimizer: Optimizer
    schedule: Schedule
    objective: Objective
    ema: Annotated[Number, Field(gt=0, lt=1)] | None
    validation: Validation
    precision: Literal["float32", "bfloat16", "float16"]
    seed: Count

    @property
    def penalized(self) -> bool:
        """Whether anything is differentiated with respect to the input, and that to the weights."""
        return self.objective.grad_norm is not None or self.objective.edges is not None

    @model_validator(mode="after")
    def _possible(self) -> "Recipe":
        grad_norm, edges, attack = self.objective.grad_norm, self.objective.edges, self.objective.attack
        if self.data.inputs == "pixel" and grad_norm is not None and grad_norm.sigma is not None:
            raise ValueError("objective.grad_norm.sigma is for normalized inputs; with pixel inputs set it to null")
        if self.data.inputs == "pixel" and attack is not None and attack.final_check == "raw":
            raise ValueError("objective.attack.final_check: raw is a slip with normalized inputs, set normalized")
        if attack is not None and attack.final_check == "raw" and attack.best != "batch":
            raise ValueError(
                f"objective.attack.final_check: raw is what best: batch compares with, and best is {attack.best}; set "
                "normalized"
            )
        if attack is not None and attack.kind == "nfgsm":
            plain = attack.steps, attack.step_size, attack.warmup_epochs, attack.best
            if plain != (1, attack.eps, 0, "last"):
                raise ValueError(
                    "objective.attack: nfgsm takes one full step; set steps: 1, step_size as eps, warmup_epochs: 0, "
                    "best: last"
                )
        if not self.objective.loss_weight and not self.penalized:
            raise ValueError("objective.loss_weight is 0 and there is no penalty: nothing would be trained")
        if self.objective.differentiation != "exact" and not self.penalized:
            raise ValueError("objective.differentiation: there is no penalty to differentiate, set exact")
        if edges is not None and self.objective.differentiation != "exact" and grad_norm is None:
            raise ValueError("objective.differentiation: finite differences take their step from grad_norm, add it")
        if self.model.starts_from and self.model.pretrained:
            raise ValueError("model.pretrained and model.starts_from are two beginnings, keep one")
        return self

    def settings(self) -> dict[str, Any]:
        """All that decides the trained weights, as plain values."""
        return self.model_dump(mode="json", exclude={"published", "notes", "title", "validation"})

    def __str__(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def names() -> list[str]:
    """The recipes that there are."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in NO_RECIPES)


def load(name: str, form: str, changes: Iterable[str] = ()) -> Recipe:
    """A recipe in one of its forms.

    Args:
        name: Of a file in ``recipes``, or the path of another.
        form: One of ``FORMS``.
        changes: ``section.key=value``, the value in YAML.

    Raises:
        RecipeError: If there is no such recipe, form or key, or what they say is impossible; it names the key.
    """
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.exists() or name in NO_RECIPES:
        raise RecipeError(f"There is no recipe {name!r}{_instead(name, names())}; there are {', '.join(names())}.")
    content = _read(path.read_text(), path.name)
    known = ("title", "published", "all", *FORMS)
    for key in content.keys() - set(known):
        raise RecipeError(f"{path.name}: there is no key {key}{_instead(key, known)}")
    for key in ("title", "published"):
        if key not in content:
            raise RecipeError(f"{path.name}: {key} is missing")
    if form not in FORMS or form not in content:
        raise RecipeError(f"{path.name} has no form {form!r}; it has {', '.join(f for f in FORMS if f in content)}.")
    values = _read((FOLDER / "common.yaml").read_text(), "common.yaml")
    for layer in (content.get("all") or {}, content[form] or {}):
        values = _laid_over(values, layer)
    values |= {"recipe": path.stem, "form": form, "title": content["title"], "published": content["published"]}
    for change in changes:
        if change.split("=")[0] in ("recipe", "form"):
            raise RecipeError(f"{change!r}: recipe and form are chosen by their names, not set.")
        values = _laid_over(values, _nested(change))
    return parse(values, path.name)


def parse(values: Mapping[str, Any], source: str) -> Recipe:
    """The recipe that these values are, or an error that names what is wrong with them."""
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        raise RecipeError("\n".join(f"{source}: {_told(part, values)}" for part in error.errors())) from None


def _told(part: Any, values: Mapping[str, Any]) -> str:
    """One complaint of pydantic, with what stands nearest to a misspelt key."""
    key = ".".join(map(str, part["loc"]))
    if part["type"] == "extra_forbidden":
        return f"there is no key {key}{_instead(str(part['loc'][-1]), _keys_at(part['loc'][:-1]))}"
    if part["type"] == "missing":
        return f"{key} is missing"
    found = "" if isinstance(part["input"], Mapping | BaseModel) else f", got {part['input']!r}"
    return f"{key + ': ' if key else ''}{part['msg'].removeprefix('Value error, ')}{found}"


def _read(text: str, source: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{source}: expected keys with values, got {content!r}")
    return content


def _keys_at(place: Iterable[str]) -> list[str]:
    kind: Any = Recipe
    for name in place:
        annotation = kind.model_fields[name].annotation
        kind = next(k for k in (annotation, *getattr(annotation, "__args__", ())) if hasattr(k, "model_fields"))
    return list(kind.model_fields)


def _instead(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key; everything else, null included, replaces what lies below."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _laid_over(result[key], value) if both else value
    return result


def _nested(change: str) -> dict[str, Any]:
    key, separator, text = change.partition("=")
    if not separator or not key:
        raise RecipeError(f"A change is written section.key=value, got {change!r}.")
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{key}: {text!r} is no value in YAML: {error}") from error
    for name in reversed(key.split(".")):
        value = {name: value}
    return value
