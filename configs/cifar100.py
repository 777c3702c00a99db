"""EMP-SSL on CIFAR-100 as published: as on CIFAR-10, all defaults are the paper's.

    empssl train --config cifar100
    empssl eval --workdir runs/cifar100

Published, not measured here (linear classifier, top-1). The paper's abstract (arXiv 2304.03977): 58.5 % after one epoch
and 70.1 % in less than ten. The authors' README: 58.5 % after one epoch (its command has `--epoch 2`, which also sets
the length of the learning rate's cosine); with 20 patches 55.1, 67.8 and 72.4 % after 1, 10 and 30 epochs, with 200
patches 57.7, 70.1 and 73.3 %. To train those: --max-epochs 30, and --train-patches 200 --remat for 200 patches.
"""

from empssl_jax.config import Config, DataConfig, RunConfig

config = Config(data=DataConfig(dataset="cifar100"), run=RunConfig(workdir="runs/cifar100"))
