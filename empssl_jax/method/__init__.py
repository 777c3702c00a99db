"""The method. Read it in this order: losses -> patches -> encoder -> train_step -> hyperparameters -> lars.

EMP-SSL cuts every image of a batch into P random patches, 20 by default. It trains an encoder to give the patches of
one image similar projections (similarity) while projections of different images spread out (coding rate).

losses.py defines this objective. patches.py turns images into augmented patches; crops.py and augmentations.py have the
operations. encoder.py maps patches to embeddings and projections; resnet.py and batch_norm.py have its parts.
train_step.py combines all of them, hyperparameters.py has the numbers it depends on and the learning rate's schedule,
and lars.py is the optimizer. random_keys.py derives every key from the seed; the epoch and the image's index are folded
in. xla_cpu.py has five computations in forms that XLA's CPU compiler runs fast; read them as the plain formulas in
their docstrings.

Axes in annotations: P patches of an image, B images, N patches of all images (B * P), H height, W width, C channels,
D projection, E embedding. Apart from the Flax modules, everything is a pure function of arrays, state and keys.
Imports only `config` and `runtime`.
"""
