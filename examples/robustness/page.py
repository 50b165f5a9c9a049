"""The page: one HTML file that needs no other."""

import base64
import inspect
import io
from collections.abc import Sequence
from html import escape

from matplotlib.figure import Figure
from torch import nn

from gradreg import plots
from gradreg.statistics import EdgeCorrelation

from robustness.claims import FAILS, HOLDS, Answer, Claim
from robustness.findings import Findings, Settings
from robustness.subjects import Images

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; margin: 0.8rem 0; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #e6e6e6; text-align: left; vertical-align: top; }
td:first-child { min-width: 9rem; }
td.number, th.number { text-align: right; white-space: nowrap; } img { max-width: 100%; height: auto; }
figure { margin: 1rem 0; } figcaption { font-size: 0.85rem; color: #555; } dt { font-weight: 600; margin-top: 0.6rem; }
code { font-size: 0.85rem; background: #f4f4f4; padding: 0 0.2rem; } .holds { color: #00664b; }
.not { color: #b03a00; } .open { color: #666; } .note { color: #555; font-size: 0.9rem; }
"""


def write_page(
    findings: dict[str, Findings],
    models: dict[str, nn.Module],
    images: Images,
    settings: Settings,
    answers: Sequence[tuple[Claim, dict[str, Answer]]],
    about: dict[str, str],
) -> str:
    """All of it as HTML.

    Args:
        findings: Of each model.
        models: The models themselves, for the pictures.
        images: What was looked at.
        settings: How.
        answers: To the thesis's claims.
        about: Command, versions and what else says how this came about.
    """
    first = next(iter(findings.values()))
    curves = plots.accuracy_curves({name: f.curve for name, f in findings.items()})
    along = plots.along_attack({name: f.along for name, f in findings.items()}, list(first.along[0.0].values))
    convergence = plots.convergence({name: f.path for name, f in findings.items()})
    sections = [
        f"<h1>Robustness report</h1><p>{len(findings)} models on {first.report.n} images: {escape(images.name)}. "
        f"Perturbations are Linf with eps = {settings.eps:.4g} (pixels in [0, 1]). Intervals hold 95 %: Wilson's of "
        "accuracies, the standard error's of means. They say what other images would change, not what other trainings "
        "would.</p>",
        _section("Accuracy", _accuracies(findings), *_flags(findings)),
        _section("Accuracy against eps", _picture(curves, "PGD-20, by bisection for each image.")),
        _section("What the models look at", *_pictures_of_images(models, images, settings)),
        _section(
            "The thesis's claims",
            f"<p class='note'>Every model is held against {escape(next(iter(findings)))}, image by image; "
            "<em>times</em> are geometric means over images. <em>Holds</em>: the whole interval lies on the side of "
            "the claim. <em>Open</em>: it holds both sides.</p>",
            _claims(answers, list(findings)),
        ),
        _section("Statistics", _statistics(findings), _by_outcome(findings)),
        _section("Distributions", *_distributions(findings)),
        _section(
            "Along an attack",
            _picture(
                along,
                "Means from the images (0) to those of PGD-5 (1) and beyond; curvature by 2 products.",
            ),
        ),
        _section(
            "Whether the power iteration has converged",
            _picture(convergence, "The first batch: medians, and 5 to 95 % of images."),
        ),
        _section("Definitions", _definitions(settings)),
        _section("How this was made", _table(["", ""], [[k, f"<code>{escape(v)}</code>"] for k, v in about.items()])),
    ]
    head = (
        "<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>Robustness report</title>"
        f"<style>{STYLE}</style>"
    )
    body = "\n".join(sections)
    return f"<!DOCTYPE html>\n<html lang='en'><head>{head}</head>\n<body>\n{body}\n</body></html>\n"


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n" + "\n".join(parts) + "</section>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """A table of cells that are HTML already; ``numbers`` puts all but the first column to the right."""
    kind = [""] + [' class="number"' if numbers else ""] * (len(header) - 1)
    head = "".join(f"<th{k}>{cell}</th>" for k, cell in zip(kind, header, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{cell}</td>" for k, cell in zip(kind, row, strict=True)) + "</tr>" for row in rows
    )
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _picture(figure: Figure, caption: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    encoded = base64.b64encode(file.getvalue()).decode()
    text = escape(caption)
    return f"<figure><img alt='{text}' src='data:image/png;base64,{encoded}'><figcaption>{text}</figcaption></figure>"


def _accuracies(findings: dict[str, Findings]) -> str:
    rows = []
    for name, found in findings.items():
        report = found.report
        after = [str(result.after) for result in report.attacks.values()]
        rows.append(
            [escape(name), str(report.clean_accuracy), *after, str(report.robust_accuracy), f"{report.seconds:.0f} s"]
        )
    attacks = [f"after {escape(attack)}" for attack in next(iter(findings.values())).report.attacks]
    return _table(["model", "clean", *attacks, "robust", "time"], rows, numbers=True)


def _flags(findings: dict[str, Findings]) -> list[str]:
    found = [f"{escape(name)}: {escape(str(flag))}" for name, f in findings.items() for flag in f.report.raised]
    if not found:
        return ["<p class='note'>No sign of gradient masking was seen.</p>"]
    return ["<p>Signs of gradient masking:</p><ul>" + "".join(f"<li>{flag}</li>" for flag in found) + "</ul>"]


def _pictures_of_images(models: dict[str, nn.Module], images: Images, settings: Settings) -> list[str]:
    x, y = images.examples(4)
    gradients = plots.gradients(models, x, y)
    perturbations = plots.perturbations(models, x, y, settings.grouping)
    scatter = plots.edge_scatter(models, x[:1], y[:1], EdgeCorrelation(edges_only=True))
    return [
        _picture(gradients, "Gradient of the margin; one colour range for each model, to its 99 % quantile."),
        _picture(perturbations, "What PGD-10 changes; the colours range to the largest change."),
        _picture(scatter, "Every pixel of the first image that has an edge."),
    ]


def _claims(answers: Sequence[tuple[Claim, dict[str, Answer]]], labels: Sequence[str]) -> str:
    colors = {HOLDS: "holds", FAILS: "not"}

    def cell(answer: Answer | None) -> str:
        if answer is None:
            return ""
        return f"<span class='{colors.get(answer.verdict, 'open')}'>{answer.verdict}</span><br>{escape(answer.here)}"

    rows = []
    for claim, of_models in answers:
        published = f"<br><span class='note'>{escape(claim.published)}</span>" if claim.published else ""
        statement = f"{escape(claim.statement)} <span class='note'>({escape(claim.where)})</span>{published}"
        rows.append([statement, *(cell(of_models.get(label)) for label in labels)])
    return _table(["claim, and what is published", *map(escape, labels)], rows)


def _statistics(findings: dict[str, Findings]) -> str:
    first = next(iter(findings.values())).measurements
    rows = []
    for name in first.values:
        cells = []
        for found in findings.values():
            s = found.measurements.summary(name)
            low, high = s.interval
            scale = (
                s.log10.n == s.n and s.lowest >= 0 and first.units[name] not in ("correlation", "share of coordinates")
            )
            log = f"<br>log10 {s.log10.mean:.2f} ± {s.log10.std:.2f}" if scale else ""
            undefined = f"<br>{s.undefined} undefined" if s.undefined else ""
            interval = f"<br>({low:.3g} to {high:.3g})"
            cells.append(f"{s.mean:.3g}{interval}<br>median {s.quantile(0.5):.3g}{log}{undefined}")
        rows.append([f"{escape(name)}<br><span class='note'>{escape(first.units[name])}</span>", *cells])
    return _table(["mean (95 %), median, log10", *map(escape, findings)], rows, numbers=True)


def _by_outcome(findings: dict[str, Findings]) -> str:
    name = "gradient, L1 norm"
    rows = []
    for label, found in findings.items():
        groups = [found.measurements.summary(name, group) for group in ("all", "robust", "fooled")]
        cells = [f"{s.mean:.3g} (n = {s.n})" if s.n else "none" for s in groups]
        rows.append([escape(label), *cells, str(found.measurements.robust_accuracy)])
    head = ["mean L1 norm of the gradient", "all images", "robust to PGD-10", "not robust", "PGD-10 accuracy"]
    return _table(head, rows, numbers=True)


def _distributions(findings: dict[str, Findings]) -> list[str]:
    measured = {name: f.measurements for name, f in findings.items()}
    sizes = plots.gradient_sizes({name: f.histograms["all"] for name, f in findings.items()})
    pictures = [_picture(sizes, "Entries of the loss's gradient, all images and channels.")]
    for name, caption in (
        ("gradient, L1 norm", "L1 norm of the loss's gradient"),
        ("normalised curvature", "Normalised curvature"),
        ("local linearity error", "Local linearity error"),
        (
            "edge correlation of the loss's gradient, edge pixels",
            "Edge correlation of the loss's gradient, pixels that have an edge",
        ),
    ):
        pictures.append(_picture(plots.distributions(measured, name), f"{caption}; a line marks each median."))
    return pictures


def _definitions(settings: Settings) -> str:
    items = []
    definitions = settings.definitions
    for name, statistic in settings.statistics.items():
        first = (inspect.getdoc(statistic) or "").split("\n\n")[0].replace("\n", " ")
        unit = f", in {statistic.unit}" if getattr(statistic, "unit", "") else ""
        items.append(
            f"<dt>{escape(name)}{escape(unit)}</dt><dd>{escape(first)}<br><code>{escape(definitions[name])}</code></dd>"
        )
    return "<dl>" + "".join(items) + "</dl>"
