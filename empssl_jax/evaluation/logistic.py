"""Multinomial logistic regression on frozen embeddings, with the L2 penalty that held-out training images prefer."""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped

from empssl_jax.evaluation.accuracy import classifier_accuracy
from empssl_jax.evaluation.embeddings import LabelledEmbeddings
from empssl_jax.evaluation.whitening import Whitening, apply_in_parts, learn_whitening, without_whitening
from empssl_jax.run_folder.results import Accuracy
from empssl_jax.runtime.devices import padded, replicated, split_images, to_devices

# From strong to weak: the search for each solution begins at the one before.
PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
HELD_OUT = 10  # one training image out of so many helps to choose the penalty
MAX_STEPS = 100
TOLERANCE = 1e-4  # the gradient's norm at the solution, as a fraction of its norm where all parameters are 0

Kernel = Literal["standardised", "whitened"]  # which embeddings it multiplies
Params = dict[str, Float[Array | np.ndarray, "..."]]  # "kernel" (E, C) and "bias" (C,)
Carry = tuple[Params, optax.OptState, Float[Array, ""], Int[Array, ""]]  # with the gradient's norm and number of steps


class Examples(NamedTuple):
    """Embeddings with weights, 0 for those that take no part."""

    embeddings: Float[Array, "N E"]
    labels: Int[Array, " N"]
    weights: Float[Array, " N"]


class Classifier(NamedTuple):
    """A linear classifier of standardised embeddings."""

    mean: Float[Array | np.ndarray, " E"]
    scale: Float[Array | np.ndarray, " E"]
    kernel: Float[Array | np.ndarray, "E C"]
    bias: Float[Array | np.ndarray, " C"]

    def logits(self, embeddings: Float[Array | np.ndarray, "N E"]) -> Float[Array, "N C"]:
        """The score of each class."""
        standardised = (embeddings - self.mean[None, :]) / self.scale[None, :]
        return jnp.matmul(standardised, self.kernel, precision=jax.lax.Precision.HIGHEST) + self.bias[None, :]


class Bank(NamedTuple):
    """Embeddings to learn from: standardised, and then whitened, which saves L-BFGS steps where the penalty is weak."""

    embeddings: Float[np.ndarray, "N E"]  # of images and then, if there are any, of the same images mirrored
    labels: Int[np.ndarray, " N"]
    num_classes: int
    mean: Float[np.ndarray, " E"]
    scale: Float[np.ndarray, " E"]
    whitening: Whitening


class Solution(NamedTuple):
    """The best of the tried penalties, and its solution without the held-out images."""

    held_out_accuracy: float
    penalty: float
    params: Params


class Fitted(NamedTuple):
    """A classifier, and the penalty and kernel that the held-out images chose."""

    classifier: Classifier
    penalty: float
    penalised: Kernel
    held_out_accuracy: float


def logistic_accuracy(train: LabelledEmbeddings, test: LabelledEmbeddings, mesh: Mesh) -> Accuracy:
    """Accuracy of logistic regression, its L2 penalty, and whether the penalty is on the kernel of whitened embeddings.

    Whitening helps where embeddings have many dimensions and most images a label, and harms where few have one. If the
    classifier learns from mirrored images, the scores of each test image and of its mirror image are added.
    """
    fitted = fit_classifier(train, mesh, kernels=("standardised", "whitened"))
    scores = fitted.classifier.logits(test.embeddings)
    if train.mirrored is not None and test.mirrored is not None:
        scores += fitted.classifier.logits(test.mirrored)
    accuracy = classifier_accuracy(scores, test.labels, train.labels)
    return accuracy | {"penalty": fitted.penalty, "whitened": fitted.penalised == "whitened"}


def fit_classifier(train: LabelledEmbeddings, mesh: Mesh, kernels: Sequence[Kernel] = ("standardised",)) -> Fitted:
    """Logistic regression with the L2 penalty that held-out images prefer.

    Every tenth image, class by class, is held out, with its mirror image; of fewer than ten images, none is, and all
    are both learned and tested. The accuracy on the held-out images decides which kernel is penalised, and how much;
    then the classifier is fitted to all images. L-BFGS solves the convex problems, so nothing is drawn at random.

    Args:
        train: embeddings to learn from; they are split over the devices.
        mesh: the devices.
        kernels: those that may be penalised.
    """
    bank = make_bank(train)
    # Class by class: among images whose classes alternate, every tenth could be of one class.
    held_out = np.argsort(train.labels, kind="stable")[HELD_OUT - 1 :: HELD_OUT]
    kept = np.isin(np.arange(len(bank.labels)) % len(train.labels), held_out, invert=True)
    examples = to_examples(bank.embeddings, bank.labels, kept, mesh)
    tested = held_out if len(held_out) else np.arange(len(train.labels))
    whitenings = {"standardised": bank.whitening, "whitened": None}  # as `fit` takes them
    solutions = {kernel: search(bank, examples, tested, whitenings[kernel], mesh) for kernel in kernels}
    penalised = max(kernels, key=lambda kernel: solutions[kernel].held_out_accuracy)
    held_out_accuracy, penalty, start = solutions[penalised]
    everything = examples._replace(weights=_split(np.ones(len(bank.labels)), np.float32, mesh))
    params = fit(start, everything, penalty, mesh, whitenings[penalised])
    kernel, bias = map(np.asarray, without_whitening(bank.whitening, params["kernel"], params["bias"]))
    classifier = Classifier(bank.mean, bank.scale, kernel, bias)
    return Fitted(classifier, penalty, penalised, held_out_accuracy)


