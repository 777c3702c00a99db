"""The whole method in one sitting: losses -> patches -> encoder -> train_step -> lars.

losses.py has the objective: coding rate and similarity. patches.py turns an image into augmented patches (crops.py and
augmentations.py have the operations). encoder.py maps patches to embeddings and projections (resnet.py and
batch_norm.py have its parts). train_step.py puts them together, and lars.py takes the step. random_keys.py derives all
randomness from (seed, epoch, image index); xla_cpu.py has four computations in the form that XLA's CPU compiler runs
fast. Everything is a pure function of arrays, state and keys. Imports only `config` and `runtime`.
"""
