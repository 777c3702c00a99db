"""Progress bars over images."""

import sys

from tqdm import tqdm

from empssl_jax.config.errors import counted
from empssl_jax.runtime.distributed import is_first_process


def image_progress(description: str, num_images: int) -> tqdm:
    """A progress bar over images in the first process, or one plain line if stderr is not a terminal."""
    bar = tqdm(total=num_images, desc=description, unit=" images", disable=None if is_first_process() else True)
    if bar.disable and is_first_process():
        print(f"{description}: {counted(num_images, 'image')}", file=sys.stderr, flush=True)
    return bar