def make_bank(train: LabelledEmbeddings) -> Bank:
    """Standardises and whitens embeddings, of mirrored images too if there are any."""
    everything = train.with_mirrored()
    # A copy, to be changed in place below, because it can fill much of the memory.
    bank = train.embeddings.copy() if everything is train else everything.embeddings
    mean = np.mean(bank, axis=0)
    bank -= mean
    deviation = np.sqrt(np.einsum("ne,ne->e", bank, bank) / len(bank))
    # Rounding can give a dimension that does not vary a tiny deviation, but no range. Where the squares of a range are
    # too small for float32, the deviation is 0.
    scale = np.where((np.ptp(bank, axis=0) > 0) & (deviation > 0), deviation, np.float32(1.0))
    bank /= scale
    whitening = Whitening(*map(np.asarray, learn_whitening(bank[: len(train.labels)])))
    apply_in_parts(whitening, bank, out=bank)
    return Bank(bank, everything.labels, train.num_classes, mean, scale, whitening)


def search(
    bank: Bank, examples: Examples, tested: Int[np.ndarray, " K"], whitening: Whitening | None, mesh: Mesh
) -> Solution:
    """Tries penalties, from the strongest one on, until the accuracy on the tested images falls; see `fit`."""
    embeddings, labels = bank.embeddings[tested], bank.labels[tested]
    best = Solution(-1.0, PENALTIES[0], _zeros(bank.embeddings.shape[1], bank.num_classes))
    for penalty in PENALTIES:
        params = fit(best.params, examples, penalty, mesh, whitening)
        scores = embeddings @ params["kernel"] + params["bias"]
        accuracy = classifier_accuracy(scores, labels, bank.labels)["top1"]
        if accuracy < best.held_out_accuracy:
            break
        best = Solution(accuracy, penalty, params)
    return best


def _zeros(dim: int, num_classes: int) -> Params:
    return {"kernel": np.zeros((dim, num_classes), np.float32), "bias": np.zeros(num_classes, np.float32)}


def to_examples(
    embeddings: Float[np.ndarray, "N E"], labels: Int[np.ndarray, " N"], weights: np.ndarray, mesh: Mesh
) -> Examples:
    """The examples, split over the devices, and padded to equal shares by examples of weight 0."""
    parts = (embeddings, np.float32), (labels, np.int32), (weights, np.float32)
    return Examples(*(_split(array, dtype, mesh) for array, dtype in parts))


def _split(array: Shaped[np.ndarray, "N *rest"], dtype: type, mesh: Mesh) -> Shaped[Array, "M *rest"]:
    return to_devices(padded(array, mesh).astype(dtype, copy=False), split_images(mesh))


def fit(start: Params, examples: Examples, penalty: float, mesh: Mesh, whitening: Whitening | None = None) -> Params:
    """Minimises the mean cross entropy plus penalty / 2 times the kernel's squared norm; returns host arrays.

    With a whitening, the examples are whitened, and the norm is that of the same classifier's kernel of embeddings that
    are not.
    """
    return jax.tree.map(np.asarray, _fit(start, examples, penalty, whitening, mesh))


@functools.partial(jax.jit, static_argnums=4)
def _fit(
    start: Params, examples: Examples, penalty: Float[Array, ""], whitening: Whitening | None, mesh: Mesh
) -> Params:
    def objective(params: Params) -> Float[Array, ""]:
        kernel = params["kernel"]
        if whitening is not None:
            kernel, _ = without_whitening(whitening, kernel, params["bias"])
        # L-BFGS needs gradients to more digits than GPUs and TPUs multiply with by default.
        logits = jnp.matmul(examples.embeddings, params["kernel"], precision=jax.lax.Precision.HIGHEST) + params["bias"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, examples.labels)
        mean = jnp.sum(losses * examples.weights) / jnp.sum(examples.weights)
        return mean + penalty / 2 * jnp.sum(kernel**2)

    optimizer = optax.lbfgs()
    limit = TOLERANCE * optax.tree.norm(jax.grad(objective)(jax.tree.map(jnp.zeros_like, start)))
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry: Carry) -> Carry:
        params, state, _, number = carry
        value, gradient = value_and_grad(params, state=state)
        updates, state = optimizer.update(gradient, state, params, value=value, grad=gradient, value_fn=objective)
        return optax.apply_updates(params, updates), state, optax.tree.norm(gradient), number + 1

    def is_unfinished(carry: Carry) -> Bool[Array, ""]:
        return (carry[2] > limit) & (carry[3] < MAX_STEPS)

    carry = start, optimizer.init(start), jnp.array(jnp.inf), jnp.array(0)
    params = jax.lax.while_loop(is_unfinished, step, carry)[0]
    return jax.lax.with_sharding_constraint(params, replicated(mesh))
