"""Fine-tunes a run's encoder with a linear classifier on labelled images, and measures both on the test images."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from empssl_jax.config import Config, DataConfig
from empssl_jax.config.command_options import RUN, FinetuneOptions
from empssl_jax.config.errors import DivergenceError, UserError, counted
from empssl_jax.data.datasets import Datasets, ImageDataset, load_datasets
from empssl_jax.evaluation.accuracy import classifier_accuracy, print_unknown_classes
from empssl_jax.evaluation.embeddings import (
    LabelledEmbeddings,
    batch_size_of,
    embed_images,
    make_embed,
    whole_image_size,
)
from empssl_jax.evaluation.few_labels import chosen_rows, random_of_each_class
from empssl_jax.evaluation.logistic import fit_classifier
from empssl_jax.evaluation.measured_images import measured_images
from empssl_jax.evaluation.trained_encoder import restore_encoder
from empssl_jax.finetuning.supervised_step import (
    CELLS,
    LAYER,
    Numbers,
    SupervisedState,
    initial_state,
    make_step,
)
from empssl_jax.inference.export_weights import write_encoder
from empssl_jax.inference.image_encoder import ImageEncoder
from empssl_jax.inference.weight_files import write_weights
from empssl_jax.method.crops import crop_side
from empssl_jax.method.encoder import EncoderState
from empssl_jax.method.hyperparameters import count_all_steps
from empssl_jax.method.random_keys import finetuning_order_key, held_out_key
from empssl_jax.run_folder.results import RESULTS_FILE, Accuracy, add_results, format_table, of_labels, on_dataset
from empssl_jax.run_folder.saved_config import load_config
from empssl_jax.run_folder.workdir import LOCK_FILE, locked
from empssl_jax.runtime.atomic_write import write_text
from empssl_jax.runtime.devices import device_mesh

OPTIONS_FILE = "finetune.json"  # written first
HELD_OUT = 10  # one labelled image out of so many helps to choose the epoch

Embed = Callable[[EncoderState, ImageDataset, Int[np.ndarray, " K"]], Float[np.ndarray, "K E"]]
Measure = Callable[[SupervisedState, ImageDataset, Int[np.ndarray, " K"]], Accuracy]


class Rows(NamedTuple):
    """Indices of labelled images, ascending."""

    train: Int[np.ndarray, " N"]  # of the bank
    held_out: Int[np.ndarray, " M"]  # of the bank; none if this would leave a class without one
    test: Int[np.ndarray, " Q"]  # of the test images


class FineTuned(NamedTuple):
    """The state after an epoch, which is counted from 1; 0 is the classifier of the run's own embeddings."""

    state: SupervisedState
    epoch: int
    held_out_accuracy: float  # NaN without held-out images


def finetune(options: FinetuneOptions) -> dict[str, Accuracy]:
    """Fine-tunes, measures, and writes weights, options and results into a new folder.

    Held-out training images choose the epoch; without them, it is the last. An interrupted command can run again:
    results.json is written last.

    Raises:
        UserError: the run or the checkpoint does not exist or is damaged, its images have no labels, or the output
            folder is not empty.
        DivergenceError: the loss is NaN or infinite.
    """
    run, mesh = Path(options.run), device_mesh()
    trained = load_config(run, RUN)
    output = Path(options.output or run / f"finetuned-{options.labels.label_fraction:g}")
    _check_empty(output)
    measured = measured_images(options.data, trained.data, run)
    encoder = restore_encoder(run, options.step, RUN)
    config = _embeds_whole_images(encoder.config, options, measured.data)
    datasets = load_datasets(config)
    bank, rows, embed = datasets.bank, divide(datasets, options), _make_embed(config, mesh)
    numbers = _numbers(options, len(rows.train))
    with locked(output, "output"):
        _check_empty(output)  # again: another command may have filled it meanwhile
        print(f"fine-tuning step {encoder.step} of {run} on {len(rows.train)} labelled images")
        print_unknown_classes(bank.labels[rows.train], datasets.test.labels[rows.test], datasets.test.class_names)
        labelled = LabelledEmbeddings(embed(encoder.state, bank, rows.train), bank.labels[rows.train], bank.class_names)
        state = initial_state(encoder.state, fit_classifier(labelled, mesh).classifier, numbers)
        measure = _make_measure(embed, labelled.labels)
        tuned, last = _fit(config, options, bank, rows, numbers, state, measure, mesh)
        accuracies = {
            name: measure(fitted.state, datasets.test, rows.test) | {"epoch": fitted.epoch}
            for name, fitted in (("fine-tuned", tuned), ("fine-tuned, last epoch", last))
        }
        results = on_dataset(measured.name, of_labels(options.labels, accuracies))
        fine_tuned = ImageEncoder(config, tuned.state.encoder, encoder.step, bank.images.shape[1])
        write_text(output / OPTIONS_FILE, json.dumps(dataclasses.asdict(options), indent=2) + "\n")
        _write_weights(output, fine_tuned, tuned, bank)
        print(format_table(add_results(output, results)))
    print(f"wrote {output}")
    return results


