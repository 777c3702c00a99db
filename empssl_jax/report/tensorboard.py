"""Writes what TensorBoard shows besides curves: the patches that the network saw, and the embedding projector.

Files are written synchronously: tensorboardX's SummaryWriter leaves this to a thread, which hangs on a full disk.
"""

import time
from pathlib import Path

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from empssl_jax.report.findings import Findings
from empssl_jax.report.pictures import PatchSheet, as_grid, encoded, sprite
from empssl_jax.report.run import Run

DIMENSIONS = 50  # principal components for the projector, which reads numbers as text

PROJECTOR_CONFIG = """embeddings {
  tensor_name: "test images"
  tensor_path: "projector/tensors.tsv"
  metadata_path: "projector/metadata.tsv"
"""
SPRITE_CONFIG = """  sprite {{
    image_path: "projector/sprite.png"
    single_image_dim: {side}
    single_image_dim: {side}
  }}
"""


def write_pictures(run: Run, sheet: PatchSheet | None, findings: Findings | None) -> None:
    """Writes the patches and the embeddings, if they are given, into the run's tensorboard/."""
    folder = run.folder / "tensorboard"
    if sheet is not None:
        _write_patches(folder, sheet)
    if findings is not None:
        _write_projector(folder, run, findings)


def _write_patches(folder: Path, sheet: PatchSheet) -> None:
    grid = as_grid(sheet.patches)
    image = Summary.Image(
        height=grid.shape[0], width=grid.shape[1], colorspace=3, encoded_image_string=encoded(grid, exact=True)
    )
    folder.mkdir(exist_ok=True)
    for earlier in folder.glob("events.*.patches"):
        earlier.unlink()
    writer = EventsWriter(str(folder / "events"), ".patches")
    summary = Summary(value=[Summary.Value(tag="patches of the first step", image=image)])
    writer.write_event(Event(wall_time=time.time(), step=0, summary=summary))
    writer.close()


def _write_projector(folder: Path, run: Run, findings: Findings) -> None:
    """Writes the embeddings of the test images on the report's maps, with their classes and thumbnails."""
    assert run.embeddings is not None
    test, shown = run.embeddings.test, findings.map_images
    (folder / "projector").mkdir(parents=True, exist_ok=True)
    vectors = test.embeddings[shown]
    if (size := min(DIMENSIONS, *vectors.shape)) < vectors.shape[1]:
        from sklearn.decomposition import PCA

        vectors = PCA(size, random_state=0).fit_transform(vectors)
    np.savetxt(folder / "projector" / "tensors.tsv", vectors, fmt="%.5g", delimiter="\t")
    names = [" ".join(name.split()) for name in run.class_names]
    rows = [f"{names[test.labels[i]]}\t{names[findings.predicted[i]]}\t{i}" for i in shown]
    table = "\n".join(["class\tkNN\timage", *rows]) + "\n"
    (folder / "projector" / "metadata.tsv").write_text(table, encoding="utf-8")
    config = PROJECTOR_CONFIG
    if run.datasets is not None:
        thumbnails = sprite([run.datasets.test.images[i] for i in shown])
        (folder / "projector" / "sprite.png").write_bytes(encoded(thumbnails.picture, exact=True))
        config += SPRITE_CONFIG.format(side=thumbnails.side)
    (folder / "projector_config.pbtxt").write_text(config + "}\n")
