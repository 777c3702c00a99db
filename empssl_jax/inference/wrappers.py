"""Removes the prefixes that training programs add to the names of a state dictionary.

A model inside another one has its names after a prefix: `module.` of DataParallel, `model.` or `encoder.` of a training
program. The prefix is whatever stands before the names of the ResNet's stages, `layer1.0.` for example. A few wrappers
can also stand inside a name.
"""

import re
from typing import NamedTuple

from empssl_jax.config.errors import UserError, one_line
from empssl_jax.inference.weight_files import Weights

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
IN_A_STAGE = re.compile(r"((?:.*\.)?)layer[1-4]\.[0-9]+\.")


class Unwrapped(NamedTuple):
    """A state dictionary without the prefixes of wrappers."""

    weights: Weights
    resnet: str  # the prefix that the names of the ResNet still have: "backbone." or none
    removed: list[str]  # the prefixes that were removed
    outside: list[str]  # the names without the wrappers' prefix, such as those of a loss beside the encoder


def unwrap(weights: Weights) -> Unwrapped:
    """Removes all wrappers around an encoder whose ResNet is called `backbone`, or around a ResNet alone.

    Raises:
        UserError: the arrays are those of several ResNets.
    """
    short = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in weights}
    prefixes = sorted({match[1] for name in short.values() if (match := IN_A_STAGE.match(name))})
    if len(prefixes) > 1:
        shown = ", ".join(map(one_line, prefixes[:3]))
        raise UserError(f"The file contains {len(prefixes)} ResNets, with prefixes such as {shown}: give one of them.")
    resnet = "".join(prefixes)
    outer = resnet.removesuffix("backbone.")
    kept = {short[name].removeprefix(outer): array for name, array in weights.items()}
    if len(kept) < len(weights):
        raise UserError("Several arrays of the file have the same name apart from wrappers: give another file.")
    inside = sorted(WRAPPERS & {part for name in weights for part in name.split(".")})
    removed = [f"{part}." for part in inside] + [outer] * bool(outer)
    outside = [name for name in short.values() if not name.startswith(outer)]
    return Unwrapped(kept, resnet.removeprefix(outer), removed, outside)
