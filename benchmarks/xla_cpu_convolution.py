"""Measures weaknesses of XLA's CPU convolutions that the package works around. Run it again for new JAX versions.

    python -m benchmarks.xla_cpu_convolution

1. XLA's newer fusion backend against its older path, which `empssl_jax/__init__.py` selects, and against that path with
   oneDNN, which the package does not use: milliseconds of the forward pass, input gradient and kernel gradient of the
   five kinds of 3x3 convolutions in a ResNet-18, batch 32.
2. A 3x3 convolution of a 2x2 map (512 channels, 200 patches) by XLA, by im2col, and as one dense product, which is how
   `resnet.Convolution` computes it.
3. The relative error of a sum of two matrix products with oneDNN. The gradient of the coding rate has such a sum. Only
   if the error is below 1e-5 may the package use oneDNN.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax import Array

NEWER, OLDER = "", "--xla_cpu_experimental_ynn_fusion_type="
ONEDNN = f"{OLDER} --xla_cpu_experimental_onednn_custom_call=true"
LAYERS = ((32, 3, 64, 1), (32, 64, 64, 1), (32, 64, 128, 2), (16, 128, 128, 1), (8, 256, 256, 1))


def milliseconds(work: Callable[..., "Array"], *arguments: "Array") -> float:
    """Fastest of five runs of a compiled function."""
    import jax

    compiled = jax.jit(work).lower(*arguments).compile()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def three_passes(convolution: Callable[..., "Array"], x: "Array", kernel: "Array") -> list[float]:
    """Milliseconds of the forward pass, the input's gradient and the kernel's gradient."""
    import jax

    g = convolution(x, kernel)
    input_gradient = lambda x, kernel, g: jax.vjp(lambda x: convolution(x, kernel), x)[1](g)  # noqa: E731
    kernel_gradient = lambda x, kernel, g: jax.vjp(lambda kernel: convolution(x, kernel), kernel)[1](g)  # noqa: E731
    return [
        milliseconds(convolution, x, kernel),
        milliseconds(input_gradient, x, kernel, g),
        milliseconds(kernel_gradient, x, kernel, g),
    ]


def general(x: "Array", kernel: "Array", stride: int = 1) -> "Array":
    """XLA's convolution."""
    import jax

    padding = [(1, 1), (1, 1)]
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def im2col(x: "Array", kernel: "Array") -> "Array":
    """Concatenates nine shifted copies and computes one product."""
    import jax.numpy as jnp

    side, padded = x.shape[1], jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + side, j : j + side] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def dense(x: "Array", kernel: "Array") -> "Array":
    """Computes one product from the 4 positions of a 2x2 map to the same 4."""
    import jax.numpy as jnp

    shifted = jnp.stack([jnp.stack([kernel[1 - i : 3 - i, 1 - j : 3 - j] for j in (0, 1)]) for i in (0, 1)])
    return jnp.einsum("nabc,ijabcd->nijd", x, shifted)


def layers(dtype: str) -> None:
    """Prints part 1 for the flags of this process."""
    import functools

    import jax.numpy as jnp

    total = 0.0
    for side, features_in, features_out, stride in LAYERS:
        x, kernel = jnp.ones((32, side, side, features_in), dtype), jnp.ones((3, 3, features_in, features_out), dtype)
        passes = three_passes(functools.partial(general, stride=stride), x, kernel)
        total += sum(passes)
        times = " ".join(f"{value:6.0f}" for value in passes)
        print(f"  {features_in:3} to {features_out:3} channels, {side}x{side}, stride {stride}: {times}")
    print(f"  sum {total:.0f} ms")


def small_maps() -> None:
    """Prints part 2."""
    import jax.numpy as jnp

    x, kernel = jnp.ones((200, 2, 2, 512)), jnp.ones((3, 3, 512, 512))
    for convolution in (general, im2col, dense):
        times = " ".join(f"{value:6.0f}" for value in three_passes(convolution, x, kernel))
        print(f"  {convolution.__name__:8} {times}")


def sum_of_products() -> None:
    """Prints part 3 for the flags of this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    def transposed_sum(a: "Array", b: "Array") -> "Array":
        return jnp.swapaxes(a @ b + jnp.swapaxes(a, 1, 2) @ b, 0, 1)

    a, b = (jax.random.normal(jax.random.key(i), (20, 50, size)) for i, size in enumerate((50, 256)))
    exact = np.einsum("pij,pjd->ipd", np.asarray(a, np.float64) + np.swapaxes(a, 1, 2), np.asarray(b, np.float64))
    error = np.linalg.norm(jax.jit(transposed_sum)(a, b) - exact) / np.linalg.norm(exact)
    print(f"  relative error {error:.1e}")


PARTS: dict[str, Callable[..., None]] = {
    "layers": layers,
    "small_maps": small_maps,
    "sum_of_products": sum_of_products,
}


def main() -> None:
    """Runs each part in its own process with its flags, because XLA reads them once.

    The processes run this file, not the module: importing the package would change the flags.
    """
    passes = "forward, input gradient, kernel gradient in ms"
    for title, part, flags in (
        (f"newer fusions (JAX's default): {passes}", "layers float32", NEWER),
        (f"older path (this package's): {passes}", "layers float32", OLDER),
        (f"older path, bfloat16: {passes}", "layers bfloat16", OLDER),
        (f"oneDNN: {passes}", "layers float32", ONEDNN),
        (f"oneDNN, bfloat16: {passes}", "layers bfloat16", ONEDNN),
        (f"2x2 maps, older path: {passes}", "small_maps", OLDER),
        ("sum of two products, older path", "sum_of_products", OLDER),
        ("sum of two products, oneDNN", "sum_of_products", ONEDNN),
    ):
        print(title, flush=True)
        subprocess.run([sys.executable, __file__, *part.split()], env=os.environ | {"XLA_FLAGS": flags}, check=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        PARTS[sys.argv[1]](*sys.argv[2:])
