"""Decoded images are equal in memory and on disk, memory-mapped, and decoded again only when their files change."""

import errno
import fcntl
import io
import multiprocessing
import os
import tracemalloc

import numpy as np
import PIL.Image
import pytest

from empssl_jax.config.errors import UserError
from empssl_jax.data import decoded_images as image_store
from empssl_jax.data.decoded_images import Example, Source, load_images
from empssl_jax.run_folder.workdir import locked


def pixels(number: int, side: int = 8) -> np.ndarray:
    return np.random.RandomState(number).randint(0, 256, (side, side, 3)).astype(np.uint8)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, "png", compress_level=1)
    return file.getvalue()


def source_of(contents, **options) -> Source:
    def read(numbers):
        return [Example(contents[i], i % 3 - 1, f"{i:03}.png") for i in numbers]

    defaults = {"name": "pictures train", "location": "here", "fingerprint": "1", "strict": False, "remedy": "fix it"}
    return Source(size=len(contents), read=read, **(defaults | options))


CONTENTS = [png(pixels(i)) for i in range(100)]


def entries(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def stored(tmp_path):
    return load_images(source_of(CONTENTS), None, str(tmp_path))


def test_images_are_the_same_in_memory_and_on_disk(stored, tmp_path, monkeypatch):
    expected = np.stack([pixels(i) for i in range(100)])
    again = load_images(source_of(CONTENTS), None, str(tmp_path))
    monkeypatch.setattr(image_store, "user_cache", lambda: None)
    in_memory = load_images(source_of(CONTENTS), None, None)
    for images in (stored, in_memory, again):
        np.testing.assert_array_equal(images.images, expected)
        np.testing.assert_array_equal(images.labels, np.arange(100) % 3 - 1)
        assert images.ids.tolist() == [f"{i:03}.png" for i in range(100)]
        assert images.unreadable == {}


def test_files_are_mapped_and_not_read(stored):
    assert isinstance(stored.images.base, np.memmap)
    assert not stored.images.flags.writeable


def test_neither_making_nor_mapping_takes_the_memory_of_all_images(tmp_path):
    contents = [png(np.full((96, 96, 3), i % 256, np.uint8)) for i in range(1500)]
    total = 1500 * 96 * 96 * 3
    for _ in range(2):
        tracemalloc.start()
        images = load_images(source_of(contents), None, str(tmp_path)).images
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert images.nbytes == total > 40e6
        assert peak < total / 2
    assert [int(images[i, 5, 5, 0]) for i in (0, 777, 1499)] == [0, 777 % 256, 1499 % 256]


def fail(*_):
    raise AssertionError("Images were decoded again.")


def test_images_are_decoded_once(stored, tmp_path, monkeypatch):
    monkeypatch.setattr(image_store, "decode_or_reason", fail)
    again = load_images(source_of(CONTENTS), None, str(tmp_path))
    np.testing.assert_array_equal(stored.images, again.images)


@pytest.mark.parametrize(
    ("changed", "side", "files"), [({"fingerprint": "2"}, None, 3), ({}, 4, 6), ({"location": "there"}, None, 6)]
)
def test_other_images_are_decoded_and_replace_those_of_the_same_location(stored, tmp_path, changed, side, files):
    others = [png(pixels(1000 + i)) for i in range(50)]
    images = load_images(source_of(others, **changed), side, str(tmp_path)).images
    assert images.shape == (50, side or 8, side or 8, 3)
    if side is None:
        np.testing.assert_array_equal(images, np.stack([pixels(1000 + i) for i in range(50)]))
    np.testing.assert_array_equal(stored.images[7], pixels(7))  # a run that has them mapped is not affected
    assert len(entries(tmp_path)) == files


def test_a_killed_command_leaves_no_index_of_other_images(stored, tmp_path, monkeypatch):
    """The new images have the number and sizes of the old ones, which they have just replaced."""

    def killed(*_):
        raise KeyboardInterrupt

    others = [png(pixels(1000 + i)) for i in range(100)]
    monkeypatch.setattr(image_store, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        load_images(source_of(others, fingerprint="2"), None, str(tmp_path))
    monkeypatch.undo()
    np.testing.assert_array_equal(load_images(source_of(CONTENTS), None, str(tmp_path)).images[3], pixels(3))


def cut(folder):
    (folder / "images").write_bytes((folder / "images").read_bytes()[:-1])


DAMAGE = {
    "images cut short": cut,
    "no images": lambda folder: (folder / "images").unlink(),
    "no index": lambda folder: (folder / "index.json").unlink(),
    "half an index": lambda folder: (folder / "index.json").write_text('{"fingerprint": '),
    "another index": lambda folder: (folder / "index.json").write_text("[]"),
    "left by a process that was killed": lambda folder: (folder / "images.tmp").write_bytes(b"half"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_made_again(stored, tmp_path, case):
    expected = stored.images.copy()
    DAMAGE[case](next(tmp_path.iterdir()))
    np.testing.assert_array_equal(load_images(source_of(CONTENTS), None, str(tmp_path)).images, expected)


def load_in_process(folder, queue):
    queue.put(load_images(source_of(CONTENTS), None, folder).images.sum())


def test_processes_that_want_the_same_file_wait_for_each_other(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=load_in_process, args=(str(tmp_path), queue)) for _ in range(3)]
    for process in processes:
        process.start()
    sums = [queue.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    assert set(sums) == {sum(int(pixels(i).sum()) for i in range(100))}


def test_a_process_that_waits_for_another_decodes_nothing(stored, tmp_path, monkeypatch):
    index = next(tmp_path.glob("*/index.json"))
    written = index.read_bytes()
    index.unlink()

    def other_process_ends(file, wait):
        assert wait
        index.write_bytes(written)

    monkeypatch.setattr(image_store, "lock_file", other_process_ends)
    source = source_of(CONTENTS)._replace(read=fail)
    np.testing.assert_array_equal(load_images(source, None, str(tmp_path)).images, stored.images)


BAD = [b"", b"nonsense", CONTENTS[3][:-60]]


def test_what_cannot_be_decoded_is_left_out_and_remembered(tmp_path):
    contents = CONTENTS[:]
    contents[0], contents[40], contents[99] = BAD
    for _ in range(2):
        images = load_images(source_of(contents), None, str(tmp_path))
        assert list(images.unreadable) == ["000.png", "040.png", "099.png"]
        assert images.unreadable["040.png"] == "no known format"
        kept = [i for i in range(100) if i not in (0, 40, 99)]
        np.testing.assert_array_equal(images.images, np.stack([pixels(i) for i in kept]))
        np.testing.assert_array_equal(images.labels, np.array(kept) % 3 - 1)
        assert images.ids.tolist() == [f"{i:03}.png" for i in kept]


READ_ERRORS = [OSError(number, os.strerror(number)) for number in (errno.EACCES, errno.ESTALE, errno.EIO, errno.EMFILE)]


@pytest.mark.parametrize("error", [*READ_ERRORS, MemoryError()], ids=str)
def test_an_intact_file_that_cannot_be_read_now_is_not_left_out(tmp_path, monkeypatch, error):
    for number, content in enumerate(CONTENTS):
        (tmp_path / f"{number:03}.png").write_bytes(content)
    source = source_of(sorted(tmp_path.glob("*.png")))
    opened = PIL.Image.open

    def open_others(path):
        if path == tmp_path / "040.png":
            raise error
        return opened(path)

    monkeypatch.setattr(PIL.Image, "open", open_others)
    reason = error.strerror if isinstance(error, OSError) else "out of memory"
    with pytest.raises(UserError, match=rf"^'.*/040\.png' cannot be read \({reason}\): fix this and give the same"):
        load_images(source, None, str(tmp_path / "cache"))
    monkeypatch.undo()
    images = load_images(source, None, str(tmp_path / "cache"))
    assert images.unreadable == {}
    np.testing.assert_array_equal(images.images[40], pixels(40))


def test_strict_sources_refuse_what_cannot_be_decoded(tmp_path):
    with pytest.raises(UserError, match=r"^Image 001\.png of pictures train cannot be decoded \(no known for"):
        load_images(source_of([CONTENTS[0], BAD[1]], strict=True), None, str(tmp_path))


def test_a_data_set_without_decodable_images_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^pictures train has 3 images, none of which can be decoded, for example 000"):
        load_images(source_of(BAD), None, str(tmp_path))


def test_several_shapes_are_refused_with_the_option_that_helps(tmp_path):
    contents = [*CONTENTS[:50], png(pixels(0, 9))]
    with pytest.raises(UserError, match=r"shapes \[\(8, 8, 3\), \(9, 9, 3\)\]: .* give --image-size"):
        load_images(source_of(contents), None, str(tmp_path))
    assert "images" not in [path.name for path in tmp_path.rglob("*")]
    assert load_images(source_of(contents), 8, str(tmp_path)).images.shape == (51, 8, 8, 3)


def test_a_full_disk_is_reported_and_left_as_it_was(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, content):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_store, "atomic_write", lambda path: Full())
    remedy = "free 0.1 GB for the decoded images of pictures train, or give another folder"
    with pytest.raises(UserError, match=rf"^--cache-dir .* cannot be written to \(No space left on device\): {remedy}"):
        load_images(source_of(CONTENTS), None, str(tmp_path))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lock"]


def test_a_cache_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"^--cache-dir .*/file cannot be written to \(Not a directory\): give an"):
        load_images(source_of(CONTENTS), None, str(tmp_path / "file"))


def test_without_a_cache_folder_images_stay_in_memory(tmp_path, monkeypatch, capsys):
    expected = load_images(source_of(CONTENTS), None, str(tmp_path))
    monkeypatch.setattr(image_store, "user_cache", lambda: None)
    images = load_images(source_of(CONTENTS), None, None)
    np.testing.assert_array_equal(images.images, expected.images)
    np.testing.assert_array_equal(images.labels, expected.labels)
    assert not isinstance(images.images.base, np.memmap)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_with_a_warning(stored, tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    images = load_images(source_of(CONTENTS), None, str(tmp_path / "other"))
    np.testing.assert_array_equal(images.images, stored.images)
    with locked(tmp_path / "run"):
        pass
    warned = [line for line in capsys.readouterr().err.splitlines() if "cannot be locked: let only one" in line]
    assert [line.startswith("warning: ") for line in warned] == [True, True]
    assert str(tmp_path / "run") in warned[1]
