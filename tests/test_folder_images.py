"""Folders of pictures: splits, classes, and the same embeddings as from TFDS."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest

from empssl_jax import training
from empssl_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, PatchConfig, RunConfig, TrainingConfig
from empssl_jax.config.command_options import EvaluateOptions
from empssl_jax.config.errors import UserError
from empssl_jax.data.datasets import ImageDataset, load_bank, load_datasets, load_split
from empssl_jax.data.folder_images import hold_out
from empssl_jax.data.image_files import ImageFile, list_images
from empssl_jax.evaluation import embeddings
from empssl_jax.evaluation.evaluate import evaluate
from empssl_jax.method.encoder import init_encoder
from empssl_jax.report.write_report import try_to_report
from empssl_jax.runtime.devices import device_mesh

needs_cifar10 = pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="TFDS_DATA_DIR is not set")


def pixels(name: str, side: int = 8) -> np.ndarray:
    """A different picture for each name."""
    seed = int.from_bytes(hashlib.md5(name.encode()).digest()[:4])
    return np.random.RandomState(seed).randint(0, 256, (side, side, 3)).astype(np.uint8)


def write(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lossless = {"lossless": True} if path.suffix == ".webp" else {}
        PIL.Image.fromarray(pixels(path.name)).save(path, **lossless)
    return root


def load(root, split="train", **options):
    return load_split(DataConfig(dataset=f"folder:{root}", **options), split, None, str(root.parent / "cache"))


def load_both(root, **options):
    return [load(root, split, **options) for split in ("train", "test")]


@pytest.fixture
def root(tmp_path):
    """An empty folder for pictures. Their decoded images go into a folder beside it."""
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


FLAT = [f"{i:03}.png" for i in range(40)]
NESTED = [f"{split}/{animal}/{i}{split}.png" for split in ("train", "test") for animal in "bac" for i in range(4)]


def test_a_folder_with_train_and_test_has_the_classes_of_its_subfolders(root):
    write(root, *NESTED)
    for split in ("train", "test"):
        loaded = load(root, split)
        assert loaded.names.tolist() == [f"{animal}/{i}{split}.png" for animal in "abc" for i in range(4)]
        np.testing.assert_array_equal(loaded.labels, np.repeat([0, 1, 2], 4))
        assert loaded.class_names == ("a", "b", "c")
        np.testing.assert_array_equal(loaded.images, [pixels(name.split("/")[1]) for name in loaded.names])


USUAL_NAMES = ["train test", "train validation", "train val", "train valid", "Train Valid", "TRAIN TEST", "train dev"]
USUAL_NAMES += ["training testing", "Training validation", "train eval", "train_set test_set", "TrainSet TestSet"]
USUAL_NAMES += ["trainset testset", "train-images test-images", "train2017 val2017", "training_data evaluation_data"]


@pytest.mark.parametrize("names", USUAL_NAMES)
def test_splits_are_found_by_the_usual_names(root, names):
    train, test = names.split()
    write(root, *(f"{train}/{i}.png" for i in range(20)), f"{test}/test.png", "elsewhere/4.png")
    train, test = load_both(root)
    assert (len(train.names), test.names.tolist()) == (20, ["test.png"])


@pytest.mark.parametrize("others", [["val"], ["Validation", "val", "dev"]])
def test_a_test_folder_takes_precedence_over_validation_folders(root, others):
    write(root, "train/1.png", "Test/2.png", *(f"{name}/3.png" for name in others))
    assert load(root, "test").names.tolist() == ["2.png"]


CLASSES = [f"{animal}/{i}.png" for animal in ("cat", "dog") for i in range(10)]
CHOICES = {  # files, an option that resolves the ambiguity, and the resulting training, test and class names
    "two training folders": (
        ["train/1.png", "Train/2.png", "test/3.png"],
        {"train_split": "train"},
        (["1.png"], ["3.png"], ()),
    ),
    "another of two": (
        ["train/1.png", "Train/2.png", "test/3.png"],
        {"train_split": "Train"},
        (["2.png"], ["3.png"], ()),
    ),
    "two validation folders": (
        ["train/1.png", "val/2.png", "validation/3.png"],
        {"test_split": "val"},
        (["1.png"], ["2.png"], ()),
    ),
    "a folder beside train": (["train/1.png", "x/2.png"], {"test_split": "x"}, (["1.png"], ["2.png"], ())),
    "prefixes": (
        ["seg_train/a/1.png", "seg_train/b/2.png", "seg_test/a/3.png"],
        {"train_split": "seg_train", "test_split": "seg_test"},
        (["a/1.png", "b/2.png"], ["a/3.png"], ("a", "b")),
    ),
    "splits one level deeper": (
        ["deep/Train/1.png", "deep/Test/2.png"],
        {"train_split": "deep/Train", "test_split": "deep/Test"},
        (["1.png"], ["2.png"], ()),
    ),
}


@pytest.mark.parametrize("case", CHOICES)
def test_ambiguous_splits_are_refused_and_chosen_by_options(root, case):
    files, options, (train, test, classes) = CHOICES[case]
    write(root, *files)
    for split in ("train", "test"):
        with pytest.raises(UserError, match="choose folders with --train-split and --test-split, or give --train-spl"):
            load(root, split)
    assert not (root.parent / "cache").exists()
    loaded = load_both(root, **options)
    assert [split.names.tolist() for split in loaded] == [train, test]
    assert [split.class_names for split in loaded] == [classes, classes]


@pytest.mark.parametrize("name", ["train", "Training", "test", "valid", "Dev"])
def test_a_class_that_is_called_like_a_split_is_refused_until_the_user_says_that_it_is_a_class(root, name):
    write(root, *CLASSES, *(f"{name}/{i}.png" for i in range(10)))
    with pytest.raises(UserError, match=r"--train-split .*if all subfolders are classes"):
        load(root)
    train, test = load_both(root, train_split=".")
    assert train.class_names == test.class_names == tuple(sorted(["cat", "dog", name]))
    assert (len(train.names), len(test.names)) == (27, 3)


def test_train_alone_is_split_and_other_folders_may_hold_no_images(root):
    write(root, *(f"Train/{i}.png" for i in range(20)))
    (root / "labels").mkdir()
    (root / "labels" / "1.txt").write_text("no picture")
    assert [len(loaded.names) for loaded in load_both(root)] == [18, 2]


def test_unlabelled_images_need_no_training_folder_with_labels(root):
    write(root, "loose/1.png", "held/2.png")
    options = {"train_split": "loose", "test_split": "held"}
    train = load(root, **options)
    bank = load_bank(DataConfig(dataset=f"folder:{root}", **options), train, None, str(root.parent / "cache"))
    assert bank.names.tolist() == ["1.png"]


def test_the_labelled_images_cannot_be_the_test_images_of_a_run_on_unlabelled_ones(root):
    write(root, "train/a/1.png", "train/b/2.png", "loose/3.png")
    data = DataConfig(dataset=f"folder:{root}", train_split="loose", test_split="train")
    with pytest.raises(UserError, match=r"^--test-split is 'train': .*from it, since .* 'loose' has no"):
        load_datasets(dataclasses.replace(config_of(root), data=data))


def test_splits_may_have_other_names(root):
    write(root, "train/a/1.png", "train/b/2.png", "loose/3.jpg", "held/b/4.png", "test/b/5.png")
    options = {"train_split": "loose", "test_split": "held"}
    train, test = load(root, **options), load(root, "test", **options)
    assert (train.labels.tolist(), train.num_classes) == ([-1], 2)
    assert (test.labels.tolist(), test.names.tolist()) == ([1], ["b/4.png"])
    bank = load_bank(DataConfig(dataset=f"folder:{root}", **options), train, None, str(root.parent / "cache"))
    assert (bank.labels.tolist(), bank.names.tolist()) == ([0, 1], ["a/1.png", "b/2.png"])


def test_training_and_test_images_of_different_sizes_are_refused_with_the_option_that_helps(root):
    write(root, "train/1.png", "train/2.png")
    (root / "test").mkdir()
    PIL.Image.fromarray(pixels("3.png", side=9)).save(root / "test" / "3.png")
    config = config_of(root)
    message = r"^--dataset 'folder:.*' has images of shapes \[\(8, 8, 3\), \(9, 9, 3\)\]: .*, so give --image-size"
    with pytest.raises(UserError, match=message):
        load_datasets(config)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=8))
    assert {split.images.shape[1:] for split in load_datasets(config)} == {(8, 8, 3)}


def test_image_files_are_found_and_no_others(root, capsys):
    found = ["a.JPG", "b.jpeg", "d.PNG", "deep/er/c.webp", "e.gif", "f.bmp", "g.tiff"]
    write(root, *found, ".hidden.png", ".folder/f.png")
    for name in ("notes.txt", "z.heic", "IMG_1.HEIC", "photo", ".left-out.txt"):
        (root / name).write_text("no picture")
    os.mkfifo(root / "pipe.png")
    (root / "linked.png").symlink_to(root / "pipe.png")
    assert [file.name for file in list_images(root)] == found
    list_images(root)
    assert capsys.readouterr().err == (
        f"left out 6 other files of {root} (images end in .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp): "
        "2 like 'IMG_1.HEIC', 2 like 'linked.png', 1 like 'notes.txt', 1 like 'photo'\n"
    )
    assert (load(root).num_classes, set(load(root).labels.tolist())) == (0, {-1})  # one subfolder is not a class


def test_links_are_followed_but_not_in_circles(root, tmp_path):
    write(tmp_path / "elsewhere", "1.png", "2.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "self").symlink_to(root)
    (tmp_path / "elsewhere" / "up").symlink_to(root)
    assert [file.name for file in list_images(root)] == ["linked/1.png", "linked/2.png"]


def test_links_to_themselves_are_skipped(root, capsys):
    write(root, *FLAT[:3])
    for name in ("loop", "loop.png"):
        (root / name).symlink_to(name)
    assert [file.name for file in list_images(root)] == [*FLAT[:3], "loop.png"]
    assert "left out 1 other file of" in capsys.readouterr().err
    assert sum(len(split.labels) for split in load_both(root)) == 3
    assert "'loop.png' ([Errno 40] Too many levels of symbolic links" in capsys.readouterr().out


def test_without_a_test_folder_a_tenth_is_held_out_whatever_the_order_of_the_files(root, tmp_path):
    write(root, *FLAT)
    backwards = write(tmp_path / "backwards", *reversed(FLAT))
    expected = sorted(sorted(FLAT, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:4])
    for folder in (root, backwards):
        assert [file.name for file in list_images(folder)] == FLAT
        assert load(folder, "test").names.tolist() == expected
        assert load(folder, "train").names.tolist() == sorted(set(FLAT) - set(expected))
    both = hold_out(list_images(root)[::-1])
    assert [file.name for file in both[1]] == expected
    assert [len(part) for part in hold_out(list_images(root)[:2])] == [1, 1]


def images_of(classes):
    """Files in folders of classes, as many of each as the dictionary says."""
    names = [f"{name}/{i}.png" for name, count in classes.items() for i in range(count)]
    return [ImageFile(name, Path(name), 0, 0) for name in names]


@pytest.mark.parametrize(
    ("classes", "num_held"),
    [
        ({f"class{i}": 2 for i in range(100)}, 20),
        ({"cat": 8, "dog": 8, "fox": 8} | {f"rare{i}": 1 for i in range(30)}, 5),
        ({f"rare{i}": 1 for i in range(20)} | {"cat": 2}, 1),  # two of the 22 images would be a tenth
        ({"only": 20}, 2),
    ],
)
def test_the_last_image_of_a_class_is_not_held_out(classes, num_held):
    files = images_of(classes)
    train, test = hold_out(files)
    assert {file.name.split("/")[0] for file in train} == set(classes)
    assert len(test) == num_held
    assert sorted(train + test) == sorted(files)


def test_the_tenth_with_the_lowest_digests_is_held_out_if_it_leaves_every_class_an_image():
    files = images_of({"cat": 20, "dog": 20})
    expected = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest())[:4]
    assert hold_out(files)[1] == sorted(expected)


def test_a_class_of_one_image_is_trained_on(root):
    write(root, *CLASSES, "rare/1.png")
    train, test = load_both(root)
    assert train.class_names == test.class_names == ("cat", "dog", "rare")
    assert "rare/1.png" in train.names
    assert (len(train.names), len(test.names)) == (19, 2)


def test_pictures_of_any_size_are_resized_to_one(root):
    write(root, "a.png", "b.png", "c.png")
    PIL.Image.fromarray(pixels("wide", 40)[:13]).save(root / "wide.png")
    PIL.Image.fromarray(pixels("tall", 40)[:, :17, 0]).save(root / "tall.jpg")
    with pytest.raises(UserError, match=r"has images of shapes .* give --image-size, the side in pixels"):
        load_both(root)
    assert load(root, image_size=12).images.shape == (4, 12, 12, 3)


def test_files_that_cannot_be_decoded_are_listed_and_skipped_or_refused(root, capsys):
    write(root, *NESTED)
    (root / "train" / "a" / "1train.png").write_bytes(b"nonsense")
    (root / "train" / "b" / "nowhere.png").symlink_to(root / "nowhere")
    for _ in range(2):  # decoded, then mapped
        loaded = load(root)
        assert len(loaded.labels) == 11
        assert "a/1train.png" not in loaded.names
        assert loaded.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 4
        shown = capsys.readouterr().out
        assert "skipped 2 of 13 train images that cannot be decoded:" in shown
        assert "'a/1train.png' (no known format)" in shown
        assert "'b/nowhere.png' ([Errno 2] No such file" in shown
    with pytest.raises(UserError, match=r"^--strict-images: 2 of 13 train images .* for example 'a/1train\.png' \(no"):
        load(root, strict_images=True)
    shutil.rmtree(root.parent / "cache")
    with pytest.raises(UserError, match=r"^Image a/1train\.png of pictures train cannot be decoded .* --strict-images"):
        load(root, strict_images=True)
    assert len(load(root, "test").labels) == 12


def test_a_changed_file_is_decoded_again(root):
    write(root, *NESTED)
    before = load(root)
    PIL.Image.fromarray(pixels("new")).save(root / "train" / "a" / "1train.png")
    after = load(root)
    np.testing.assert_array_equal(after.images[1], pixels("new"))
    assert (after.images != before.images).any(axis=(1, 2, 3)).tolist() == [False, True] + [False] * 10


def test_images_per_class_leaves_out_those_without_a_label(root):
    write(root, *NESTED, "train/loose.png")
    loaded = load(root, images_per_class=2)
    assert loaded.names.tolist() == [f"{animal}/{i}train.png" for animal in "abc" for i in range(2)]


def test_names_that_are_not_utf_8_are_accepted(root):
    write(root, *FLAT)
    os.rename(root / "000.png", os.fsencode(root) + b"/\xff\xfe.png")
    loaded = [load(root, split) for split in ("train", "test")]
    assert sum(len(part.labels) for part in loaded) == 40
    assert "\udcff\udcfe.png" in set(loaded[0].names) | set(loaded[1].names)


def same_image(root):
    write(root, *NESTED)
    shutil.copy(root / "train" / "a" / "1train.png", root / "test" / "a" / "1train.png")


NO_IMAGES = r"has no images \(\.bmp, \.gif, \.jpeg, \.jpg, \.png, \.tif, \.tiff, \.webp\)"
REFUSED = {
    "no folder": (lambda root: root.rmdir(), {}, "pictures' is not a folder: give folder:PATH"),
    "a file": (lambda root: (root.rmdir(), root.write_text("x")), {}, "is not a folder"),
    "no images": (lambda root: (root / "a.txt").write_text("x"), {}, NO_IMAGES),
    "one image": (lambda root: write(root, "a.png"), {}, "has only one image: give a folder with some to train and"),
    "an empty split": (lambda root: (write(root, *NESTED), (root / "val").mkdir()), {"test_split": "val"}, "in val/"),
    "test alone": (lambda root: write(root, "test/a.png"), {}, "--train-split is 'train': .* subfolder beside test"),
    "another split": (lambda root: write(root, *NESTED), {"train_split": "x"}, "--train-split is 'x': .* no such"),
    "another test": (
        lambda root: write(root, *NESTED),
        {"test_split": "x"},
        "--test-split is 'x': .* no such",
    ),
    "the same image": (same_image, {}, "has the same image for training and testing, 'a/1train.png': remove it"),
    "other classes": (lambda root: write(root, *NESTED, "test/d/1.png"), {}, "test images in a folder 'd', but its"),
    "one of each class": (lambda root: write(root, "a/1.png", "b/2.png"), {}, "has one image in each class, and none"),
    "test in train": (
        lambda root: write(root, *NESTED),
        {"train_split": ".", "test_split": "test"},
        "--test-split is 'test': it shares images with --train-split '.'",
    ),
    "train in test": (
        lambda root: write(root, *NESTED),
        {"train_split": "test/a", "test_split": "test"},
        "--test-split is 'test': it shares images with --train-split 'test/a'",
    ),
    "per class": (lambda root: write(root, *FLAT), {"images_per_class": 3}, "--images-per-class is 3: .* no labels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_folders_that_do_not_fit_are_refused(case, root):
    make, options, message = REFUSED[case]
    make(root)
    with pytest.raises(UserError, match=f"^--.*{message.removeprefix('--')}.*\\.$"):
        load_both(root, **options)
    assert case == "per class" or not (root.parent / "cache").exists()  # nothing was decoded


@pytest.mark.parametrize("name", ["", "~nobody-of-this-name/x", "x" * 900, "/dev/null", "a b", "..x"])
def test_odd_names_of_folders_are_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"^--dataset 'folder:.* is not a folder: give folder:PATH"):
        load_split(DataConfig(dataset=f"folder:{name}"), "train", None, str(tmp_path))


def test_the_same_split_for_training_and_testing_is_refused():
    with pytest.raises(UserError, match=r"^--test-split is 'train': give a split other than --train-split"):
        DataConfig(test_split="train")


def config_of(root, **options):
    return Config(
        data=DataConfig(dataset=f"folder:{root}"),
        patches=PatchConfig(train_patches=2, patch_size=8, **options),
        model=ModelConfig(width=2, hidden_dim=8, projection_dim=4, precision="float32"),
        training=TrainingConfig(batch_size=8),
        evaluation=EvaluationConfig(valid_patches=2, num_neighbours=3, linear_epochs=1),
        run=RunConfig(workdir=str(root.parent / "run"), cache_dir=str(root.parent / "cache")),
    )


@pytest.mark.parametrize(("images", "devices", "least"), [(1, 1, 2), (3, 4, 4)])
def test_fewer_images_than_any_step_needs_are_refused_with_the_remedy(root, monkeypatch, images, devices, least):
    write(root, *(f"train/{i}.png" for i in range(images)), "test/0test.png")
    monkeypatch.setattr(training, "device_mesh", lambda: device_mesh(devices))
    needed = f"it has {images} training image.*, and a step on {devices} device.* needs at least {least}, so add images"
    with pytest.raises(UserError, match=rf"^--dataset is 'folder:.*': {needed}\.$"):
        training.train(config_of(root))


@pytest.mark.long
def test_pictures_without_classes_are_trained_on_and_embedded_but_not_measured(root, capsys):
    write(root, *FLAT)
    config = config_of(root, patch_aspect=4 / 3, interpolation="bicubic")
    training.train(config)
    printed = capsys.readouterr().out
    assert "no train and no test image has a label: kNN and linear are not measured" in printed
    assert re.search(r"^effective rank  \d\.\d of 4$", printed, re.MULTILINE)  # four test images
    with np.load(root.parent / "run" / "embeddings" / "train.npz") as arrays:
        assert arrays["names"].tolist() == load(root).names.tolist()
        assert arrays["embeddings"].shape == (36, 8)
        np.testing.assert_array_equal(arrays["labels"], np.full(36, -1))
        before = arrays["embeddings"]
    options = EvaluateOptions(workdir=config.run.workdir, cache_dir=config.run.cache_dir, evaluation=config.evaluation)
    assert set(evaluate(options, try_to_report)) == {"effective rank"}
    with np.load(root.parent / "run" / "embeddings" / "train.npz") as arrays:
        np.testing.assert_array_equal(arrays["embeddings"], before)
    assert json.loads((root.parent / "run" / "config.json").read_text())["data"]["dataset"] == f"folder:{root}"


@pytest.fixture(scope="module")
def embed(tmp_path_factory):
    """A function from a data set to its embeddings. Its encoder is compiled once."""
    config, mesh = config_of(tmp_path_factory.mktemp("any")), device_mesh(1)
    encoder, compiled = init_encoder(config.model, jax.random.key(0)), embeddings.make_embed(config, mesh)
    return lambda dataset: embeddings.embed_dataset(compiled, encoder, dataset, 50, mesh, "train").embeddings


@pytest.fixture(scope="module")
def cifar10():
    """The first 20 training images of each class."""
    return load_split(DataConfig(train_split="train[:400]", images_per_class=20), "train", os.environ["TFDS_DATA_DIR"])


@needs_cifar10
def test_cifar10_as_files_has_the_embeddings_of_cifar10_from_tfds(cifar10, embed, root):
    """The files are in the order of TFDS. Each image keeps its index, which determines its patches."""
    for number, image in enumerate(cifar10.images):
        path = root / "train" / f"{number:05}.png"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(image).save(path)
    write(root, "test/any.png")
    files = load(root)
    np.testing.assert_array_equal(files.images, cifar10.images)
    np.testing.assert_array_equal(embed(files), embed(cifar10))


@needs_cifar10
def test_cifar10_in_folders_of_its_classes_has_its_images_and_labels(cifar10, embed, root):
    for number, (image, label) in enumerate(zip(cifar10.images, cifar10.labels, strict=True)):
        path = root / "train" / f"class{label}" / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(path)
    write(root, "test/class3/any.png")
    files = load(root)
    numbers = [int(name[-9:-4]) for name in files.names]
    assert files.class_names == tuple(f"class{number}" for number in range(10))
    np.testing.assert_array_equal(files.images, cifar10.images[numbers])
    np.testing.assert_array_equal(files.labels, cifar10.labels[numbers])
    permuted = ImageDataset(cifar10.images[numbers], cifar10.labels[numbers], files.class_names)
    np.testing.assert_array_equal(embed(files), embed(permuted))
