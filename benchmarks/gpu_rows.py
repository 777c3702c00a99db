"""The rows of benchmarks/gpu.py: each function measures one thing and returns its values."""

import dataclasses
import functools
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from benchmarks import limits, measure, ours, profile_table, sizes
from benchmarks.budget import Values
from benchmarks.sizes import Sizes, Work
from benchmarks.train_step import ready_step
from empssl_jax import training
from empssl_jax.config import Config, EvaluationConfig
from empssl_jax.config.config_files import read_config_file
from empssl_jax.data.datasets import Datasets, load_datasets
from empssl_jax.run_folder.step_files import TIMING_FILE, read_steps
from experiments import study
from experiments.records import accuracies, checkpoint_embeddings, read_lines

BEST: study.Changes = {
    "patch_size": study.RECIPE.patches.patch_size,
    "max_epochs": study.RECIPE.training.max_epochs,
}
# For a better encoder of the size that comes with the package; experiments/pretrained.py writes it.
SMALL = read_config_file("cifar10_cpu")
PACKAGED: study.Changes = dataclasses.asdict(SMALL.model) | {"schedule": SMALL.training.schedule}
# Options of the default recipe, one epoch on CIFAR-10, that each training changes.
RUNS: dict[str, study.Changes] = {
    "default": {},
    "float32": {"precision": "float32"},
    "half_batch": {"batch_size": 0.5},
    "seed_2": {"seed": 2},
    "seed_3": {"seed": 3},
    "ten_epochs": {"max_epochs": 10},
    "thirty_epochs": {"max_epochs": 30},
    "best": BEST,
    "best_seed_2": BEST | {"seed": 2},
    "best_seed_3": BEST | {"seed": 3},
    "best_linear_schedule": BEST | {"schedule": "linear"},
    "best_twenty_epochs_linear_schedule": BEST | {"max_epochs": 20, "schedule": "linear"},
    "best_twenty_epochs": BEST | {"max_epochs": 20},
    "best_twenty_epochs_seed_2": BEST | {"max_epochs": 20, "seed": 2},
    "best_twenty_epochs_seed_3": BEST | {"max_epochs": 20, "seed": 3},
    "best_forty_epochs": BEST | {"max_epochs": 40},
    "best_forty_epochs_seed_2": BEST | {"max_epochs": 40, "seed": 2},
    "best_forty_epochs_seed_3": BEST | {"max_epochs": 40, "seed": 3},
    "best_100_epochs": BEST | {"max_epochs": 100},
    "pretrained_100_epochs": BEST | PACKAGED | {"max_epochs": 100},
}
GOLDEN_TESTS = ("losses", "lars", "encoder", "knn", "augmentations", "crops")
GOLDEN_SECONDS = 100.0
STUDY_RUN_SECONDS = 45.0
# XLA's flags that may shorten the compilation of the train step.
FLAGS = {
    "triton off": "--xla_gpu_enable_triton_gemm=false",
    "autotuning without checks": "--xla_gpu_autotune_level=1",
    "autotuning off": "--xla_gpu_autotune_level=0",
}
TINY: study.Changes = {"images_per_class": 10, "test_images_per_class": 5, "batch_size": 20, "train_patches": 4}
TINY_EVALUATION: study.Changes = {"num_neighbours": 5, "valid_patches": 2, "linear_epochs": 2}


