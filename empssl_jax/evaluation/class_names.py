"""Matches the classes of train.npz and test.npz by name, whatever their order and number."""

from collections import Counter

import numpy as np

from empssl_jax.config.errors import UserError, one_line
from empssl_jax.evaluation.embeddings import Embeddings, LabelledEmbeddings


def match_classes(bank: LabelledEmbeddings, test: LabelledEmbeddings) -> Embeddings:
    """Gives the test split the bank's class numbers. Classes that only the test split has follow those of the bank.

    Args:
        bank: what train.npz holds. Classes that it does not name have the names that test.npz gives to their numbers,
            or else the numbers as names.
        test: what test.npz holds; the same in reverse.

    Raises:
        UserError: the names differ, and one occurs twice in a file or none is in both files.
    """
    bank_names, test_names = complete_names(bank, test.class_names), complete_names(test, bank.class_names)
    if bank_names != test_names:
        _check_names(bank_names, test_names)
    numbers = {name: number for number, name in enumerate(bank_names)}
    if len(numbers) < len(bank_names):  # a name that occurs twice: both files have the same names in the same order
        return Embeddings(bank._replace(class_names=bank_names), test._replace(class_names=test_names))
    for name in test_names:
        numbers.setdefault(name, len(numbers))
    # The label -1 selects the last element.
    labels = np.array([*(numbers[name] for name in test_names), -1], np.int32)[test.labels]
    return Embeddings(bank._replace(class_names=bank_names), test._replace(labels=labels, class_names=tuple(numbers)))


def complete_names(split: LabelledEmbeddings, other_names: tuple[str, ...]) -> tuple[str, ...]:
    """A name for each label: its own, or else the other file's for this number, or else the number."""
    names, size = split.class_names, int(split.labels.max()) + 1
    names += other_names[len(names) : size]
    return (*names, *map(str, range(len(names), size)))


def _check_names(bank_names: tuple[str, ...], test_names: tuple[str, ...]) -> None:
    """Raises UserError unless classes can be matched by these names, which differ."""
    for file, names in (("train.npz", bank_names), ("test.npz", test_names)):
        name, count = max(Counter(names).items(), key=lambda item: item[1], default=("", 0))
        if count > 1:
            raise UserError(
                f"--embeddings: {file} has {count} classes of the name {one_line(name)}, and the other file's names "
                "differ: give each class its own name, or both files the same class_names."
            )
    if bank_names and test_names and not set(bank_names) & set(test_names):
        raise UserError(
            f"--embeddings: train.npz has classes such as {one_line(bank_names[0])}, and test.npz has others, such as "
            f"{one_line(test_names[0])}: give both files the same class_names."
        )
