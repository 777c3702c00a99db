"""EMP-SSL on Tiny ImageNet: 200 classes, 100,000 training and 10,000 validation images of 64x64 pixels.

    empssl train --config tiny_imagenet
    empssl eval --workdir runs/tiny_imagenet

TFDS does not have it. Unpack cs231n.stanford.edu/tiny-imagenet-200.zip here, and move the validation images, which are
in one folder, to one folder per class:

    cd tiny-imagenet-200/val
    while read -r file class _; do mkdir -p $class && mv images/$file $class/; done < val_annotations.txt
    rmdir images

Published, not measured here (linear classifier, top-1). The paper's abstract (arXiv 2304.03977): 38.1 % after one epoch
and 51.5 % in less than ten. The authors' README: 38.1 % after one epoch; 51.5 % after 10 with 200 patches.

In the authors' code, a comment names Tiny ImageNet next to ImageNet-100, so this is the recipe of imagenet100.py.
"""

from empssl_jax.config import Config, DataConfig, ModelConfig, PatchConfig, RunConfig

config = Config(
    data=DataConfig(dataset="folder:tiny-imagenet-200", test_split="val"),
    patches=PatchConfig(patch_size=224, patch_aspect=4 / 3, interpolation="bicubic"),
    model=ModelConfig(stem="imagenet"),
    run=RunConfig(workdir="runs/tiny_imagenet"),
)