@dataclass(frozen=True)
class Visit:
    """What the rows share: the folder, the sizes and the time that is left."""

    results: Path
    tiny: bool
    end: float  # of the rows, on the clock of `time.monotonic`

    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    @property
    def patience(self) -> float:
        """Factor of all time limits: compilation takes longer on a CPU."""
        return 10.0 if self.tiny else 1.0

    @property
    def sizes(self) -> Sizes:
        """Sizes of the benchmarks' work."""
        return sizes.TINY if self.tiny else sizes.ACCELERATOR

    @property
    def recipe(self) -> Config:
        """The default recipe with seed 1, as published."""
        changes: study.Changes = {"seed": 1, "report": False, "untrained": False}
        if self.tiny:
            return study.changed(read_config_file("digits"), changes | TINY | TINY_EVALUATION)
        return study.changed(read_config_file("cifar10"), changes)

    def evaluation(self, name: str) -> EvaluationConfig:
        """How to embed and measure: as published ("random"), as recommended, or so without the whole image ("grid")."""
        if name == "random":
            return self.recipe.evaluation
        best = study.RECIPE.evaluation
        changes = TINY_EVALUATION | {"valid_patches": best.valid_patches} if self.tiny else {}
        changes |= {"valid_crops": "grid"} if name == "grid" else {}
        return dataclasses.replace(best, **changes)

    @functools.cache  # noqa: B019 - one visit per process
    def datasets(self) -> Datasets:
        """The images of the recipe."""
        return load_datasets(self.recipe)

    @functools.cache  # noqa: B019
    def trained(self, name: str) -> Path:
        """Trains one of RUNS, once in this process; returns its folder."""
        workdir = self.results / "runs" / name
        shutil.rmtree(workdir, ignore_errors=True)  # an interrupted run would resume, and its seconds be too few
        changes = RUNS[name] | {"workdir": str(workdir), "valid_patches": 0} | ({"max_epochs": 1} if self.tiny else {})
        training.train(study.changed(self.recipe, changes))
        return workdir


def train_step(visit: Visit, patch_size: int) -> Values:
    """Speed of the train step of the default recipe with patches of this size, and the seconds to its first step."""
    size, cached = visit.sizes, len(list((visit.results / "compilation_cache").glob("*")))
    config, start = ours.make_config(size, patch_size), time.perf_counter()
    step, (hyperparameters, state, batch) = ready_step(config)
    state, _ = jax.block_until_ready(step(hyperparameters, state, batch))
    first, seconds = time.perf_counter() - start, []
    for _ in range(size.repeats):  # blocks of steps, as training waits for a step only when it has started the next
        start = time.perf_counter()
        for _ in range(5):
            state, _ = step(hyperparameters, state, batch)
        jax.block_until_ready(state)
        seconds.append((time.perf_counter() - start) / 5)
    patches_per_second = size.images * size.patches / statistics.median(seconds)
    rate = limits.matmul_flops(config.model.precision)
    flops = limits.flops_per_patch(config.model, patch_size)
    return {
        "run_seconds": seconds,
        "patches_per_second": patches_per_second,
        "matmul_flops_per_second": rate,
        "fraction_of_matmul": flops * patches_per_second / rate,
        "first_step_seconds": first,
        "programs_cached_before": cached,
    }


def profile(visit: Visit, patch_size: int) -> Values:
    """Milliseconds and number of kernels of each kind in six train steps; empty without a GPU."""
    work, folder, steps = ours.train_step(visit.sizes, patch_size), visit.results / f"profile_{patch_size}", 6
    work()
    with jax.profiler.trace(str(folder)):
        for _ in range(steps):
            work()
    kinds = profile_table.kinds(profile_table.read_profile(folder), steps)
    return {"kernels": {name: kind._asdict() for name, kind in kinds.items()}}


def accuracy(visit: Visit, name: str, embedding: str = "recommended") -> Values:
    """Accuracies in percent of one of RUNS, which is trained if necessary, and the seconds of each part."""
    workdir, evaluation = visit.trained(name), visit.evaluation(embedding)
    steps, start = read_steps(workdir / TIMING_FILE), time.perf_counter()
    embeddings = checkpoint_embeddings(workdir, evaluation, visit.datasets())
    embedded = time.perf_counter()
    return {
        **accuracies(embeddings, evaluation, visit.recipe.training.seed),
        "training_seconds": steps[-1]["seconds"],
        "first_step_seconds": steps[0]["seconds"],
        "embedding_seconds": embedded - start,
        "measuring_seconds": time.perf_counter() - embedded,
    }