def _check_empty(output: Path) -> None:
    """Raises UserError unless the folder is new, empty, or one in which this command was interrupted."""
    names = {file.name for file in output.iterdir()} if output.is_dir() else set()
    was_interrupted = OPTIONS_FILE in names and RESULTS_FILE not in names
    if output.exists() and not (output.is_dir() and (names <= {LOCK_FILE} or was_interrupted)):
        raise UserError(f"--output {output} is not an empty folder: give a new one, or delete it.")


def _embeds_whole_images(trained: Config, options: FinetuneOptions, data: DataConfig) -> Config:
    """The run's config with other images, and with the embedding that the classifier takes: of whole images."""
    whole: dict[str, Any] = dict(valid_crops="whole", valid_patches=1, embedded_layer=LAYER, cells=CELLS)
    whole["embedding_batch_size"] = options.embedding_batch_size or trained.evaluation.embedding_batch_size
    folders = {name: getattr(options, name) or getattr(trained.run, name) for name in ("data_dir", "cache_dir")}
    return dataclasses.replace(
        trained,
        data=data,
        evaluation=dataclasses.replace(trained.evaluation, **whole),
        run=dataclasses.replace(trained.run, **folders),
    )


def divide(datasets: Datasets, options: FinetuneOptions) -> Rows:
    """Chooses the labelled training images to learn from, and holds out a tenth of each class, unless that is none.

    Raises:
        UserError: fewer than two classes have labelled training images, or no test image has a label.
    """
    labels, test = datasets.bank.labels, np.flatnonzero(datasets.test.labels >= 0)
    chosen = chosen_rows(labels, options.labels)
    sizes = np.unique(labels[chosen], return_counts=True)[1]
    if len(sizes) < 2 or len(test) == 0:
        found = f"training images of {counted(len(sizes), 'class')} and {counted(len(test), 'test image')} with labels"
        raise UserError(
            f"{RUN} {options.run} has {found}: give --dataset, --train-split or --test-split with labelled images."
        )
    if sizes.min() < HELD_OUT:
        return Rows(chosen, chosen[:0], test)
    held_out = chosen[random_of_each_class(held_out_key(options.seed), labels[chosen], 1 / HELD_OUT)]
    return Rows(np.setdiff1d(chosen, held_out), held_out, test)


def _numbers(options: FinetuneOptions, num_images: int) -> Numbers:
    steps_per_epoch = num_images // min(options.batch_size, num_images)
    numbers = (options.seed, steps_per_epoch, count_all_steps(steps_per_epoch, options.max_epochs))
    rates = (options.learning_rate, options.classifier_learning_rate, options.weight_decay)
    return Numbers(*(jnp.array(number, jnp.int32) for number in numbers), *(jnp.float32(rate) for rate in rates))


def _make_embed(config: Config, mesh: Mesh) -> Embed:
    """The function (encoder, images, rows) -> embeddings of these images."""
    embed, batch_size = make_embed(config, mesh), batch_size_of(config.evaluation, mesh)

    def embed_rows(encoder: EncoderState, dataset: ImageDataset, rows: Int[np.ndarray, " K"]) -> np.ndarray:
        indices = rows.astype(np.int32)
        return embed_images(embed, encoder, lambda chosen: dataset.images[rows[chosen]], indices, batch_size, mesh)

    return embed_rows


