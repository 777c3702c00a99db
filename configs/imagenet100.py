"""EMP-SSL on ImageNet-100: 100 classes of ImageNet, about 127,000 training and 5,000 validation images.

    empssl train --config imagenet100
    empssl eval --workdir runs/imagenet100

TFDS does not have it. Select the classes from ImageNet (ILSVRC 2012, from image-net.org, one folder per class) with the
list that the authors refer to, imagenet100.txt in github.com/HobbitLong/CMC. Symbolic links are enough:

    mkdir -p imagenet100/train imagenet100/val
    while read -r class _; do
        ln -s /path/to/imagenet/train/$class imagenet100/train/; ln -s /path/to/imagenet/val/$class imagenet100/val/
    done < imagenet100.txt

Published, not measured here (linear classifier, top-1). The paper's abstract (arXiv 2304.03977): 58.5 % after one epoch
and 78.9 % in less than ten. The authors' README: 58.5 % after one epoch with 20 patches (its command has `--epoch 2`,
which also sets the length of the learning rate's cosine); 78.9 % after 10 with 200 patches.

As in the authors' code, crops have a quarter of the image's area and a random aspect ratio, and are resized bicubically
to patches of 224x224 pixels. The authors' code crops the original files; here, images are first resized to 256x256
pixels, which take 25 GB on disk.

A step has 2,000 patches of 224x224 pixels. By the count of XLA's compiler for an H200, it needs 18 GB of memory in
bfloat16, the default on GPUs, and 35 GB in float32. --train-patches 200 --accumulate 10 needs 30 GB
(docs/performance.md). It has not been run yet.
"""

from empssl_jax.config import Config, DataConfig, ModelConfig, PatchConfig, RunConfig

config = Config(
    data=DataConfig(dataset="folder:imagenet100", test_split="val", image_size=256),
    patches=PatchConfig(patch_size=224, patch_aspect=4 / 3, interpolation="bicubic"),
    model=ModelConfig(stem="imagenet"),
    run=RunConfig(workdir="runs/imagenet100"),
)