def other_numbers(visit: Visit) -> Values:
    """Seconds to the first step of trainings of one step in this process: the second and third change only numbers."""
    one_step: study.Changes = {"images_per_class": visit.recipe.training.batch_size // 10, "valid_patches": 0}
    others: dict[str, study.Changes] = {"same": {}, "seed": {"seed": 7}, "learning_rate": {"learning_rate": 0.2}}
    seconds = {}
    for name, changes in others.items():
        with tempfile.TemporaryDirectory() as workdir:
            training.train(study.changed(visit.recipe, one_step | changes | {"workdir": workdir}))
            seconds[f"{name}_seconds"] = read_steps(Path(workdir) / TIMING_FILE)[0]["seconds"]
    return seconds


def flags(visit: Visit) -> Values:
    """The row `train_step` with each of FLAGS, in a process of its own that finds nothing compiled."""
    found = {}
    for name, flag in FLAGS.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.gpu", folder, "--rows", "train_step"]
            command += ["--budget", str(visit.left()), *["--tiny"] * visit.tiny]
            subprocess.run(command, env=_with_xla_flag(flag), check=True)
            (line,) = read_lines(Path(folder) / ("tiny" if visit.tiny else "") / "gpu.jsonl")
        found[name] = {"first_step_seconds": line["first_step_seconds"], "run_seconds": line["run_seconds"]}
    return {"flags": found}


def _with_xla_flag(flag: str) -> dict[str, str]:
    """The environment of a process that has one more flag of XLA."""
    return os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}"}


def embedding_rates(visit: Visit) -> Values:
    """Patches per second of embeddings of 250, 1,000 and 2,500 images at a time."""
    images = 40 if visit.tiny else 5000
    size, rates = dataclasses.replace(visit.sizes, embedded_images=images), {}
    for batch_size in (images // 20, images // 5, images // 2):
        seconds, _ = measure.compare(ours.embedding(size, batch_size), None, size.long_repeats)
        rates[str(batch_size)] = images * size.embedded_patches / statistics.median(seconds)
    return {"patches_per_second": rates}


def speed(visit: Visit, make_work: Callable[[Sizes], Work]) -> Values:
    """Seconds of several runs of a benchmark, after one that is not measured."""
    return {"run_seconds": measure.compare(make_work(visit.sizes), None, visit.sizes.repeats)[0]}


def helped_train_step(size: Sizes) -> Work:
    """The baseline's train step with what is easily added to it. Imports torch here, not in the process of our rows."""
    from benchmarks import theirs

    return theirs.helped_train_step(size)


def their_end_to_end(visit: Visit) -> Values:
    """Accuracies in percent of the default recipe, trained and measured by the baseline."""
    from benchmarks import theirs

    config = study.changed(visit.recipe, {"width": 64})  # the only width of torchvision's ResNet-18
    return {name: 100 * value for name, value in theirs.end_to_end(config).items()}


def golden_tests(visit: Visit) -> Values:
    """Numbers of golden tests that pass and fail on the device, in float32. By default XLA and cuDNN use TF32.

    Without autotuning, since the tests compile many small programs and are not about speed.
    """
    files = [f"tests/test_{name}.py" for name in GOLDEN_TESTS]
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", "-k", "golden", *files]
    variables = _with_xla_flag(FLAGS["autotuning off"]) | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    limit, root = min(GOLDEN_SECONDS * visit.patience, visit.left()), Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, timeout=limit)
    print(done.stdout[-2000:])
    counts = {word: re.search(rf"(\d+) {word}", done.stdout) for word in ("passed", "failed", "skipped")}
    if counts["passed"] is None and counts["failed"] is None:
        raise RuntimeError(f"no golden test ran: {(done.stdout + done.stderr)[-300:]}")
    return {word: int(count[1]) if count else 0 for word, count in counts.items()}


def recipe_study(visit: Visit, reserve: float) -> Values | None:
    """Rows of experiments/study.py, as many as the time allows; the number of its runs once all are done."""
    output, budget = visit.results / "study.jsonl", visit.left() - reserve - STUDY_RUN_SECONDS
    best, tiny = study.Options(size="best"), study.Options(size="tiny", rows=("base",), seeds=(1,))
    folder = str(visit.results / "runs" / "study")
    options = dataclasses.replace(tiny if visit.tiny else best, budget=budget, folder=folder, output=str(output))
    study.main(options)
    runs = len(options.rows or study.TRAINING | study.EVALUATION) * len(options.seeds)
    return {"runs": runs} if len(read_lines(output)) >= runs else None