def _make_measure(embed: Embed, train_labels: Int[np.ndarray, " N"]) -> Measure:
    """The function (state, images, rows) -> accuracy on these images."""

    def measure(state: SupervisedState, dataset: ImageDataset, rows: Int[np.ndarray, " K"]) -> Accuracy:
        scores = state.params["classifier"].logits(embed(state.encoder, dataset, rows))
        return classifier_accuracy(np.asarray(scores), dataset.labels[rows], train_labels)

    return measure


def _fit(
    config: Config,
    options: FinetuneOptions,
    bank: ImageDataset,
    rows: Rows,
    numbers: Numbers,
    state: SupervisedState,
    measure: Measure,
    mesh: Mesh,
) -> tuple[FineTuned, FineTuned]:
    """Runs all epochs, prints a line for each, and returns the best (of equally good ones the last) and the last.

    The best can be that before the first epoch.
    """
    side, size = bank.images.shape[1], min(options.batch_size, len(rows.train))

    def held_out_accuracy(state: SupervisedState) -> float:
        return measure(state, bank, rows.held_out)["top1"] if len(rows.held_out) else math.nan

    best = last = FineTuned(state, 0, held_out_accuracy(state))
    print(f"epoch 0 of {options.max_epochs}: {_shown(last)}", flush=True)
    step = make_step(config.model, mesh, size, colours=options.colours, **crops_in_scale(config, options, side))
    for epoch in range(options.max_epochs):
        losses = []
        for indices in epoch_batches(rows.train, size, options.seed, epoch):
            state, loss = step(numbers, state, bank.images[indices], indices.astype(np.int32), bank.labels[indices])
            losses.append(float(loss))
        if not np.isfinite(losses).all():
            raise DivergenceError(
                f"Epoch {epoch + 1} of fine-tuning has a loss of {losses[-1]}: lower --learning-rate."
            )
        last = FineTuned(state, epoch + 1, held_out_accuracy(state))
        print(f"epoch {epoch + 1} of {options.max_epochs}: loss {np.mean(losses):.4f}, {_shown(last)}", flush=True)
        if not last.held_out_accuracy < best.held_out_accuracy:
            best = last
    return best, last


def _shown(tuned: FineTuned) -> str:
    accuracy = tuned.held_out_accuracy
    return "no image is held out" if math.isnan(accuracy) else f"held-out top-1 {100 * accuracy:.2f}%"


def crops_in_scale(config: Config, options: FinetuneOptions, image_side: int) -> dict[str, Any]:
    """The options of `multi_patch` for square crops that are enlarged as much as the crops of patches are."""
    scale = whole_image_size(image_side, config.patches) / image_side
    size = max(1, round(crop_side(image_side, options.crop_area) * scale))
    return dict(patch_area=options.crop_area, patch_size=size, interpolation=config.patches.interpolation)


def epoch_batches(
    rows: Int[np.ndarray, " N"], batch_size: int, seed: int, epoch: int
) -> Iterator[Int[np.ndarray, " B"]]:
    """The rows in random order, in batches; the last one is left out if it is incomplete."""
    order = rows[np.asarray(jax.random.permutation(finetuning_order_key(seed, epoch), len(rows)))]
    for start in range(0, len(rows) - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


def _write_weights(output: Path, encoder: ImageEncoder, tuned: FineTuned, bank: ImageDataset) -> None:
    """Writes the encoder as `empssl export` does, and the classifier with the names of torch's Linear."""
    write_encoder(output / "encoder.safetensors", encoder, "safetensors")
    classifier = jax.tree.map(np.asarray, tuned.state.params["classifier"])
    weight = (classifier.kernel / classifier.scale[:, None]).T
    arrays = {"weight": weight, "bias": classifier.bias - weight @ classifier.mean}
    metadata = {"class_names": json.dumps(bank.class_names)}
    write_weights(output / "classifier.safetensors", arrays, metadata, "safetensors")
