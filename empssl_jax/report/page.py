"""Fills the templates of the report's page."""

from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from empssl_jax.config.errors import counted
from empssl_jax.evaluation.effective_rank import Spectrum
from empssl_jax.evaluation.embeddings import embedding_dim
from empssl_jax.report.charts import MAP_SIDE, Curve, Map, curve, map_of
from empssl_jax.report.findings import Findings, Neighbours, map_classes
from empssl_jax.report.pictures import PatchSheet, as_grid, data_uri, sprite, thumbnail
from empssl_jax.report.remarks import remarks
from empssl_jax.report.run import Run
from empssl_jax.report.tables import (
    class_rows,
    command,
    duration,
    flags,
    numbers,
    options,
    percent,
    results_by_dataset,
    worst_pairs,
)

TEMPLATES = Path(__file__).parent / "templates"
MATRIX_CLASSES = 20  # a larger confusion matrix would not be readable

# Published top-1 and top-5 accuracies, as fractions, of a full ResNet-18 after one epoch on all original images. They
# are not measured here.
PUBLISHED = {
    "cifar10": [
        ("PyTorch Lightning reference, kNN", 0.743, 0.971),
        ("PyTorch Lightning reference, linear", 0.821, 0.992),
        ("the paper's abstract, linear", 0.851, None),
        ("the authors' code, linear", 0.842, None),
    ]
}


def render(run: Run, sheet: PatchSheet | None, findings: Findings | None, spectrum: Spectrum | None) -> str:
    """Returns the page, as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {filter.__name__: filter for filter in (percent, duration, data_uri, flags, counted)}
    context: dict[str, Any] = {
        "run": run,
        "name": run.folder.resolve().name,
        "remarks": remarks(run, findings, spectrum),
        "curves": _curves(run),
        "numbers": numbers(run),
        "sheet": _sheet_rows(run, sheet),
        "results": results_by_dataset(run.results),
        "published": PUBLISHED.get(run.config.data.dataset, []),
        "dimension": _dimension(run),
        "options": options(run.config),
        "command": command(run.config),
        "findings": findings,
        "spectrum": spectrum,
        "spectrum_curve": None if spectrum is None else _spectrum_curve(spectrum),
    }
    if findings is not None:
        context |= _about_embeddings(run, findings)
    return environment.get_template("report.html").render(context)


def _dimension(run: Run) -> int:
    """E of the embeddings in the run's folder, which can be older than the config; else of those to come."""
    if run.all_embeddings is None:
        return embedding_dim(run.config)
    return run.all_embeddings.test.embeddings.shape[1]


def _curves(run: Run) -> list[Curve]:
    """The curves of the training; those without data are left out."""
    steps, metrics = run.steps, run.metrics
    drawn = [
        curve("Loss", steps, metrics["loss"], _short, "What training minimises. It is negative; its two parts follow."),
        curve(
            "Coding rate",
            steps,
            metrics["coding_rate_fraction"],
            _short_percent,
            "How far apart the images are: 0 % if all look the same to the network (collapse), 100 % if they differ "
            "as much as possible.",
        ),
        curve(
            "Similarity",
            steps,
            metrics["similarity"],
            lambda value: f"{value:.3f}",
            "How similar the patches of one image look to the network; 1 means identical.",
        ),
        curve("Learning rate", steps, metrics["learning_rate"], _short, "The size of the optimizer's steps."),
        curve(
            "Throughput",
            steps,
            metrics["throughput"],
            lambda value: f"{value:,.0f}",
            "Patches per second, averaged over ten steps. The first step, which includes compilation, is left out.",
        ),
        curve(
            "Online probe",
            [probe["seconds"] for probe in run.probes],
            [probe["top1"] for probe in run.probes],
            _short_percent,
            "kNN accuracy during training, with fewer images and patches than at the end and therefore lower.",
            x_name="second",
        ),
        curve(
            "Effective rank",
            [probe["step"] for probe in run.probes],
            [probe["effective_rank"] for probe in run.probes],
            lambda value: f"{value:.1f}",
            "Number of directions that the embeddings of the online probe's training images use. It needs no labels.",
        ),
    ]
    return [one for one in drawn if one is not None]


def _sheet_rows(run: Run, sheet: PatchSheet | None) -> list[dict[str, Any]]:
    if sheet is None:
        return []
    assert run.datasets is not None
    labels = run.datasets.train.labels
    return [
        {
            "index": int(index),
            "label": run.class_names[labels[index]] if labels[index] >= 0 else "no label",
            "image": data_uri(thumbnail(image)),
            "patches": data_uri(as_grid(patches[None]), exact=True),
            "count": len(patches),
        }
        for index, image, patches in zip(sheet.indices, sheet.images, sheet.patches, strict=True)
    ]


def _spectrum_curve(spectrum: Spectrum) -> Curve | None:
    values = spectrum.values
    above_rounding = values > 1e-6 * values[0]
    return curve(
        "Spectrum",
        np.arange(1, len(values) + 1)[above_rounding],
        values[above_rounding] / max(values[0], 1e-30),
        lambda value: f"{value:.3g}",
        "Size of the embeddings along each direction, in descending order, as a fraction of the largest.",
        x_name="direction",
        logarithmic=True,
        mark=(spectrum.effective_rank, f"effective rank {spectrum.effective_rank:.1f}"),
    )


def _about_embeddings(run: Run, findings: Findings) -> dict[str, Any]:
    assert run.embeddings is not None
    labels, names, shown = run.embeddings.test.labels, run.class_names, findings.map_images
    classes = map_classes(labels)
    rows = class_rows(findings.confusion, names)
    maps: list[Map] = [
        map_of(title, points, labels[shown], findings.predicted[shown] != labels[shown], classes, names)
        for title, points in findings.maps.items()
    ]
    pictures = None
    if run.datasets is not None and maps:
        pictures = sprite([run.datasets.test.images[i] for i in shown])
    return {
        "maps": maps,
        "map_side": MAP_SIDE,
        "map_classes": [names[c] for c in classes],
        "map_points": [[int(i), names[labels[i]], names[findings.predicted[i]]] for i in shown],
        "sprite": pictures,
        "examples": [_example(run, one) for one in (*findings.right, *findings.wrong)] if run.datasets else [],
        "class_rows": rows,
        "matrix": len(rows) <= MATRIX_CLASSES,
        "pairs": worst_pairs(findings.confusion, names),
    }


def _example(run: Run, example: Neighbours) -> dict[str, Any]:
    assert run.datasets is not None
    train, test, names = run.datasets.bank, run.datasets.test, run.class_names
    label = test.labels[example.image]
    return {
        "image": data_uri(thumbnail(test.images[example.image])),
        "index": example.image,
        "label": names[label],
        "predicted": names[example.predicted],
        "right": bool(label == example.predicted),
        "neighbours": [
            {
                "image": data_uri(thumbnail(train.images[i])),
                "label": names[train.labels[i]],
                "same": bool(train.labels[i] == label),
                "similarity": f"{similarity:.2f}",
            }
            for i, similarity in zip(example.indices, example.similarities, strict=True)
        ],
    }


def _short(value: float) -> str:
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def _short_percent(fraction: float) -> str:
    """Like `percent`, without a trailing zero."""
    return percent(fraction).replace(".0 %", " %")
