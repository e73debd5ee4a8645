"""Runs what is missing: one job for each result, several jobs at a time, resumable between jobs.

Trained networks that several jobs start from are kept in `runs/accuracy/`, and trained again
where they are missing.
"""

import contextlib
import copy
import fcntl
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import dspfx
from benchmarks.accuracy import results
from benchmarks.accuracy.methods import METHODS, STARTS, TIMED, UNTRAINED
from benchmarks.accuracy.protocol import Data, accuracy, fashion_mnist, generator, train
from benchmarks.accuracy.scenarios import SCENARIOS, Scenario
from benchmarks.accuracy.setting import Run, dense_macs, macs_of
from benchmarks.accuracy.shapes import shape_of

CACHE = Path("runs") / "accuracy"
DENSE, LONGER = "dense", "dense, longer"


@dataclass(frozen=True)
class Job:
    """One result to be had."""

    scenario: str
    method: str
    seed: int
    pruned: int

    @property
    def key(self) -> tuple[str, str, int, int]:
        """As of its result."""
        return self.scenario, self.method, self.seed, self.pruned


def run_missing(jobs: list[Job], workers: int) -> None:
    """Run those of `jobs` that have no result yet, in order, each on one thread."""
    done = results.read()
    missing = [job for job in jobs if job.key not in done]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(_run, job) for job in missing]
        for future in tqdm(as_completed(futures), total=len(missing)):
            result = future.result()
            tqdm.write(
                f"{result.scenario}, seed {result.seed}, {result.pruned} %: {result.method}: "
                f"{result.accuracy:.2f}"
            )


def _run(job: Job) -> results.Result:
    torch.set_num_threads(1)
    scenario = SCENARIOS[job.scenario]
    data = fashion_mnist(scenario.images)
    rng = generator(*job.key)
    if job.method in (DENSE, LONGER):
        model = dense_network(scenario, data, job.seed, longer=job.method == LONGER)
        untuned = 0.0
    else:
        model, untuned = _pruned(job, scenario, data, rng)
    macs, _ = dense_macs(dense_network(scenario, data, job.seed))
    result = results.Result(
        *job.key,
        accuracy=accuracy(model, data),
        untuned=untuned,
        macs=macs_of(model),
        dense_macs=macs,
        parameters=_parameters(model),
        shape=shape_of(model),
        made=results.made_by(
            f"python -m benchmarks.accuracy run --scenario {job.scenario}"
            + " --untrained" * (job.method in UNTRAINED)
            + " --timed" * (job.method in TIMED)
        ),
    )
    results.append(result)
    return result


def network(job: Job) -> nn.Module:
    """The network that the result of `job` is of, on the CPU and in evaluation mode."""
    scenario = SCENARIOS[job.scenario]
    data = fashion_mnist(scenario.images)
    if job.method in (DENSE, LONGER):
        return dense_network(scenario, data, job.seed, longer=job.method == LONGER).eval()
    model, _ = _pruned(job, scenario, data, generator(*job.key))
    return model.eval()


def _pruned(
    job: Job, scenario: Scenario, data: Data, rng: torch.Generator
) -> tuple[nn.Module, float]:
    """The pruned and fine-tuned network, and its accuracy before fine-tuning."""
    method = METHODS[job.method]
    dense = dense_network(scenario, data, job.seed)
    start = _kept(
        f"{job.scenario}-{job.seed}-{method.start}.pt",
        lambda: STARTS[method.start].make(
            Run(scenario, data, dense, generator(job.scenario, method.start, job.seed))
        ),
    )
    whole, gated = dense_macs(dense)
    macs = whole - gated * job.pruned // 100
    run = Run(scenario, data, dense, rng)
    model = method.prune(start, macs, run)
    untuned = accuracy(model, data)
    method.tune(model, run)
    if job.method not in TIMED and macs_of(model) > macs:
        raise AssertionError(f"{job}: {macs_of(model)} MACs are left, {macs} were allowed")
    return model, untuned


def dense_network(scenario: Scenario, data: Data, seed: int, longer: bool = False) -> nn.Module:
    """The trained network that pruning starts from; from the cache, if it is there."""

    def make() -> nn.Module:
        torch.manual_seed(seed)
        model = scenario.build()
        schedule = scenario.longer if longer else scenario.dense
        train(model, data, schedule, generator(scenario.name, DENSE, seed))
        return model

    return _kept(f"{scenario.name}-{seed}-{'longer' if longer else 'dense'}.pt", make)


def _kept(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """A trained network from the cache; whoever comes first makes it, others wait."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / name
    with _lock(path.with_suffix(".lock")):
        if not path.is_file():
            made, temporary = make().eval(), path.with_suffix(".tmp")
            torch.save(made, temporary)
            temporary.replace(path)
    loaded: nn.Module = torch.load(path, weights_only=False)  # our own file
    return copy.deepcopy(loaded)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _parameters(model: nn.Module) -> int:
    if isinstance(model, dspfx.PreparedModule):
        return dspfx.report(model).after.parameters
    return sum(p.numel() for p in model.parameters())
