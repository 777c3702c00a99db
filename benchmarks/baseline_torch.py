"""EMP-SSL in plain, idiomatic PyTorch: the baseline that `benchmarks.compare` measures against.

Written from the paper (arXiv 2304.03977): torchvision's ResNet-18, its transforms on PIL images in DataLoader workers,
`torch.logdet` of the D x D matrix, SGD wrapped in LARS, channels-last memory format, and autocast to bfloat16 on GPU.
Tested against the same golden numbers as the package. Needs the extra `bench`.
"""

import random
from collections.abc import Callable, Iterator

import numpy as np
import PIL.Image
import PIL.ImageFilter
import PIL.ImageOps
import torch
import torch.nn.functional as F  # noqa: N812 - as PyTorch users call it
import torchvision
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

CodingRate = Callable[[Tensor, float], Tensor]  # of (P, B, D) unit vectors, and eps


class GaussianBlur:
    """Blurs an image with probability 0.1, with a radius of 0.1 to 2 pixels."""

    def __call__(self, image: PIL.Image.Image) -> PIL.Image.Image:
        if random.random() >= 0.1:
            return image
        return image.filter(PIL.ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


class Solarize:
    """Inverts the bright pixels of an image with probability 0.1."""

    def __call__(self, image: PIL.Image.Image) -> PIL.Image.Image:
        return PIL.ImageOps.solarize(image) if random.random() < 0.1 else image


def patch_transform(patch_area: float = 0.25, patch_size: int = 32) -> transforms.Compose:
    """The transform from a PIL image to one augmented patch, a tensor with values in [-1, 1]."""
    area = (patch_area, patch_area)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(patch_size, scale=area, ratio=(1.0, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.2)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            GaussianBlur(),
            Solarize(),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )


class PatchDataset(Dataset):
    """Each item is an image's patches (P, 3, size, size) and its label."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, num_patches: int, patch_size: int = 32) -> None:
        self.images, self.labels, self.num_patches = images, labels, num_patches
        self.transform = patch_transform(patch_size=patch_size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = PIL.Image.fromarray(self.images[index])
        return torch.stack([self.transform(image) for _ in range(self.num_patches)]), int(self.labels[index])


def loader(dataset: Dataset, batch_size: int, workers: int, train: bool) -> DataLoader:
    """Batches from worker processes. Training shuffles, and drops an incomplete last batch."""
    torch.multiprocessing.set_sharing_strategy("file_system")
    return DataLoader(
        dataset,
        batch_size,
        shuffle=train,
        drop_last=train,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # The process that measures both sides also runs JAX, whose threads do not survive a fork.
        multiprocessing_context="forkserver" if workers else None,
        persistent_workers=workers > 0,
    )


class Encoder(nn.Module):
    """ResNet-18 for small images, the hidden layer, whose output is the embedding, and the projector."""

    def __init__(self, width: int = 64, hidden_dim: int = 4096, projection_dim: int = 1024) -> None:
        super().__init__()
        resnet = torchvision.models.resnet18()
        if width != 64:
            raise ValueError("torchvision's ResNet-18 has width 64 only")
        resnet.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        layers = [resnet.conv1, resnet.bn1, resnet.relu, resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4]
        hidden = nn.Sequential(
            nn.Flatten(), nn.Linear(8 * width, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.ReLU()
        )
        self.backbone = nn.Sequential(*layers, resnet.avgpool, hidden)
        self.projector = nn.Sequential(
            nn.Linear(hidden_dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, projection_dim),
        )

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings and unit-length projections of (N, 3, H, W) patches."""
        embeddings = self.backbone(patches)
        return embeddings, F.normalize(self.projector(embeddings))


def coding_rate(projections: Tensor, eps: float = 0.2) -> Tensor:
    """Coding rate of (P, B, D) unit vectors, averaged over the P patches."""
    _, num_images, dim = projections.shape
    identity = torch.eye(dim, device=projections.device)
    rates = [torch.logdet(identity + dim / (num_images * eps) * z.T @ z) / 2 for z in projections]
    return torch.stack(rates).mean()


def helped_coding_rate(projections: Tensor, eps: float = 0.2) -> Tensor:
    """The same from the B x B matrices of all patches at once: det(I + a Z^T Z) = det(I + a Z Z^T)."""
    _, num_images, dim = projections.shape
    identity = torch.eye(num_images, device=projections.device)
    return torch.logdet(identity + dim / (num_images * eps) * projections @ projections.mT).mean() / 2


def similarity(projections: Tensor) -> Tensor:
    """Mean cosine similarity of (P, B, D) projections to the mean projection of their image."""
    mean = projections.mean(dim=0, keepdim=True)
    return F.cosine_similarity(projections, mean, dim=-1).mean()


def emp_ssl_loss(
    projections: Tensor, invariance_coefficient: float = 200.0, eps: float = 0.2, rate: CodingRate = coding_rate
) -> Tensor:
    """The EMP-SSL loss of (P, B, D) unit vectors."""
    return -rate(projections, eps) - invariance_coefficient * similarity(projections)


class LARS:
    """Wraps SGD: scales the gradients of kernels by a trust ratio, clipped at the learning rate, before each step."""

    def __init__(self, optimizer: torch.optim.Optimizer, weight_decay: float, trust_coefficient: float = 0.005) -> None:
        self.optimizer, self.weight_decay, self.trust_coefficient = optimizer, weight_decay, trust_coefficient

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.ndim > 1:
                    self._adapt(parameter, group["lr"])
        self.optimizer.step()

    def _adapt(self, parameter: Tensor, learning_rate: float) -> None:
        weight_norm, gradient_norm = torch.norm(parameter), torch.norm(parameter.grad)
        if weight_norm == 0 or gradient_norm == 0:
            return
        ratio = self.trust_coefficient * weight_norm / (gradient_norm + weight_norm * self.weight_decay + 1e-8)
        ratio = min(ratio / learning_rate, 1)
        parameter.grad.add_(parameter, alpha=self.weight_decay).mul_(ratio)


def make_optimizer(model: nn.Module, steps: int, learning_rate: float = 0.3) -> tuple[LARS, LRScheduler]:
    """LARS around SGD with Nesterov momentum, and a schedule: half a cosine over all steps."""
    sgd = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, nesterov=True)
    return LARS(sgd, weight_decay=1e-4), CosineAnnealingLR(sgd, T_max=steps)


