"""empssl embed: folders of image files to embeddings, after an interruption and with unreadable files."""

import os
import re
import shutil
import stat
import tracemalloc

import numpy as np
import PIL.Image
import pytest

import empssl_jax
from empssl_jax import command_line
from empssl_jax.config.errors import UserError
from empssl_jax.inference import embed_files as embed
from empssl_jax.inference.image_encoder import ImageEncoder
from empssl_jax.parse_options import parse_embed_options

GRID = {"valid-crops": "grid", "valid-patches": 16, "embedded-layer": "stages"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """150 pictures (a part has 128), two unreadable files with image suffixes, and a file with another suffix."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.RandomState(0)
    for number in range(150):
        path = folder / f"{'ab'[number % 2]}" / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(random.randint(0, 256, (40, 32 + number % 3, 3)).astype(np.uint8)).save(path)
    (folder / "a" / "017.png").write_bytes(b"no picture")
    (folder / "b" / "100.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture either")
    return folder


def run(photos, workdir, output, **options):
    words = {"images": photos, "workdir": workdir, "output": output, "valid-patches": 1} | options
    embed.embed_files(parse_embed_options([f"--{name}={value}" for name, value in words.items()]))
    with np.load(output, allow_pickle=False) as arrays:
        return dict(arrays)


def fail_in_the_second_part(monkeypatch, error):
    """Makes the second part of images raise an error; returns the list in which the sizes of all parts are noted."""
    sizes, original = [], ImageEncoder.embed

    def failing(self, images, *arguments, **options):
        if images:
            sizes.append(len(images))
            if len(sizes) == 2:
                raise error
        return original(self, images, *arguments, **options)

    monkeypatch.setattr(ImageEncoder, "embed", failing)
    return sizes


@pytest.fixture(scope="module")
def uninterrupted(photos, tiny_run, tmp_path_factory):
    return run(photos, tiny_run, tmp_path_factory.mktemp("uninterrupted") / "out.npz")


def test_embeddings_are_those_of_the_pictures_in_the_order_of_their_names(photos, tiny_run, uninterrupted):
    bad = {"a/017.png", "b/100.jpg"}
    names = sorted([f"{'ab'[number % 2]}/{number:03}.png" for number in range(150)] + list(bad))
    assert uninterrupted["files"].tolist() == [name for name in names if name not in bad]
    assert uninterrupted["unreadable"].tolist() == sorted(bad)
    images = [PIL.Image.open(photos / name) for name in uninterrupted["files"]]
    indices = np.array([number for number, name in enumerate(names) if name not in bad])
    expected = empssl_jax.load(tiny_run).embed(images, patches=1, indices=indices)
    np.testing.assert_allclose(uninterrupted["embeddings"], expected, rtol=1e-4, atol=1e-5)


def test_rotated_and_large_images_have_the_embeddings_of_python(tiny_run, tmp_path):
    """The images are uneven, so that a rotation shows, and the JPEG is large enough to be decoded at an eighth."""
    pixels = np.random.RandomState(0).randint(0, 256, (64, 80, 3)).astype(np.uint8)
    (tmp_path / "in").mkdir()
    for orientation in range(1, 9):
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        PIL.Image.fromarray(pixels).save(tmp_path / "in" / f"{orientation}.png", exif=exif)
    PIL.Image.fromarray(np.kron(pixels, np.ones((10, 10, 1), np.uint8))).save(tmp_path / "in" / "large.jpg")
    made = run(tmp_path / "in", tiny_run, tmp_path / "out.npz")
    images = [PIL.Image.open(tmp_path / "in" / name) for name in made["files"]]
    expected = empssl_jax.load(tiny_run).embed(images, patches=1)
    np.testing.assert_array_equal(made["embeddings"], expected)
    upright = empssl_jax.load(tiny_run).embed([np.rot90(pixels, -1)], patches=1, indices=[5])
    np.testing.assert_allclose(made["embeddings"][[5]], upright, rtol=1e-4, atol=1e-5)


def test_embeddings_follow_the_options_and_default_to_those_of_the_run(photos, tiny_run, tmp_path):
    image = photos / "a" / "002.png"
    made = run(image, tiny_run, tmp_path / "a.npz", **GRID, cells=2)["embeddings"]
    encoder = empssl_jax.load(tiny_run, valid_crops="grid", valid_patches=16, embedded_layer="stages", cells=2)
    np.testing.assert_allclose(made, encoder.embed([PIL.Image.open(image)]), rtol=1e-4, atol=1e-5)
    embed.embed_files(
        parse_embed_options([f"--images={image}", f"--workdir={tiny_run}", f"--output={tmp_path / 'b.npz'}"])
    )
    with np.load(tmp_path / "b.npz") as arrays:
        expected = empssl_jax.load(tiny_run).embed([PIL.Image.open(image)])
        np.testing.assert_allclose(arrays["embeddings"], expected, rtol=1e-4, atol=1e-5)


REFUSED = "holds parts of other images, by another encoder or with other options: run the command that wrote them again"


def test_parts_of_other_embeddings_are_refused(photos, tiny_run, tmp_path, monkeypatch):
    image = photos / "a" / "002.png"
    monkeypatch.setattr(embed.shutil, "rmtree", lambda path: None)
    run(image, tiny_run, tmp_path / "out.npz", **GRID)
    with pytest.raises(UserError, match=REFUSED):
        run(image, tiny_run, tmp_path / "out.npz", **GRID, cells=2)


def test_parts_of_a_file_that_was_replaced_by_one_of_equal_size_are_refused(photos, tiny_run, tmp_path, monkeypatch):
    image = shutil.copy(photos / "a" / "002.png", tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(embed.shutil, "rmtree", lambda path: None)
        run(image, tiny_run, tmp_path / "out.npz")
    os.utime(image, ns=(0, 1))
    with pytest.raises(UserError, match=REFUSED):
        run(image, tiny_run, tmp_path / "out.npz")


def test_smaller_batches_continue_what_memory_did_not_suffice_for(
    photos, tiny_run, uninterrupted, tmp_path, monkeypatch
):
    """Memory suffices for the first of two parts of 128 files, then for parts of 4 times 4 files."""
    sizes = fail_in_the_second_part(monkeypatch, MemoryError)
    with pytest.raises(MemoryError):
        run(photos, tiny_run, tmp_path / "out.npz")
    resumed = run(photos, tiny_run, tmp_path / "out.npz", **{"embedding-batch-size": 4})
    assert sizes == [126, 24, 16, 8]
    np.testing.assert_array_equal(resumed["files"], uninterrupted["files"])
    np.testing.assert_allclose(resumed["embeddings"], uninterrupted["embeddings"], rtol=1e-4, atol=1e-5)


def test_a_command_that_ended_before_its_first_part_binds_no_later_one(photos, tiny_run, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.delattr(embed, "_embed_part")
        with pytest.raises(NameError):
            run(photos, tiny_run, tmp_path / "out.npz")
    assert run(photos / "a" / "002.png", tiny_run, tmp_path / "out.npz")["files"].tolist() == ["002.png"]


def test_a_resumed_command_is_bit_identical_to_an_uninterrupted_one(
    photos, tiny_run, uninterrupted, tmp_path, monkeypatch
):
    sizes = fail_in_the_second_part(monkeypatch, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(photos, tiny_run, tmp_path / "out.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npz.parts"]
    resumed = run(photos, tiny_run, tmp_path / "out.npz")
    assert sizes == [126, 24, 24]
    assert resumed.keys() == uninterrupted.keys()
    for name, array in uninterrupted.items():
        np.testing.assert_array_equal(resumed[name], array)
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]


def test_joining_the_parts_takes_the_memory_of_one(tmp_path):
    """40 parts of 1 MB; two are in memory while one is turned into bytes."""
    embeddings = np.random.default_rng(0).standard_normal((40, 1000, 250), np.float32)
    paths = [tmp_path / f"{number}.npz" for number in range(40)]
    for path, part in zip(paths, embeddings, strict=True):
        np.savez(path, embeddings=part, reasons=np.array([""] * 1000))
    names = [f"{number}.png" for number in range(40_000)]
    tracemalloc.start()
    embed._join_parts(tmp_path / "out.npz", paths, 250, names, [])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["embeddings"], embeddings.reshape(-1, 250))
        assert (arrays["files"].tolist(), arrays["unreadable"].tolist()) == (names, [])


def test_a_wrong_number_of_patches_leaves_nothing_behind(photos, tiny_run, tmp_path):
    with pytest.raises(UserError, match="--valid-patches is 0"):
        run(photos, tiny_run, tmp_path / "out.npz", **{"valid-patches": 0})
    assert not list(tmp_path.iterdir())


def damaged(part, kind):
    content = part.read_bytes()
    if kind == "of fewer embeddings":
        with np.load(part) as arrays:
            np.savez(part, embeddings=arrays["embeddings"][1:], reasons=arrays["reasons"])
    elif kind == "of no file":
        np.savez(part, embeddings=np.zeros((0, 32), np.float32), reasons=np.array([], np.str_))
    elif kind == "of too many files":
        with np.load(part) as arrays:
            np.savez(part, **{name: np.concatenate([arrays[name]] * 2) for name in arrays})
    else:
        part.write_bytes({"empty": b"", "truncated": content[:-1000], "no archive": b"x" * 99}[kind])


DAMAGES = ["empty", "truncated", "no archive", "of fewer embeddings", "of no file", "of too many files"]


def test_a_damaged_part_is_made_again_and_other_parts_are_refused(photos, tiny_run, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for number in range(3):
        shutil.copy(photos / "a" / f"{2 * number:03}.png", tmp_path / "in")
    with monkeypatch.context() as patched:
        patched.setattr(embed.shutil, "rmtree", lambda path: None)
        expected = run(tmp_path / "in", tiny_run, tmp_path / "out.npz")["embeddings"]
        for kind in DAMAGES:
            damaged(tmp_path / "out.npz.parts" / "0.npz", kind)
            made = run(tmp_path / "in", tiny_run, tmp_path / "out.npz")["embeddings"]
            np.testing.assert_array_equal(made, expected, err_msg=kind)
    with pytest.raises(UserError, match=REFUSED):
        run(tmp_path / "in", tiny_run, tmp_path / "out.npz", step=1)


def test_unreadable_files_are_listed_with_their_number(photos, tiny_run, tmp_path, capsys):
    for name in ("a/017.png", "a/000.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / name, tmp_path / "in" / name)
    arrays = run(tmp_path / "in", tiny_run, tmp_path / "out.npz")
    assert arrays["files"].tolist() == ["a/000.png"]
    assert "skipped 1 of 2 files that cannot be read:\n'a/017.png': no known format" in capsys.readouterr().err


def test_other_files_are_counted(photos, tiny_run, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a.jfif", "b.png", "photo"):
        shutil.copy(photos / "a" / "002.png", tmp_path / "in" / name)
    assert run(tmp_path / "in", tiny_run, tmp_path / "out.npz")["files"].tolist() == ["b.png"]
    assert f"left out 2 other files of {tmp_path / 'in'} (images end in .bmp, " in capsys.readouterr().err


@pytest.mark.parametrize(("kept", "message"), [("a/017.png", "1 file, none of which can"), ("notes.txt", "no image")])
def test_folders_without_pictures_are_refused(photos, tiny_run, tmp_path, kept, message):
    (tmp_path / "in").mkdir()
    shutil.copy(photos / kept, tmp_path / "in")
    with pytest.raises(UserError, match=message):
        run(tmp_path / "in", tiny_run, tmp_path / "out.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", ["folder", "pipe", "."])
def test_an_output_that_is_no_file_is_refused_before_the_work(photos, tiny_run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo("pipe")
    message = f"--output is '{name}': that is a folder or a device, so give the name of a file"
    for command in (
        ["embed", "--workdir", tiny_run, "--images", photos],
        ["export", tiny_run],
        ["export", tiny_run, "--format", "onnx", *(f"--{option}={value}" for option, value in GRID.items())],
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            command_line.COMMANDS[command[0]].run([*map(str, command[1:]), "--output", name], "empssl")
    assert sorted(os.listdir()) == ["folder", "pipe"]
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)


def test_names_of_unreadable_files_stay_on_one_line(tiny_run, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    PIL.Image.new("RGB", (32, 32)).save(tmp_path / "in" / "b.png")
    (tmp_path / "in" / "a\nc.png").touch()
    run(tmp_path / "in", tiny_run, tmp_path / "out.npz")
    assert "\n'a\\nc.png': no known format\n" in capsys.readouterr().err


def test_one_file(photos, tiny_run, tmp_path):
    assert run(photos / "a" / "002.png", tiny_run, tmp_path / "out.npz")["files"].tolist() == ["002.png"]
