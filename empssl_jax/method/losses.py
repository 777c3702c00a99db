"""The EMP-SSL objective (Tong et al. 2023, arXiv 2304.03977, equations 1 to 3): coding rate and similarity."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Loss(NamedTuple):
    """The objective and its parts, each a scalar in float32."""

    total: Float[Array, ""]  # -coding_rate - invariance_coefficient * similarity, which training minimises
    coding_rate: Float[Array, ""]  # in nats; larger means that the projections are more spread out
    similarity: Float[Array, ""]  # mean cosine similarity to the image's mean projection, in [0, 1]


def normalise(vectors: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Scales vectors along the last axis to unit length.

    A zero vector stays zero. A vector whose squared norm overflows becomes NaN, which hides no overflow.
    """
    squared_norm = jnp.sum(vectors**2, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.maximum(squared_norm, 1e-24))
    return vectors * jnp.where(jnp.isfinite(squared_norm), scale, jnp.nan)


def coding_rate(projections: Float[Array, "P B D"], eps: float | Float[Array, ""]) -> Float[Array, ""]:
    """Coding rate of the B projections with the same patch number, in nats; mean over the P patch numbers.

    R(Z) = 1/2 logdet(I + D / (B eps) Z^T Z) for a B x D matrix Z (equation 1, with the paper's eps^2 written eps).
    Larger means that the projections fill more of the space. By Sylvester's identity, the D x D and the B x B
    determinants are equal; the smaller matrix is factored, in float32.

    Args:
        projections: rows of unit length, of P patches of B images.
        eps: squared distortion that the code allows, positive.
    """
    _, num_images, dim = projections.shape
    z = projections.astype(jnp.float32)
    gram = "pbd,pcd->pbc" if num_images <= dim else "pbc,pbd->pcd"
    scatter = jnp.einsum(gram, z, z, precision=jax.lax.Precision.HIGHEST)
    identity = jnp.eye(scatter.shape[-1], dtype=jnp.float32)
    return 0.5 * jnp.mean(_logdet(identity[None] + dim / (num_images * eps) * scatter))


def coding_rate_bounds(num_images: int, dim: int, eps: float) -> tuple[float, float]:
    """The smallest and the largest coding rate of `num_images` unit vectors in `dim` dimensions, in nats.

    Equal vectors have the smallest. Vectors that are orthogonal (num_images <= dim) or evenly spread over all
    directions (num_images > dim) have the largest.
    """
    scale = dim / (num_images * eps)
    smallest = 0.5 * jnp.log1p(dim / eps)
    rank = min(num_images, dim)
    largest = 0.5 * rank * jnp.log1p(scale * num_images / rank)
    return float(smallest), float(largest)


def similarity(projections: Float[Array, "P B D"]) -> Float[Array, ""]:
    """Mean cosine similarity between each projection and the mean projection of its image (equation 2), in [0, 1].

    Projections are unit vectors, so for an image it is the length of their mean.
    """
    z = projections.astype(jnp.float32)
    image_mean = normalise(jnp.mean(z, axis=0, keepdims=True))
    return jnp.mean(jnp.sum(normalise(z) * image_mean, axis=-1))


def emp_ssl_loss(
    projections: Float[Array, "P B D"],
    invariance_coefficient: float | Float[Array, ""],
    eps: float | Float[Array, ""],
    axis_name: str | None = None,
) -> Loss:
    """The loss that EMP-SSL minimises (equation 3): -coding_rate - invariance_coefficient * similarity.

    Args:
        projections: rows of unit length, of P patches of B images.
        invariance_coefficient: lambda in the paper, 200 there.
        eps: squared distortion of the coding rate, 0.2 in the paper.
        axis_name: under `jax.shard_map`, the mesh axis that splits the images of the batch. Every device then returns
            the loss of the whole batch.
    """
    if axis_name is None:
        rate, mean_similarity = coding_rate(projections, eps), similarity(projections)
    else:
        num_patches, own_patches = len(projections), _exchange_images_for_patches(projections, axis_name)
        # The padding adds patches of coding rate 0. This factor turns the mean over all patches into that over P.
        padding_factor = len(own_patches) * jax.lax.axis_size(axis_name) / num_patches
        rate = jax.lax.pmean(padding_factor * coding_rate(own_patches, eps), axis_name)
        mean_similarity = jax.lax.pmean(similarity(projections), axis_name)
    return Loss(-rate - invariance_coefficient * mean_similarity, rate, mean_similarity)


def _exchange_images_for_patches(projections: Float[Array, "P B D"], axis_name: str) -> Float[Array, "Q A D"]:
    """Exchanges projections between devices: from all P patches of B images to Q of the patches of all A images.

    Each device then factors only its share of the matrices. Neither its memory nor its work grows with the number of
    devices, as they would if every device gathered all projections. Zeros pad P to a multiple of the number of devices.
    """
    devices = jax.lax.axis_size(axis_name)
    missing = -len(projections) % devices
    padded = jnp.pad(projections, ((0, missing), (0, 0), (0, 0)))
    return jax.lax.all_to_all(padded, axis_name, split_axis=0, concat_axis=1, tiled=True)


@jax.custom_vjp
def _logdet(matrices: Float[Array, "P M M"]) -> Float[Array, " P"]:
    """Log-determinants of symmetric positive definite matrices, by Cholesky factorisation."""
    return _logdet_forward(matrices)[0]


def _logdet_forward(matrices: Float[Array, "P M M"]) -> tuple[Float[Array, " P"], Float[Array, "P M M"]]:
    factor = jnp.linalg.cholesky(matrices)
    diagonal = jnp.diagonal(factor, axis1=-2, axis2=-1)
    return 2 * jnp.sum(jnp.log(diagonal), axis=-1), factor


def _logdet_backward(factor: Float[Array, "P M M"], cotangent: Float[Array, " P"]) -> tuple[Float[Array, "P M M"]]:
    # d logdet(A) = tr(A^-1 dA). The factor is known, so the inverse takes one triangular solve. Differentiating the
    # factorisation itself would take several.
    identity = jnp.broadcast_to(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)
    half_inverse = jax.lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)
    inverse = jnp.einsum("pki,pkj->pij", half_inverse, half_inverse, precision=jax.lax.Precision.HIGHEST)
    return (cotangent[:, None, None] * inverse,)


_logdet.defvjp(_logdet_forward, _logdet_backward)