def to_device(patches: Tensor, device: torch.device) -> Tensor:
    """Moves patches (B, P, 3, H, W) to the device as (P B, 3, H, W), ordered by patch, in channels-last layout."""
    patches = patches.to(device, non_blocking=True).transpose(0, 1).flatten(0, 1)
    return patches.contiguous(memory_format=torch.channels_last)


def train_step(
    model: nn.Module,
    optimizer: LARS,
    scheduler: LRScheduler,
    patches: Tensor,
    num_patches: int,
    rate: CodingRate = coding_rate,
    mixed: bool = False,
) -> Tensor:
    """One update on (P B, 3, H, W) patches, in bfloat16 on GPU or if `mixed`; returns the loss on the device."""
    with torch.autocast(patches.device.type, torch.bfloat16, enabled=mixed or patches.is_cuda):
        _, projections = model(patches)
    loss = emp_ssl_loss(projections.float().unflatten(0, (num_patches, -1)), rate=rate)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    return loss.detach()


def train(
    model: nn.Module, batches: DataLoader, epochs: int, num_patches: int, device: torch.device
) -> Iterator[float]:
    """Trains and yields the loss of each step."""
    optimizer, scheduler = make_optimizer(model, epochs * len(batches))
    model.train()
    for _ in range(epochs):
        for patches, _ in batches:
            yield train_step(model, optimizer, scheduler, to_device(patches, device), num_patches).item()


@torch.no_grad()
def embed(model: nn.Module, batches: DataLoader, device: torch.device) -> tuple[Tensor, Tensor]:
    """Embeddings (N, E), each the mean over an image's patches, and labels (N,)."""
    model.eval()
    embeddings, labels = [], []
    for patches, batch_labels in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = model.backbone(to_device(patches, device))
        embeddings.append(features.float().unflatten(0, (patches.shape[1], -1)).mean(dim=0))
        labels.append(batch_labels)
    return torch.cat(embeddings), torch.cat(labels).to(device)


def knn_scores(queries: Tensor, bank: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    """Weighted votes (Q, classes) of the k nearest bank vectors by cosine similarity, 256 queries at a time."""
    bank = F.normalize(bank).T.contiguous()
    scores = []
    for chunk in F.normalize(queries).split(256):
        similarities, indices = (chunk @ bank).topk(k)
        votes = F.one_hot(labels[indices], num_classes) * (similarities / temperature).exp().unsqueeze(-1)
        scores.append(votes.sum(dim=1))
    return torch.cat(scores)


def linear_probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int, epochs: int) -> float:
    """Test accuracy of a linear classifier after its last epoch: SGD on batches of 100 from a DataLoader."""
    device = train[0].device
    classifier = nn.Linear(train[0].shape[1], num_classes).to(device)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-5)
    scheduler = CosineAnnealingLR(optimizer, T_max=epochs)
    batches = DataLoader(torch.utils.data.TensorDataset(*train), batch_size=100, shuffle=True)
    accuracy = 0.0
    for _ in range(epochs):
        for embeddings, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(classifier(embeddings), labels).backward()
            optimizer.step()
        scheduler.step()
        with torch.no_grad():
            accuracy = (classifier(test[0]).argmax(dim=1) == test[1]).float().mean().item()
    return accuracy
