"""Fine-tuning: the division of the images, the step, the command and what it writes."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import empssl_jax
from empssl_jax.config import LabelConfig, ModelConfig
from empssl_jax.config.command_options import FinetuneOptions, ImportOptions, MeasuredData
from empssl_jax.config.errors import UserError
from empssl_jax.data.datasets import Datasets, ImageDataset, load_datasets
from empssl_jax.evaluation.logistic import Classifier
from empssl_jax.finetuning.finetune import _embeds_whole_images, crops_in_scale, divide, epoch_batches, finetune
from empssl_jax.finetuning.supervised_step import Numbers, initial_state, make_step
from empssl_jax.inference.import_weights import import_weights
from empssl_jax.method.encoder import init_encoder
from empssl_jax.method.hyperparameters import count_all_steps
from empssl_jax.run_folder.saved_config import load_config
from empssl_jax.runtime.devices import device_mesh

# 24 images are divided equally among the eight devices.
DATA = MeasuredData(images_per_class=30, test_images_per_class=30)
OPTIONS = FinetuneOptions("runs/x", max_epochs=30, batch_size=24, learning_rate=3e-3, crop_area=0.9, data=DATA)


def dataset(labels):
    return ImageDataset(np.zeros((len(labels), 4, 4, 3), np.uint8), np.int32(labels), ("a", "b", "c"))


def test_a_tenth_of_each_class_is_held_out_of_the_chosen_labels():
    labels = np.random.default_rng(0).permutation(np.repeat([-1, 0, 1], [7, 200, 40]))
    both = Datasets(dataset(labels), dataset(labels), dataset([0, -1, 2]))
    rows = divide(both, dataclasses.replace(OPTIONS, labels=LabelConfig(0.5)))
    np.testing.assert_array_equal(np.bincount(labels[rows.train]), [90, 18])
    np.testing.assert_array_equal(np.bincount(labels[rows.held_out]), [10, 2])
    assert not set(rows.train.tolist()) & set(rows.held_out.tolist())
    np.testing.assert_array_equal(rows.test, [0, 2])


def test_nothing_is_held_out_if_a_class_has_less_than_ten_labels():
    labels = np.repeat([0, 1], [200, 9])
    rows = divide(Datasets(dataset(labels), dataset(labels), dataset([0])), OPTIONS)
    np.testing.assert_array_equal(rows.train, np.arange(209))
    assert len(rows.held_out) == 0


@pytest.mark.parametrize(
    ("train", "test", "found"),
    [
        ([-1, -1], [0], "0 classes and 1 test image"),
        ([0, 0, -1], [0], "1 class and 1 test image"),
        ([0, 1], [-1], "2 classes and 0 test images"),
    ],
)
def test_images_without_labels_are_refused(train, test, found):
    with pytest.raises(UserError, match=f"^RUN runs/x has training images of {found} with labels: give "):
        divide(Datasets(dataset(train), dataset(train), dataset(test)), OPTIONS)


def test_an_epoch_takes_each_image_at_most_once_in_another_order_each_time():
    rows = np.arange(0, 44, 2)
    epochs = [[batch.tolist() for batch in epoch_batches(rows, 5, 3, epoch)] for epoch in (0, 0, 1)]
    assert epochs[0] == epochs[1] != epochs[2]
    for batches in epochs:
        taken = [row for batch in batches for row in batch]
        assert [len(batch) for batch in batches] == [5, 5, 5, 5]
        assert len(set(taken)) == 20
        assert set(taken) <= set(rows.tolist())


def test_crops_are_in_the_scale_of_the_patches(tiny_run):
    """Patches of 16 pixels are crops of 16 of 32 pixels. 0.6 of the area is 24.8 pixels a side."""
    config = load_config(tiny_run)
    options = dataclasses.replace(OPTIONS, crop_area=0.6)
    assert crops_in_scale(config, options, 32)["patch_size"] == 25
    doubled = dataclasses.replace(config, patches=dataclasses.replace(config.patches, patch_size=32))
    assert crops_in_scale(doubled, options, 32)["patch_size"] == 50
    tiny = dataclasses.replace(OPTIONS, crop_area=1e-4)  # 3 of 256 pixels a side are 0.4 pixels of the input
    assert crops_in_scale(config, tiny, 256)["patch_size"] == 1


@pytest.mark.parametrize(("given", "used"), [(None, 32), (7, 7)])
def test_images_are_embedded_in_batches_of_the_run_s_size_or_the_given_one(tiny_run, given, used):
    config, options = load_config(tiny_run), dataclasses.replace(OPTIONS, embedding_batch_size=given)
    assert _embeds_whole_images(config, options, config.data).evaluation.embedding_batch_size == used


def test_the_first_two_steps():
    """Known by hand: with a classifier of zeros, the loss is log C and no gradient reaches the encoder.

    The gradient for the bias is 1 / C minus the share of the class. AdamW's first update has the size of the learning
    rate and the sign of the gradient, which is 0 for the encoder; its kernels decay.
    """
    model = ModelConfig(width=4, hidden_dim=16, projection_dim=8, precision="float32")
    encoder, dim = init_encoder(model, jax.random.key(1)), 4 * (4 + 8 + 16 + 32)  # four cells of four stages
    zeros = Classifier(np.zeros(dim), np.ones(dim), np.zeros((dim, 4)), np.zeros(4))
    sizes, rates = map(jnp.int32, (0, 1, 2)), map(jnp.float32, (0.01, 0.001, 0.5))
    numbers = Numbers(*sizes, *rates)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    labels = np.int32([0, 0, 0, 0, 0, 1, 1, 2])
    step = make_step(model, device_mesh(1), 8, patch_area=1.0, patch_size=8, colours=False)
    batch = images, np.arange(8, dtype=np.int32), labels
    first, loss = step(numbers, initial_state(encoder, zeros, numbers), *batch)
    assert float(loss) == pytest.approx(np.log(4), rel=1e-6)
    # 1/4 - 5/8, 1/4 - 2/8 (zero), 1/4 - 1/8, 1/4
    np.testing.assert_allclose(first.params["classifier"].bias, [0.001, 0, -0.001, -0.001], atol=1e-8)
    for (path, before), after in zip(
        jax.tree.leaves_with_path(encoder.params), jax.tree.leaves(first.params["encoder"]), strict=True
    ):
        is_used = "backbone" in jax.tree_util.keystr(path)
        factor = 1 - 0.01 * 0.5 if is_used and before.ndim > 1 else 1
        np.testing.assert_allclose(after, factor * before, rtol=1e-5, atol=1e-8)
    second, loss = step(numbers, first, *batch)
    assert float(loss) < np.log(4)
    stems = (state.params["encoder"]["backbone"]["stem"]["kernel"] for state in (first, second))
    moved = np.abs(np.subtract(*stems))
    assert 0.001 < moved.max() < 0.01  # the rate has fallen to half of 0.01
    for name in ("hidden", "projector", "projection"):
        np.testing.assert_array_equal(second.params["encoder"][name]["kernel"], encoder.params[name]["kernel"])


@pytest.mark.long
def test_a_step_does_not_depend_on_the_number_of_devices():
    """Compares the moments of AdamW. Its updates turn gradients near 0, which are rounding errors, into whole steps."""
    model = ModelConfig(width=4, hidden_dim=16, projection_dim=8, precision="float32")
    random, dim = np.random.default_rng(0), 4 * (4 + 8 + 16 + 32)
    kernel = random.normal(size=(dim, 3)).astype(np.float32)
    classifier = Classifier(np.zeros(dim), np.ones(dim), kernel, np.zeros(3, np.float32))
    numbers = Numbers(*map(jnp.int32, (0, 1, 2)), *map(jnp.float32, (0.01, 0.001, 0.5)))
    images = random.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    labels = random.integers(0, 3, 16).astype(np.int32)

    def after_a_step(devices):
        encoder = init_encoder(model, jax.random.key(1))
        step = make_step(model, device_mesh(devices), 16, patch_area=0.5, patch_size=8, colours=True)
        state, loss = step(numbers, initial_state(encoder, classifier, numbers), images, np.arange(16), labels)
        return jax.device_get([loss, state.batch_stats, state.optimizer])

    one, eight = (jax.tree.leaves_with_path(after_a_step(devices)) for devices in (1, 8))
    for (path, a), (_, b) in zip(one, eight, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-4 * np.abs(a).max(initial=1e-9), err_msg=str(path))


@pytest.fixture(scope="module")
def tuned(tiny_run, tmp_path_factory):
    """The folder of a fine-tuned encoder: 270 labelled digits, 30 held out, 300 test images."""
    output = tmp_path_factory.mktemp("finetuned") / "all"
    finetune(dataclasses.replace(OPTIONS, run=str(tiny_run), output=str(output)))
    return output


def result_in(folder):
    """The accuracy after the chosen epoch."""
    result, _ = json.loads((folder / "results.json").read_text()).values()
    return result


def test_fine_tuning_keeps_the_best_epoch(tuned):
    """Guessing gives 0.1 ± 0.02.

    After two steps, the run's BatchNorm statistics are far from those of a batch. The logistic regression uses the
    former and fine-tuning the latter, so the accuracy falls at first, and epoch 0, the regression, stays the best.
    """
    best, last = json.loads((tuned / "results.json").read_text()).values()
    assert best["epoch"] == 0
    assert best["top1"] > 0.85
    assert last["epoch"] == 30
    assert last["top1"] > 0.35


def test_what_is_written_gives_the_measured_accuracy(tuned, tmp_path):
    """By the way of a user: import the encoder, embed the test images, apply the classifier."""
    import_weights(ImportOptions(str(tuned / "encoder.safetensors"), str(tmp_path / "run")))
    with safe_open(tuned / "encoder.safetensors", framework="numpy") as file:
        assert file.metadata()["embedding"] == "the whole image, stages, 2x2 cells"
        assert file.metadata()["features"].startswith("means of layer1, layer2, layer3 and layer4;")
    encoder, classifier = empssl_jax.load(tmp_path / "run"), load_file(tuned / "classifier.safetensors")
    test = load_datasets(encoder.config).test
    scores = encoder.embed(test.images) @ classifier["weight"].T + classifier["bias"]
    result = result_in(tuned)
    assert np.mean(np.argmax(scores, axis=1) == test.labels) == pytest.approx(result["top1"], abs=1e-9)


def test_fine_tuning_is_reproducible(tiny_run, tmp_path, capsys):
    for folder in ("first", "second"):
        output = str(tmp_path / folder)
        finetune(dataclasses.replace(OPTIONS, run=str(tiny_run), output=output, max_epochs=2))
    for name in ("encoder.safetensors", "classifier.safetensors"):  # safetensors writes metadata in any order
        first, second = (load_file(tmp_path / folder / name) for folder in ("first", "second"))
        assert first.keys() == second.keys()
        for array in first:
            np.testing.assert_array_equal(first[array], second[array])
    first, second = ((tmp_path / folder / "results.json").read_bytes() for folder in ("first", "second"))
    assert first == second
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert lines[:3] == lines[3:]
    assert all("held-out top-1 " in line for line in lines)


def test_a_command_that_was_interrupted_while_it_wrote_can_run_again(tiny_run, tmp_path, monkeypatch):
    options = dataclasses.replace(OPTIONS, run=str(tiny_run), output=str(tmp_path / "out"), max_epochs=1)

    def interrupted(folder, results):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("empssl_jax.finetuning.finetune.add_results", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(options)
    assert (tmp_path / "out" / "encoder.safetensors").exists()
    finetune(options)
    assert (tmp_path / "out" / "results.json").exists()
    with pytest.raises(UserError, match="is not an empty folder"):
        finetune(options)


def test_a_folder_with_another_encoder_is_refused(tiny_run, tmp_path):
    (tmp_path / "encoder.safetensors").touch()
    with pytest.raises(UserError, match="is not an empty folder"):
        finetune(dataclasses.replace(OPTIONS, run=str(tiny_run), output=str(tmp_path)))


def test_a_fraction_of_the_labels_is_in_the_name_of_the_result(tiny_run, capsys, monkeypatch):
    """0.6 of 8 images of each of nine digits are 5, too few to hold any out.

    The tenth digit, 9, has only test images. The default output is in the run's folder.
    """

    def without_nines(config):
        datasets = load_datasets(config)
        labels = np.where(datasets.bank.labels == 9, -1, datasets.bank.labels)
        return datasets._replace(bank=datasets.bank._replace(labels=labels))

    monkeypatch.setattr("empssl_jax.finetuning.finetune.load_datasets", without_nines)
    # Eight virtual devices take minutes to exchange the many sums of logistic regression.
    monkeypatch.setattr("empssl_jax.finetuning.finetune.device_mesh", lambda: device_mesh(1))
    few = dataclasses.replace(OPTIONS, run=str(tiny_run), max_epochs=1, labels=LabelConfig(0.6), data=MeasuredData())
    results = finetune(few)
    assert list(results) == ["fine-tuned, 60 % of labels", "fine-tuned, last epoch, 60 % of labels"]
    assert results["fine-tuned, 60 % of labels"]["epoch"] == 1
    assert json.loads((tiny_run / "finetuned-0.6" / "finetune.json").read_text())["labels"]["label_fraction"] == 0.6
    out = capsys.readouterr().out
    assert "on 45 labelled images\n" in out
    assert "test images whose class has no training images count as wrong: 1 of 10, such as '9'\n" in out
    assert "held-out" not in out
    with pytest.raises(UserError, match=r"^--output .*finetuned-0.6 is not an empty folder: give a new one"):
        finetune(few)


def test_a_run_without_checkpoints_is_refused(tiny_run, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(tiny_run / "config.json", tmp_path / "run")
    with pytest.raises(UserError, match=r"holds no checkpoint: train first"):
        finetune(dataclasses.replace(OPTIONS, run=str(tmp_path / "run")))
    assert not (tmp_path / "run" / "finetuned-1").exists()


def test_more_steps_than_int32_counts_are_refused():
    assert count_all_steps(21474, 100_000) == 2_147_400_000
    message = "^--max-epochs is 100000: that makes more than 2147483647 steps, so give fewer epochs"
    with pytest.raises(UserError, match=message):
        count_all_steps(21475, 100_000)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"max_epochs": 0}, {"crop_area": 0.0}, {"learning_rate": -1.0}])
def test_options_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(UserError, match=rf"^--{name.replace('_', '-')} is "):
        FinetuneOptions("runs/x", **options)
