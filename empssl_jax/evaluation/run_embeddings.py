"""The embeddings of a run, which are computed once for each checkpoint, data set and way of embedding."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from empssl_jax.config import Config
from empssl_jax.config.errors import UserError
from empssl_jax.data.datasets import Datasets, ImageDataset
from empssl_jax.evaluation.embedding_files import read_origin, read_split, save_embeddings
from empssl_jax.evaluation.embeddings import Embeddings, LabelledEmbeddings, embed_split, make_embed, needs_mirrored
from empssl_jax.method.encoder import EncoderState
from empssl_jax.run_folder.digests import array_digests, text_digest
from empssl_jax.runtime.distributed import is_first_process

VERSION = 1  # raise it with a change that gives other embeddings: those in the folders of runs are then computed again


def run_embeddings(config: Config, encoder: EncoderState, datasets: Datasets, mesh: Mesh, folder: Path) -> Embeddings:
    """The embeddings of the bank and of the test images.

    Those in the folder's train.npz and test.npz are read if they are of the same encoder, images and options.
    Otherwise they are computed and written there; see `embed_images` for the errors raised.
    """
    embed = make_embed(config, mesh)
    encoder_digest = text_digest(array_digests(encoder))
    splits = []  # functions, since all outdated files leave first: an interruption must not mix those of two encoders
    for name, images in datasets.embedded:
        path, origin = folder / f"{name}.npz", _origin(config, encoder_digest, images)
        saved = _saved(path, origin, images, needs_mirrored(config.evaluation, name))
        if saved is None and is_first_process():
            path.unlink(missing_ok=True)
        save = functools.partial(_save, path, origin)
        arguments = images, config.evaluation, mesh, name, saved, save
        splits.append(functools.partial(embed_split, embed, encoder, *arguments))
    return Embeddings(*(split() for split in splits))


def _save(path: Path, origin: str, split: LabelledEmbeddings) -> None:
    if is_first_process():
        save_embeddings(path, split, origin)


def _saved(path: Path, origin: str, images: ImageDataset, with_mirrored: bool) -> LabelledEmbeddings | None:
    """The embeddings in the file, None if they have another origin or the file is missing or damaged."""
    try:
        if read_origin(path) != origin:
            return None
        split = read_split(path, with_mirrored)
    except UserError:
        return None
    print(f"reading {path}: these images have been embedded before")
    return split._replace(labels=images.labels, class_names=images.class_names, names=images.names)


def _origin(config: Config, encoder_digest: str, images: ImageDataset) -> str:
    """A digest of all that embeddings and their labels depend on."""
    arrays = {"images": images.images, "labels": images.labels}
    arrays |= {} if images.names is None else {"names": np.asarray(images.names)}
    parts = {
        "version": VERSION,
        "seed": config.training.seed,
        "encoder": encoder_digest,
        "images": array_digests(arrays),
        "class_names": images.class_names,
    }
    options = (config.model, config.patches, config.evaluation.embedding)
    return text_digest(parts | {type(group).__name__: dataclasses.asdict(group) for group in options})
