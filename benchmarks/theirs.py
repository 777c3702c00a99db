"""The work of each row of the table as the PyTorch baseline does it; benchmarks/ours.py has the same functions."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import baseline_torch as baseline
from benchmarks.sizes import Sizes, Work, random_images, random_labels, random_vectors
from empssl_jax.config import Config
from empssl_jax.runtime.cores import usable_cores

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _until_done(work: Callable[[], Any]) -> Work:
    def run() -> None:
        work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return run


def _model() -> torch.nn.Module:
    return baseline.Encoder().to(DEVICE, memory_format=torch.channels_last)


def _patches(sizes: Sizes, patch_size: int) -> torch.Tensor:
    patches = torch.from_numpy(random_vectors(sizes.images * sizes.patches, 3, patch_size, patch_size))
    return patches.to(DEVICE).contiguous(memory_format=torch.channels_last)


def _loader(sizes: Sizes, num_images: int, num_patches: int) -> baseline.DataLoader:
    dataset = baseline.PatchDataset(random_images(num_images), random_labels(num_images), num_patches, sizes.patch_size)
    workers = usable_cores()
    return baseline.loader(dataset, max(1, min(50, num_images // (2 * workers))), workers, train=False)


def augmentation(sizes: Sizes) -> Work:
    """Augmented patches of images, by one worker per core."""
    loader = _loader(sizes, sizes.augmented_images, sizes.patches)
    return lambda: sum(len(patches) for patches, _ in loader)


def loss_and_gradient(sizes: Sizes, num_images: int) -> Work:
    """Loss and gradient of ready projections of dimension 1024."""
    z = torch.from_numpy(random_vectors(sizes.patches, num_images, 1024)).to(DEVICE)
    z = torch.nn.functional.normalize(z, dim=-1).requires_grad_()
    return _until_done(lambda: torch.autograd.grad(baseline.emp_ssl_loss(z), z))


def lars_update(sizes: Sizes) -> Work:
    """The optimizer's update of the full model, from gradients to new parameters."""
    model = _model()
    optimizer, _ = baseline.make_optimizer(model, 500)
    # LARS scales gradients in place. Gradients this small get the ratio 1, so repeated updates do not shrink them.
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 1e-3
    return _until_done(optimizer.step)


def forward(sizes: Sizes) -> Work:
    """Embeddings and projections of ready patches, with BatchNorm's running statistics."""
    model, patches = _model().eval(), _patches(sizes, sizes.patch_size)

    @torch.no_grad()
    def work() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            model(patches)

    return _until_done(work)


def train_step(sizes: Sizes, patch_size: int, mixed: bool = False) -> Work:
    """A train step from ready patches of 32x32 to new parameters, whatever `patch_size` ours has.

    It is in bfloat16 on GPU or if `mixed`.
    """
    del patch_size
    model, patches = _model().train(), _patches(sizes, sizes.patch_size)
    optimizer, scheduler = baseline.make_optimizer(model, 500)
    return _until_done(lambda: baseline.train_step(model, optimizer, scheduler, patches, sizes.patches, mixed=mixed))


def helped_train_step(sizes: Sizes) -> Work:
    """The same with what is easily added: torch.compile, and determinants of B x B matrices of all patches at once."""
    model, patches = _model().train(), _patches(sizes, sizes.patch_size)
    optimizer, scheduler = baseline.make_optimizer(model, 500)
    compiled, rate = torch.compile(model), baseline.helped_coding_rate
    return _until_done(lambda: baseline.train_step(compiled, optimizer, scheduler, patches, sizes.patches, rate))


def embedding(sizes: Sizes) -> Work:
    """Bag-of-features embeddings of images, with patches from one worker per core."""
    model, loader = _model(), _loader(sizes, sizes.embedded_images, sizes.embedded_patches)
    return _until_done(lambda: baseline.embed(model, loader, DEVICE))


def knn_scores(sizes: Sizes) -> Work:
    """Weighted votes of 20 neighbours."""
    queries, bank = (torch.from_numpy(random_vectors(n, sizes.dim, seed=n)) for n in (sizes.queries, sizes.bank))
    queries, bank = queries.to(DEVICE), bank.to(DEVICE)
    labels = torch.from_numpy(random_labels(sizes.bank)).to(DEVICE)
    return _until_done(lambda: baseline.knn_scores(queries, bank, labels, 10, 20, 0.07))


def faiss_search(sizes: Sizes) -> Work:
    """The 20 neighbours without the vote, by faiss on the CPU: builds a flat index and searches it."""
    import faiss

    queries, bank = (random_vectors(n, sizes.dim, seed=n) for n in (sizes.queries, sizes.bank))

    def work() -> None:
        index = faiss.IndexFlatIP(sizes.dim)
        index.add(bank)
        index.search(queries, 20)

    return work


def linear_probe(sizes: Sizes) -> Work:
    """Training and testing a linear classifier on the same embeddings."""
    vectors = torch.from_numpy(random_vectors(sizes.linear_images, sizes.dim)).to(DEVICE)
    labels = torch.from_numpy(random_labels(sizes.linear_images)).to(DEVICE)
    split = (vectors, labels)
    return _until_done(lambda: baseline.linear_probe(split, split, 10, sizes.linear_epochs))


def end_to_end(config: Config) -> dict[str, float]:
    """Trains, embeds the images and measures kNN and the linear classifier; returns both accuracies from 0 to 1."""
    from empssl_jax.data.datasets import SPLITS, load_datasets  # here: the baseline's start-up does not import JAX

    workers = usable_cores()
    model = baseline.Encoder(config.model.width, config.model.hidden_dim, config.model.projection_dim)
    model = model.to(DEVICE, memory_format=torch.channels_last)
    datasets = load_datasets(config)

    def loader(split: str, num_patches: int, batch_size: int, train: bool) -> baseline.DataLoader:
        images, labels = getattr(datasets, split)[:2]
        dataset = baseline.PatchDataset(images, labels, num_patches, config.patches.patch_size)
        return baseline.loader(dataset, batch_size, workers, train)

    patches = config.patches.train_patches
    batches = loader("train", patches, config.training.batch_size, True)
    for step, loss in enumerate(baseline.train(model, batches, config.training.max_epochs, patches, DEVICE)):
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.2f}", flush=True)
    options = config.evaluation
    train, test = (baseline.embed(model, loader(split, options.valid_patches, 50, False), DEVICE) for split in SPLITS)
    scores = baseline.knn_scores(test[0], train[0], train[1], 10, options.num_neighbours, options.temperature)
    knn = (scores.argmax(dim=1) == test[1]).float().mean().item()
    return {"kNN": knn, "linear": baseline.linear_probe(train, test, 10, options.linear_epochs)}
