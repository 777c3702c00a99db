"""The report of a run: numbers computed a second way, content it must never have, and incomplete or bad input."""

import base64
import dataclasses
import io
import math
import os
import re
import shutil
from html.parser import HTMLParser
from unittest import mock

import numpy as np
import PIL.Image
import pytest
from synthetic_run import (
    CONFIG,
    SECONDS_A_STEP,
    STEPS,
    datasets,
    embeddings_of,
    knn_by_numpy,
    metrics_of,
    write_lines,
    write_run,
)

from empssl_jax.config import DataConfig
from empssl_jax.data.batches import shuffled_batches
from empssl_jax.data.datasets import Datasets
from empssl_jax.evaluation.effective_rank import spectrum
from empssl_jax.evaluation.embedding_files import save_embeddings
from empssl_jax.evaluation.embeddings import Embeddings, LabelledEmbeddings
from empssl_jax.method.patches import multi_patch
from empssl_jax.method.random_keys import training_patches_key
from empssl_jax.report import charts, findings, pictures, remarks, tables, write_report
from empssl_jax.report.page import render
from empssl_jax.report.run import Run, read_run
from empssl_jax.run_folder import saved_config
from empssl_jax.run_folder.results import add_results, on_dataset


class Tables(HTMLParser):
    """The cells of the page's tables, by the table's id and by row, and the text of the page."""

    def __init__(self, page: str):
        super().__init__()
        self.tables, self.text, self._table, self._cell = {}, "", None, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self._table = dict(attrs).get("id")
            self.tables.setdefault(self._table, [])
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")
            self._cell = self.tables[self._table][-1]

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, text):
        self.text += text
        if self._cell is not None:
            self._cell[-1] += text.strip()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a run, its embeddings and its page."""
    folder = tmp_path_factory.mktemp("runs") / "good"
    embeddings = write_run(folder)
    path = write_report.write_report(folder, CONFIG, datasets())
    assert path == folder / "report.html"
    return folder, embeddings, path.read_text()


def page_of(folder, config=CONFIG, images=None):
    return write_report.write_report(folder, config, images).read_text()


def test_the_confusion_matrix_is_that_of_knn_by_hand(written):
    _, embeddings, page = written
    train, test = embeddings
    predicted = knn_by_numpy(test.embeddings, train.embeddings, train.labels, 5, 0.07)
    expected = np.zeros((10, 10), int)
    for label, prediction in zip(test.labels, predicted, strict=True):
        expected[label, prediction] += 1
    assert 12 < np.trace(expected) < 120
    _, *rows = Tables(page).tables["confusion"]
    np.testing.assert_array_equal([[int(cell) for cell in row[1:]] for row in rows], expected)
    _, *classes = Tables(page).tables["classes-table"]
    for number, (name, images, accuracy, mistaken) in enumerate(classes):
        assert (name, images, accuracy) == (str(number), "12", f"{100 * expected[number, number] / 12:.1f} %")
        others = np.delete(expected[number], number)
        assert mistaken == "-" or expected[number, int(mistaken)] == others.max() > 0


def test_the_effective_rank_is_that_of_all_test_embeddings(written):
    _, embeddings, page = written
    values = np.linalg.svd(np.float64(embeddings.test.embeddings), compute_uv=False)
    shares = values / values.sum()
    expected = np.prod(shares**-shares)
    assert "of 120 test embeddings of dimension\n  24" in page
    assert f"<dd>{expected:.1f}</dd>" in page
    assert f"effective rank {expected:.1f}" in page


def test_curves_and_table_end_where_the_metrics_do(written):
    _, _, page = written
    _, *rows = Tables(page).tables["numbers"]
    assert [row[0] for row in (rows[0], rows[-1])] == ["0", str(STEPS - 1)]
    last = metrics_of(STEPS - 1)
    rate = CONFIG.training.batch_size * CONFIG.patches.train_patches / SECONDS_A_STEP
    expected = [f"{last['loss']:.2f}", "60.0 %", f"{last['similarity']:.4f}", f"{last['learning_rate']:.4g}"]
    assert rows[-1][1:] == [*expected, f"{rate:.0f}", f"{SECONDS_A_STEP * STEPS:.1f}"]
    labels = re.findall(r'aria-label="(Loss|Coding rate|Similarity|Throughput): from (\S+) .*?to (\S+)', page)
    assert labels == [
        ("Loss", f"{metrics_of(0)['loss']:.4g}".replace("-", "\N{MINUS SIGN}"), labels[0][2]),
        ("Coding rate", "40", "60"),
        ("Similarity", "0.600", "0.900"),
        ("Throughput", "80", "80"),
    ]
    assert labels[0][2] == f"{last['loss']:.4g}".replace("-", "\N{MINUS SIGN}")


def test_a_curve_s_path_goes_from_corner_to_corner():
    drawn = charts.curve("A", [0.0, 5.0, 10.0], [0.0, 1.0, 4.0], str, "", x_name="step")
    left, bottom = charts.LEFT, charts.HEIGHT - charts.BOTTOM
    right, top = charts.WIDTH - charts.RIGHT, charts.TOP
    middle = (left + right) / 2, bottom - (bottom - top) / 4
    assert drawn.path == f"M{left:.1f} {bottom:.1f}L{middle[0]:.1f} {middle[1]:.1f}L{right:.1f} {top:.1f}"
    assert drawn.end == (right, top)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1]),
        (-260.0, -101.0, [-300, -250, -200, -150, -100]),
        (3.0, 3.0, [1, 2, 3, 4, 5]),
    ],
)
def test_ticks_are_round_and_enclose(low, high, expected):
    np.testing.assert_allclose(charts.ticks(low, high), expected)


def test_nothing_is_fetched_from_anywhere(written):
    page = re.sub(r"data:image/(png|jpeg);base64,[\w+/=]+", "", written[2])
    assert not re.search(r"https?:|//|@import", page.replace("<!doctype html>", ""))
    assert re.search(r"default-src 'none'", page)
    assert set(re.findall(r'src="([^"]*)"', page)) == {""}


def test_names_are_escaped(tmp_path):
    folder = tmp_path / "<script>alert(1)<script>"
    write_run(folder)
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, dataset='"><b>digits'))
    page = page_of(folder, config)
    assert "<script>alert" not in page
    assert "<h1>&lt;script&gt;alert(1)&lt;script&gt;</h1>" in page
    assert "<b>digits" not in page
    assert "&#34;&gt;&lt;b&gt;digits" in page


def call_classes(folder, embeddings, names):
    for split, held in zip(("train", "test"), embeddings, strict=True):
        save_embeddings(folder / "embeddings" / f"{split}.npz", held._replace(class_names=tuple(names)))


def test_class_names_are_escaped_also_for_the_script(tmp_path):
    folder = tmp_path / "run"
    call_classes(folder, write_run(folder), [f"</script><b>{number}" for number in range(10)])
    page = page_of(folder)
    assert "</script><b>" not in page
    assert "&lt;/script&gt;&lt;b&gt;3" in page


@pytest.mark.parametrize("with_images", [False, True])
def test_classes_have_the_names_of_the_data_set(tmp_path, with_images):
    names = [f"animal{number}" for number in range(10)]
    names[3] = os.fsdecode(b"H\xfcndin")  # a folder's name in Latin-1
    expected = [name.replace("\udcfc", "?") for name in names]
    folder = tmp_path / "run"
    embeddings, images = write_run(folder), None
    if with_images:  # these names take precedence over those of saved embeddings
        images = Datasets(*(dataset._replace(class_names=tuple(names)) for dataset in datasets()))
    else:
        call_classes(folder, embeddings, names)
    _, *classes = Tables(page_of(folder, images=images)).tables["classes-table"]
    assert sorted(row[0] for row in classes) == sorted(expected)
    assert "animal4" in (folder / "tensorboard" / "projector" / "metadata.tsv").read_text()


def test_patches_are_those_that_the_first_step_saw(written):
    _, _, page = written
    training = CONFIG.training
    batch = next(shuffled_batches(datasets().train, training.batch_size, training.seed, 0, 1))
    seen = multi_patch(training_patches_key(training.seed, 0), batch.images, 4, patch_size=16, indices=batch.indices)
    strips = re.findall(r'data:image/png;base64,([\w+/=]+)" alt="4 patches of training image (\d+)"', page)
    assert [int(index) for _, index in strips] == batch.indices[:6].tolist()
    for strip, expected in zip(strips, np.asarray(seen), strict=False):
        shown = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(strip[0]))))
        assert shown.shape == (16, 4 * 17 - 1, 3)
        for number, patch in enumerate(expected):
            # Rounding changes a value by at most half a gray level.
            columns = slice(17 * number, 17 * number + 16)
            np.testing.assert_allclose(shown[:, columns] / 127.5 - 1, patch, atol=0.51 / 127.5)


def test_patches_are_cropped_and_resized_as_in_training():
    crops = {"patch_area": 0.4, "patch_size": 16, "patch_aspect": 4 / 3, "interpolation": "bicubic"}
    config = dataclasses.replace(CONFIG, patches=dataclasses.replace(CONFIG.patches, **crops))
    sheet = pictures.training_patches(config, datasets().train)
    images = np.stack(sheet.images)
    key = training_patches_key(config.training.seed, 0)
    seen = multi_patch(key, images, sheet.patches.shape[1], indices=sheet.indices, **crops)
    np.testing.assert_allclose(sheet.patches / 127.5 - 1, seen, atol=0.51 / 127.5)


def test_neighbours_are_the_nearest_and_chosen_in_order(written):
    _, embeddings, _ = written
    train, test = embeddings
    bank = train.embeddings / np.linalg.norm(train.embeddings, axis=1, keepdims=True)
    predicted = knn_by_numpy(test.embeddings, train.embeddings, train.labels, 5, 0.07)
    for right in (True, False):
        examples = findings.find_neighbours(bank, test, predicted, right)
        candidates = np.flatnonzero((predicted == test.labels) == right)
        firsts = [i for n, i in enumerate(candidates) if test.labels[i] not in test.labels[candidates[:n]]]
        assert [one.image for one in examples] == firsts[:6]
        for one in examples:
            query = test.embeddings[one.image] / np.linalg.norm(test.embeddings[one.image])
            distances = np.linalg.norm(bank - query, axis=1)
            np.testing.assert_array_equal(one.indices, np.argsort(distances)[:8])
            np.testing.assert_allclose(one.similarities, 1 - distances[one.indices] ** 2 / 2, atol=1e-5)


def test_images_other_than_the_embedded_ones_are_not_shown(tmp_path):
    """They differ in their labels or, if they are files, in their names."""
    folder, images = tmp_path / "run", datasets()
    embedded = write_run(folder)
    reordered = images._replace(test=images.test.take(np.arange(120)[::-1]))
    assert read_run(folder, CONFIG, images).datasets is not None
    assert read_run(folder, CONFIG, reordered).datasets is None
    names = np.array([f"{number}.png" for number in range(200)])
    save_embeddings(folder / "embeddings" / "train.npz", embedded.bank._replace(names=names))
    for found, are_shown in ((names, True), (np.roll(names, 1), False)):
        files = images.bank._replace(names=found)
        assert (read_run(folder, CONFIG, images._replace(bank=files)).datasets is not None) == are_shown


def test_the_dimension_is_that_of_the_embeddings(tmp_path):
    write_run(tmp_path / "run")
    other = dataclasses.replace(CONFIG.evaluation, embedded_layer="stages")
    page = page_of(tmp_path / "run", dataclasses.replace(CONFIG, evaluation=other))
    assert "24 numbers" in page
    assert "60 numbers" not in page


def test_maps_put_images_of_separate_classes_apart():
    labels = np.repeat(np.arange(3), 20)
    points = np.eye(3)[labels] + 0.01 * np.random.RandomState(0).standard_normal((60, 3))
    for method, places in findings.draw_maps(np.float32(points), 0).items():
        distances = np.linalg.norm(places[:, None] - places, axis=2)
        np.fill_diagonal(distances, np.inf)
        assert (labels[distances.argmin(axis=1)] == labels).all(), method


def test_the_sprite_holds_each_thumbnail_in_its_place():
    images = [np.full((32, 32, 3), value, np.uint8) for value in range(10, 60, 10)]
    sheet = pictures.sprite(images)
    assert (sheet.side, sheet.columns, sheet.picture.shape) == (32, 3, (64, 96, 3))
    for number, image in enumerate(images):
        top, left = 32 * (number // 3), 32 * (number % 3)
        np.testing.assert_array_equal(sheet.picture[top : top + 32, left : left + 32], image)


def test_published_figures_appear_only_for_their_own_data_set(written, tmp_path):
    folder = tmp_path / "run"
    write_run(folder)
    assert "published, not" not in written[2]
    config = dataclasses.replace(CONFIG, data=DataConfig(dataset="cifar10"))
    accuracies = Tables(page_of(folder, config)).tables["accuracies"]
    assert ["PyTorch Lightning reference, kNN", "74.3 %", "97.1 %"] in accuracies
    assert any("published, not measured here" in row[0] for row in accuracies)


def texts(folder, config=CONFIG, embeddings=None):
    run = read_run(folder, config, datasets())
    found = findings.examine(run.all_embeddings, config.evaluation, seed=0) if run.embeddings else None
    directions = None if run.all_embeddings is None else spectrum(run.all_embeddings.test.embeddings)
    return [(remark.warns, remark.text) for remark in remarks.remarks(run, found, directions)]


def test_a_good_run_has_no_warnings(written):
    assert [text for warns, text in texts(written[0]) if warns] == []


def test_collapse_is_reported(tmp_path):
    write_run(tmp_path / "run", embed=lambda labels, seed: np.ones((len(labels), 24), np.float32))
    collapsed = {"loss": -200.0, "coding_rate": 2.0, "similarity": 0.999, "learning_rate": 0.1}
    lines = [{"step": step, **collapsed, "coding_rate_fraction": 0.001} for step in range(STEPS)]
    write_lines(tmp_path / "run" / "metrics.jsonl", lines)
    warnings = [text for warns, text in texts(tmp_path / "run") if warns]
    assert any("all projections are nearly equal" in text for text in warnings)
    assert any("the embeddings of all test images are nearly the same" in text for text in warnings)
    assert any("no better than guessing" in text for text in warnings)
    assert "A map of the test images" not in page_of(tmp_path / "run", images=datasets())


def test_too_few_neighbours_and_unfinished_training_are_reported(written):
    evaluation = dataclasses.replace(CONFIG.evaluation, num_neighbours=30)
    longer = dataclasses.replace(CONFIG.training, max_epochs=40)
    reported = texts(written[0], dataclasses.replace(CONFIG, evaluation=evaluation, training=longer))
    assert any("30 neighbours vote, and the smallest class has 20" in text for _, text in reported)
    assert any("100 of 200 steps are done" in text for warns, text in reported if warns)


def test_class_names_without_images_are_not_counted(tmp_path):
    """Ten of 1000 names have images, 20 each, so guessing gives 10 %."""
    call_classes(tmp_path / "run", write_run(tmp_path / "run"), [f"class {number}" for number in range(1000)])
    page = " ".join(page_of(tmp_path / "run", images=datasets()).split())
    assert "tested on 120 other images of 10 classes." in page
    assert "(guessing: 10.0 %)" in page
    assert "the smallest class has" not in page


def test_guessing_among_few_classes_is_reported_although_there_are_many_names(tmp_path):
    embeddings = write_run(tmp_path / "run", embed=lambda labels, seed: embeddings_of(np.zeros_like(labels), seed))
    call_classes(tmp_path / "run", embeddings, [f"class {number}" for number in range(1000)])
    (text,) = [text for warns, text in texts(tmp_path / "run") if warns and "guessing" in text]
    assert "with 10 classes" in text


@pytest.mark.parametrize(("correct", "verb"), [(4, "may be"), (3, "is"), (2, "is")])
def test_an_accuracy_within_the_margin_above_guessing_is_not_called_guessing(correct, verb):
    """Of 6 images of two classes, guessing gets 3; 4 are too few to say more."""
    run = mock.Mock(spec=Run, class_sizes=[3, 3], has_other_images=False, datasets=datasets())
    found = mock.Mock(spec=findings.Findings, accuracy=correct / 6, confusion=np.diag([correct, 6 - correct]))
    (remark,) = remarks._about_predictions(run, found)
    assert remark == (True, f"kNN {verb} no better than guessing ({100 * correct / 6:.1f} % with 2 classes).")


def test_the_number_of_training_images_is_that_of_the_run_and_not_of_the_embeddings(tmp_path):
    """The run has 200 embeddings of labelled images, and made 100 steps of 40 images in 20 epochs."""
    folder = tmp_path / "run"
    write_run(folder)

    def said(images):
        run = read_run(folder, CONFIG, images)
        page = " ".join(render(run, None, None, None).split())
        return run.last_step, "100 of 200 steps are done" in page, re.findall(r"trained on (.*?) of the data set", page)

    assert said(None) == (None, False, ["the images"])
    assert said(datasets()) == (100, False, ["200 images"])
    saved_config.save_images(folder, saved_config.SavedImages(32, {}, num_train=439))
    for images in (None, datasets()):
        assert said(images) == (200, True, ["439 images"])
    (folder / "images.json").write_text("{")
    assert said(None) == (None, False, ["the images"])


def test_a_loss_that_still_falls_is_distinguished_from_noise_and_from_a_plateau():
    random = np.random.RandomState(0)
    assert remarks.still_falling(-np.arange(100.0))
    assert not remarks.still_falling(random.standard_normal(100))
    assert not remarks.still_falling(-100 * (1 - np.exp(-np.arange(100) / 8)))
    assert not remarks.still_falling(np.arange(100.0))


def test_a_folder_with_nothing_but_a_config_has_a_page(written, tmp_path):
    (tmp_path / "config.json").write_bytes((written[0] / "config.json").read_bytes())
    page = page_of(tmp_path)
    assert "training has not begun" in page
    assert "There are no embeddings yet" in page


def test_a_report_that_fails_prints_one_warning_and_harms_nothing(written, tmp_path, capsys):
    (tmp_path / "results.json").write_text("no JSON")
    write_report.try_to_report(tmp_path, CONFIG, None)
    output = capsys.readouterr()
    assert re.fullmatch(r"warning: .*report\.html could not be written .*tries again\.\n", output.err)
    assert output.out == ""
    assert list(tmp_path.iterdir()) == [tmp_path / "results.json"]


def test_only_the_first_process_writes(written, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(write_report, "is_first_process", lambda: False)
    write_report.try_to_report(tmp_path, CONFIG, None)
    assert list(tmp_path.iterdir()) == []


def records(path):
    """The content of each record of a TFRecord file. A record is a length, its checksum, the content, its checksum."""
    content, start = path.read_bytes(), 0
    while start < len(content):
        length = int.from_bytes(content[start : start + 8], "little")
        yield content[start + 12 : start + 12 + length]
        start += 16 + length


def test_tensorboard_gets_the_patches_and_the_projector(written):
    from tensorboardX.proto.event_pb2 import Event

    folder, embeddings, _ = written
    (path,) = (folder / "tensorboard").glob("events.*.patches")
    (value,) = [value for record in records(path) for value in Event.FromString(record).summary.value]
    assert value.tag == "patches of the first step"
    assert PIL.Image.open(io.BytesIO(value.image.encoded_image_string)).size == (4 * 17 - 1, 6 * 17 - 1)
    projector = folder / "tensorboard" / "projector"
    vectors = np.loadtxt(projector / "tensors.tsv", delimiter="\t")
    np.testing.assert_allclose(vectors, embeddings.test.embeddings, rtol=1e-4, atol=1e-6)
    header, *lines = (projector / "metadata.tsv").read_text().splitlines()
    assert header == "class\tkNN\timage"
    assert [int(line.split("\t")[0]) for line in lines] == embeddings.test.labels.tolist()
    with PIL.Image.open(projector / "sprite.png") as sprite:
        assert sprite.size == (11 * 32, 11 * 32)
    settings = (folder / "tensorboard" / "projector_config.pbtxt").read_text()
    assert settings.count("{") == settings.count("}") == 2


def test_many_classes_are_listed_by_their_mistakes(tmp_path):
    random = np.random.RandomState(0)
    labels = np.repeat(np.arange(30), 4).astype(np.int32)
    names = tuple(f"class {number}" for number in range(30))
    train, test = (LabelledEmbeddings(np.float32(random.standard_normal((120, 6))), labels, names) for _ in range(2))
    found = findings.examine(Embeddings(train, test), CONFIG.evaluation, 0)
    assert len(findings.map_classes(labels)) == 10
    assert set(labels[found.map_images]) == set(findings.map_classes(labels).tolist())
    pairs = tables.worst_pairs(found.confusion, [str(n) for n in range(30)])
    counts = [count for _, _, count in pairs]
    assert counts == sorted(counts, reverse=True)
    assert all(found.confusion[int(shows), int(taken)] == count for shows, taken, count in pairs)
    assert len(pairs) == 20


def test_embeddings_of_other_images_leave_the_pictures_out(tmp_path):
    write_run(tmp_path / "run", embed=embeddings_of)
    other = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, test_images_per_class=3))
    page = page_of(tmp_path / "run", images=datasets(other))
    assert "The images are not those that were embedded, so this page has no pictures." in page
    assert "were not available" not in page
    assert "were not available" in page_of(tmp_path / "run")
    assert "data:image" not in re.sub(r"img-src data:", "", page)


def test_images_without_a_label_are_left_out(tmp_path):
    folder, images = tmp_path / "run", datasets()
    embeddings = write_run(folder)
    test = images.test
    labels = np.where(np.arange(len(test.labels)) % 4 == 0, -1, test.labels)
    save_embeddings(folder / "embeddings" / "test.npz", embeddings.test._replace(labels=labels))
    page = page_of(folder, images=images._replace(test=test._replace(labels=labels)))
    _, *rows = Tables(page).tables["confusion"]
    assert sum(int(cell) for row in rows for cell in row[1:]) == np.sum(labels >= 0) == 90
    assert "data:image" in re.sub(r"img-src data:", "", page)


def test_without_any_label_the_page_has_curves_and_patches_only(tmp_path):
    folder, images = tmp_path / "run", datasets()
    for split, held in zip(("train", "test"), write_run(folder), strict=True):
        save_embeddings(folder / "embeddings" / f"{split}.npz", held._replace(labels=np.full_like(held.labels, -1)))
    unlabelled = Datasets(*(held._replace(labels=np.full_like(held.labels, -1)) for held in images))
    page = page_of(folder, images=unlabelled)
    assert "no label" in page
    assert "confusion" not in Tables(page).tables
    assert "There are no embeddings yet" not in page
    assert "have no labels, so no accuracy is measured" in page
    assert "of 120 test embeddings of dimension\n  24" in page


def test_every_result_has_a_row_under_its_data_set(tmp_path):
    own = {
        "kNN": {"top1": 0.5, "top5": 0.875},
        "effective rank": {"rank": 31.25, "images": 120, "dimensions": 64},
        "linear": {"top1": 0.6, "top5": 0.9},
        "logistic": {"top1": 0.625, "top5": 1.0, "penalty": 0.01},
        "kNN, something new": {"top1": 0.25, "top5": 0.5, "more": [1, 2]},
    }
    there = {"kNN": {"top1": 0.1, "top5": 0.3}, "effective rank": {"rank": 7.0, "images": 2000, "dimensions": 1500}}
    write_run(tmp_path / "run")  # it has no embeddings of the other data set
    add_results(tmp_path / "run", own | on_dataset("<b>birds", there))
    page = page_of(tmp_path / "run")
    assert Tables(page).tables["accuracies"] == [
        ["measured here", "top-1", "top-5"],
        ["kNN", "50.0 %", "87.5 %"],
        ["linear", "60.0 %", "90.0 %"],
        ["logistic", "62.5 %", "100.0 %"],
        ["kNN, something new", "25.0 %", "50.0 %"],
        ["effective rank", "31.2 of 64"],
        ["on <b>birds, after learning from its training images"],
        ["kNN", "10.0 %", "30.0 %"],
        ["effective rank", "7.0 of 1,500"],
    ]
    assert "<b>birds" not in page
    assert "<dt>Logistic accuracy</dt><dd>62.5 %</dd>" in page


def test_the_step_and_the_embeddings_of_results_are_named_where_they_differ(tmp_path):
    write_run(tmp_path / "run")
    how = {"embeddings": "2 random patches, hidden", "step": 100}
    own = {"kNN": {"top1": 0.5, "top5": 0.875} | how, "logistic": {"top1": 0.6, "top5": 0.9} | how | {"step": 90}}
    there = {"kNN": {"top1": 0.1, "top5": 0.3} | how}
    add_results(tmp_path / "run", own | on_dataset("birds", there))
    _, *rows = Tables(page_of(tmp_path / "run")).tables["accuracies"]
    assert [row[0] for row in rows] == ["kNN (step 100)", "logistic (step 90)", *rows[2], "kNN (step 100)"]
    add_results(tmp_path / "run", {"logistic": own["logistic"] | {"step": 100, "embeddings": "16 grid patches"}})
    _, *rows = Tables(page_of(tmp_path / "run")).tables["accuracies"]
    assert [row[0] for row in rows[:2]] == ["kNN (2 random patches, hidden)", "logistic (16 grid patches)"]


def test_results_on_another_data_set_alone_have_a_table(tmp_path):
    write_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "embeddings")
    add_results(tmp_path / "run", on_dataset("birds", {"logistic": {"top1": 0.1, "top5": 0.3}}))
    _, *rows = Tables(page_of(tmp_path / "run")).tables["accuracies"]
    assert rows == [["on birds, after learning from its training images"], ["logistic", "10.0 %", "30.0 %"]]


def test_the_probe_s_curves_are_drawn_with_and_without_labels_or_ranks(tmp_path):
    write_run(tmp_path / "run")
    lines = [
        {"step": 10, "seconds": 20.0, "top1": 0.25, "top5": 0.5},  # of a version that measured no rank
        {"step": 20, "seconds": 40.0, "top1": 0.5, "top5": 0.5, "effective_rank": 3.25},
        {"step": 30, "seconds": 60.0, "effective_rank": 12.75},
        {"step": 40, "seconds": 80.0, "effective_rank": math.nan},
    ]
    write_lines(tmp_path / "run" / "probe.jsonl", lines)
    labels = re.findall(r'aria-label="((?:Online probe|Effective rank): .*?)\."', page_of(tmp_path / "run"))
    assert labels == ["Online probe: from 25 % to 50 % at second 40", "Effective rank: from 3.2 to 12.8 at step 30"]


def test_the_page_does_not_depend_on_where_the_folder_is(tmp_path):
    here, there = tmp_path / "here" / "run", tmp_path / "there" / "run"
    write_run(here)
    page = page_of(here, images=datasets())
    there.parent.mkdir()
    here.rename(there)
    assert (there / "report.html").read_text() == page
    assert page_of(there, images=datasets()) == page
    for path in there.rglob("*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes()
