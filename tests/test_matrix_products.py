"""Loss, pixels and measurements use float32 products. By default, those of GPUs and TPUs have fewer digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empssl_jax.evaluation import knn, linear, logistic, whitening
from empssl_jax.method import crops, losses
from empssl_jax.runtime.devices import device_mesh

ROWS, LABELS, KERNEL, BIAS = jnp.ones((12, 4)), jnp.arange(12) % 3, jnp.ones((4, 3)), jnp.ones(3)
PIXELS, PARAMS = jnp.ones((3, 8, 8)), {"kernel": KERNEL, "bias": BIAS}
CLASSIFIER = logistic.Classifier(jnp.ones(4), jnp.ones(4), KERNEL, BIAS)
MAP = whitening.Whitening(jnp.ones((1, 4)), jnp.ones(()), jnp.eye(4))


def resized(interpolation):
    return lambda: crops.resize_crop(PIXELS, 1, 1, jnp.array([4, 4]), 6, interpolation)


def logistic_regression(penalised):
    examples = logistic.to_examples(np.asarray(ROWS), np.asarray(LABELS), np.ones(12), device_mesh(1))
    return lambda: logistic._fit(PARAMS, examples, 0.1, penalised, device_mesh(1))


def linear_classifier():
    examples = linear._Examples(ROWS, LABELS)
    return linear._run(jax.random.key(0), examples, examples, jnp.ones(()), jnp.ones(()), 4, 3, 5, 2, device_mesh(1))


COMPUTATIONS = {
    "the loss and its gradient, few images": lambda: jax.grad(lambda z: losses.emp_ssl_loss(z, 1.0, 0.2).total)(
        jnp.ones((2, 3, 4))
    ),
    "the loss and its gradient, many images": lambda: jax.grad(lambda z: losses.emp_ssl_loss(z, 1.0, 0.2).total)(
        jnp.ones((2, 6, 4))
    ),
    "square crops": lambda: crops.square_crop(PIXELS, 1, 1, 4, 6),
    "bilinear crops": resized("bilinear"),
    "bicubic crops": resized("bicubic"),
    "kNN": lambda: knn.knn_scores(ROWS, ROWS, LABELS, num_classes=3, num_neighbours=2, temperature=0.1),
    "learning to whiten": lambda: whitening.learn_whitening(ROWS),
    "undoing whitening": lambda: whitening.without_whitening(MAP, KERNEL, BIAS),
    "the linear classifier": linear_classifier,
    "the classifier of fine-tuning": lambda: CLASSIFIER.logits(ROWS),
    "logistic regression": logistic_regression(None),
    "logistic regression of whitened embeddings": logistic_regression(MAP),
}


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_every_matrix_product_has_the_highest_precision(name):
    program = jax.jit(COMPUTATIONS[name]).lower().as_text()
    products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
