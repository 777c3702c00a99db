"""EMP-SSL (Tong, Chen, Ma, LeCun 2023, arXiv 2304.03977) in JAX: image embeddings from about one epoch of training."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from empssl_jax.inference.image_encoder import load

__all__ = ["load"]

# XLA's newer CPU fusion backend runs convolutions 2 to 2.5 times slower than its older path; an empty list of fusions
# turns it off. XLA reads the variable when JAX first touches a device, so this must come before that. A value that the
# user has set stands.
_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=".strip()

# With every program that it reads from the compilation cache, XLA on CPU prints an error of two thousand characters
# about features of the processor that are none (github.com/jax-ml/jax/issues/38445). What goes wrong for real raises.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def __getattr__(name: str) -> Any:
    """Imports `load`, and JAX with it, when it is first asked for: after the variables above are set."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from empssl_jax.inference.image_encoder import load

    return load
