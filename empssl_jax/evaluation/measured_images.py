"""Which images a run is measured on: its own, wherever they are now, or another data set, and the name of that."""

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from empssl_jax.config import DataConfig
from empssl_jax.config.command_options import MeasuredData
from empssl_jax.config.errors import UserError, flag
from empssl_jax.config.options import TRAIN
from empssl_jax.run_folder.saved_config import load_saved_images


class MeasuredImages(NamedTuple):
    """The images to measure on."""

    data: DataConfig
    name: str | None  # names the results on another data set than the run's; None for the run's own

    def embeddings_folder(self, workdir: Path) -> Path:
        """The run's folder for the embeddings of these images: embeddings/, or a folder of its own in it."""
        if self.name is None:
            return workdir / "embeddings"
        plain = re.sub(r"[^\w.-]+", "-", self.name)
        if plain != self.name or len(plain) > 80:  # two names must not share a folder
            plain = f"{plain[-80:].strip('-.')}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"
        return workdir / "embeddings" / plain


def measured_images(options: MeasuredData, trained: DataConfig, workdir: Path) -> MeasuredImages:
    """The images that the options choose.

    Args:
        options: what the user chose.
        trained: the data of the run.
        workdir: folder of the run.

    Raises:
        UserError: an option has a wrong value, or the run's images.json is damaged.
    """
    chosen = {
        name: value for name, value in dataclasses.asdict(options).items() if not (value is None or value is False)
    }
    size = load_saved_images(workdir).size
    own = trained if options.dataset is None else at_place(trained, options.dataset, workdir)
    if own is None:
        data = dataclasses.replace(DataConfig(image_size=size), **chosen).with_absolute_folder()
    else:
        data = dataclasses.replace(own, **chosen | {"dataset": own.dataset})
        if _comparable(data, size) == _comparable(own, size):
            return MeasuredImages(data, None)
    return MeasuredImages(data, _name(_comparable(data, size), size))


def at_place(trained: DataConfig, dataset: str, workdir: Path) -> DataConfig | None:
    """The run's data with `dataset`, if that is the same data set: of the same name, or a folder of the same images.

    Returns None if it is another one.
    """
    there = dataclasses.replace(trained, dataset=dataset).with_absolute_folder()
    if there.dataset == trained.with_absolute_folder().dataset:
        return there
    if None in (trained.folder, there.folder):
        return None
    from empssl_jax.data.folder_images import folder_fingerprints

    try:
        fingerprints = folder_fingerprints(there)
    except UserError:  # a folder with other splits
        return None
    return there if fingerprints == load_saved_images(workdir).fingerprints else None


def _comparable(data: DataConfig, size: int) -> DataConfig:
    """The data without differences between options that choose the same images."""
    split = None if data.train_split == TRAIN else data.train_split
    return dataclasses.replace(data, strict_images=False, image_size=data.image_size or size, train_split=split)


def _name(data: DataConfig, size: int) -> str:
    """The data set, and the options that differ from their defaults, such as "cifar100, --images-per-class 10"."""
    defaults = dataclasses.asdict(DataConfig(image_size=size))
    values = {name: value for name, value in dataclasses.asdict(data).items() if value != defaults[name]}
    values.pop("dataset", None)
    return ", ".join([data.dataset, *(f"{flag(name)} {value}" for name, value in values.items())])
