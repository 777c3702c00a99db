"""EMP-SSL (Tong, Chen, Ma, LeCun 2023, arXiv 2304.03977) in JAX: image embeddings from about one epoch of training.

`empssl_jax.load(RUN)` gives a trained encoder. Start reading at `empssl_jax.method`.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from empssl_jax.inference.image_encoder import load

__all__ = ["__version__", "load"]
__version__ = "0.2.0"

# On some processors, XLA's newer CPU fusion backend runs convolutions 2 to 2.5 times slower than its older path; an
# empty list of fusions turns it off. XLA reads the variable when JAX first touches a device, so it must be set before
# that. A value that the user has set is kept.
_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=".strip()

# For every program read from the compilation cache, XLA on CPU prints an error of two thousand characters about
# processor features that do not exist (github.com/jax-ml/jax/issues/38445). Real errors are raised.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def __getattr__(name: str) -> Any:
    """Imports `load`, and with it JAX, on first use: after the variables above are set."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from empssl_jax.inference.image_encoder import load

    return load
