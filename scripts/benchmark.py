"""Measures speed and memory: metacv beside a plain loop, `higher` and `torchopt`, and beside the machine's limits.

    python scripts/benchmark.py                      everything (first: pip install -e '.[bench]')
    python scripts/benchmark.py fomaml --repeats 9   the rows whose names contain a word, or one of the other parts:
                                                     evaluation, sampling, settings, processes, memory, start
    python scripts/benchmark.py --device cuda

The other implementations run the networks as they are usually written: ReLU before the pooling, torch's own batch norm
and memory layout. A plain loop on metacv's networks shows how much of the difference comes from the networks. Freed
memory is kept for all of them alike.

Before a row is timed, the gradients of all implementations are compared in float64. Then they take turns, so that noise
of the machine affects all of them; the table shows medians. Writes benchmark.json and benchmark.md.
"""

import argparse
import copy
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.func import functional_call
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import Omniglot
from torchvision.transforms import Compose, Resize, ToTensor
from torchvision.transforms.functional import to_pil_image

from metacv.algorithms.base import Algorithm, accuracies
from metacv.algorithms.gradient.inner_loop import Classifier, InnerLoop
from metacv.algorithms.gradient.maml import MAML
from metacv.algorithms.gradient.reptile import BETA2, EPSILON, Reptile, _batches
from metacv.algorithms.metric.protonet import ProtoNet
from metacv.algorithms.metric.relationnet import RelationNet
from metacv.backbones.conv4 import Conv4
from metacv.data.bank import ImageBank
from metacv.data.sampler import EpisodeList, EpisodeSampler
from metacv.data.task import TaskBatch
from metacv.episodes import evaluate_episodes
from metacv.errors import UserError
from metacv.model import describe_device, pick_device
from metacv.precision import keep_freed_memory, precision

ROOT = Path(__file__).resolve().parent.parent
OMNIGLOT, MINIIMAGENET = (1, 28, 28), (3, 84, 84)
OWN_NETWORK = "plain loop, metacv's network"
PAPERS = "MAML, 1 inner steps, network and 32 tasks of the paper, Omniglot"
Step = Callable[[TaskBatch], object]  # adds the outer gradient to .grad
# Kinds of torch's operations, by a word in their names.
KINDS = {
    "conv": "convolutions",
    "batch_norm": "batch norm",
    "pool": "pooling, ReLU",
    "relu": "pooling, ReLU",
    "clamp_min": "pooling, ReLU",
    "threshold": "pooling, ReLU",
}


@dataclass
class Row:
    """One outer step, and its implementations: metacv, "plain loop" and others. OWN_NETWORK is added to them."""

    name: str
    build: Callable[[], Algorithm]
    shape: tuple[int, int, int]
    way: int
    shot: int
    query: int
    tasks: int
    implementations: Mapping[str, Callable[[Any], Step]]  # from the algorithm that `build` returns
    tolerance: float = 1e-10  # relative, of gradients in float64

    def __post_init__(self) -> None:
        self.implementations = {**self.implementations, OWN_NETWORK: self.implementations["plain loop"]}

    def algorithm(self, implementation: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Algorithm:
        """The algorithm in training mode, with the same weights for every implementation."""
        torch.manual_seed(0)
        algorithm = self.build()
        if implementation not in ("metacv", OWN_NETWORK):
            as_usually_written(algorithm)
        return algorithm.to(device, dtype).train()

    def sampler(self, device: torch.device) -> EpisodeSampler:
        return EpisodeSampler(noise(self.shape), self.way, self.shot, self.query, device=device)


class Network(nn.Module):
    """What an algorithm needs of a backbone. `higher` cannot patch a Backbone, which is an abstract base class."""

    def __init__(self, out_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.out_shape, self.features_dim = out_shape, math.prod(out_shape)

    def features(self, images: Tensor) -> Tensor:
        return self(images).flatten(1)


class Features(Network):
    """Images that are features already, so that only the head adapts, as in ANIL."""

    def forward(self, images: Tensor) -> Tensor:
        return images


class Usual(Network):
    """A Conv4 as it is usually written. With the same weights it computes the same function."""

    def __init__(self, conv4: Conv4) -> None:
        super().__init__(conv4.out_shape)
        self.blocks = nn.Sequential(*map(usual_block, conv4.blocks)).to(memory_format=torch.contiguous_format)

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(images)


def usual_block(block: nn.Module) -> nn.Module:
    if not isinstance(block, nn.Sequential):
        return block
    conv, own_norm, *rest = block
    norm = nn.BatchNorm2d(own_norm.num_features, track_running_stats=own_norm.track_running_stats).to(own_norm.weight)
    for name, p in own_norm.named_parameters():
        norm.get_parameter(name).requires_grad_(p.requires_grad).data.copy_(p)
    return nn.Sequential(conv, norm, nn.ReLU(), *(part for part in rest if isinstance(part, nn.MaxPool2d)))


def as_usually_written(algorithm: Algorithm) -> None:
    holder = getattr(algorithm, "net", algorithm)
    if isinstance(holder.backbone, Conv4):
        holder.backbone = Usual(holder.backbone)
    if isinstance(algorithm, RelationNet):
        algorithm.relation.blocks = nn.Sequential(*map(usual_block, algorithm.relation.blocks))


@cache
def noise(shape: tuple[int, int, int], classes: int = 80, images: int = 40) -> ImageBank:
    pixels = torch.randint(
        0, 256, (classes * images, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    offsets = torch.arange(0, classes * images + 1, images)
    return ImageBank("noise", pixels, offsets, tuple(map(str, range(classes))))


def each_task(tasks: TaskBatch) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    return zip(tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y, strict=True)


def metacv(algorithm: Algorithm) -> Step:
    return algorithm.training_step


def plain_loop(algorithm: MAML) -> Step:
    """MAML as it is usually written: task by task, with functional_call and autograd.grad."""

    def step(tasks: TaskBatch) -> None:
        for support_x, support_y, query_x, query_y in each_task(tasks):
            params = dict(algorithm.net.named_parameters())
            for _ in range(algorithm.inner_steps):
                loss = F.cross_entropy(functional_call(algorithm.net, params, (support_x,)), support_y)
                grads = torch.autograd.grad(loss, list(params.values()), create_graph=not algorithm.first_order)
                params = {
                    name: p - algorithm.inner_lr * grad for (name, p), grad in zip(params.items(), grads, strict=True)
                }
            loss = F.cross_entropy(functional_call(algorithm.net, params, (query_x,)), query_y)
            (loss / len(tasks)).backward()

    return step


def by_higher(algorithm: MAML) -> Step:
    import higher

    net: Classifier = algorithm.net
    inner = torch.optim.SGD(net.parameters(), lr=algorithm.inner_lr)

    def step(tasks: TaskBatch) -> None:
        second_order = not algorithm.first_order
        for support_x, support_y, query_x, query_y in each_task(tasks):
            with higher.innerloop_ctx(net, inner, copy_initial_weights=False, track_higher_grads=second_order) as (
                fast,
                optimizer,
            ):
                for _ in range(algorithm.inner_steps):
                    optimizer.step(F.cross_entropy(fast(support_x), support_y))
                loss = F.cross_entropy(fast(query_x), query_y) / len(tasks)
                if second_order:
                    loss.backward()
                    continue
                grads = torch.autograd.grad(loss, list(fast.parameters(time=-1)))
                for p, grad in zip(net.parameters(), grads, strict=True):
                    p.grad = grad if p.grad is None else p.grad + grad

    return step


def by_torchopt(algorithm: MAML) -> Step:
    import torchopt

    net: Classifier = algorithm.net
    inner = torchopt.MetaSGD(net, lr=algorithm.inner_lr)

    def step(tasks: TaskBatch) -> None:
        start, state = (torchopt.extract_state_dict(part, by="reference") for part in (net, inner))
        for support_x, support_y, query_x, query_y in each_task(tasks):
            for _ in range(algorithm.inner_steps):
                inner.step(F.cross_entropy(net(support_x), support_y))
            (F.cross_entropy(net(query_x), query_y) / len(tasks)).backward()
            torchopt.recover_state_dict(net, start)
            torchopt.recover_state_dict(inner, state)

    return step


def reptile_loop(algorithm: Reptile) -> Step:
    """Reptile with a copy of the network and torch's own Adam, as in most ports."""

    def step(tasks: TaskBatch) -> None:
        assert tasks.seeds is not None
        for (support_x, support_y, query_x, _), seed in zip(each_task(tasks), tasks.seeds.tolist(), strict=True):
            net = copy.deepcopy(algorithm.net)
            adam = torch.optim.Adam(net.parameters(), lr=algorithm.inner_lr, betas=(0.0, BETA2), eps=EPSILON)
            for rows in _batches(len(support_x), algorithm.inner_batch, algorithm.inner_steps, seed):
                adam.zero_grad()
                F.cross_entropy(net(support_x[rows]), support_y[rows]).backward()
                adam.step()
            with torch.no_grad():
                net(query_x)  # both compute the accuracy of the queries
                for p, adapted in zip(algorithm.net.parameters(), net.parameters(), strict=True):
                    moved = (p - adapted) / len(tasks)
                    p.grad = moved if p.grad is None else p.grad + moved

    return step


def protonet_loop(algorithm: ProtoNet) -> Step:
    """ProtoNet with torch.cdist. Support and query images of a task share their batch statistics."""

    def step(tasks: TaskBatch) -> None:
        for support_x, support_y, query_x, query_y in each_task(tasks):
            z = algorithm.backbone(torch.cat([support_x, query_x])).flatten(1)
            support, query = z[: len(support_x)], z[len(support_x) :]
            means = torch.stack([support[support_y == label].mean(0) for label in range(tasks.way)])
            (F.cross_entropy(-(torch.cdist(query, means) ** 2), query_y) / len(tasks)).backward()

    return step


def relation_loop(algorithm: RelationNet) -> Step:
    """RelationNet as in its authors' code, which concatenates every pair of maps."""

    def step(tasks: TaskBatch) -> None:
        module = algorithm.relation
        for support_x, _, query_x, query_y in each_task(tasks):
            support, query = algorithm.backbone(support_x), algorithm.backbone(query_x)
            classes = support.unflatten(0, (tasks.way, -1)).sum(1)
            pairs = torch.cat(
                [
                    classes.unsqueeze(0).expand(len(query), *classes.shape),
                    query.unsqueeze(1).expand(-1, tasks.way, *query.shape[1:]),
                ],
                dim=2,
            ).flatten(0, 1)
            maps = module.blocks(pairs)
            scores = torch.sigmoid(module.fc2(F.relu(module.fc1(maps.flatten(1))))).view(len(query), tasks.way)
            (F.mse_loss(scores, F.one_hot(query_y, tasks.way).to(scores.dtype)) / len(tasks)).backward()

    return step


def rows() -> list[Row]:
    table = []
    peers: dict[str, Callable[[Any], Step]] = {
        "metacv": metacv,
        "plain loop": plain_loop,
        "higher": by_higher,
        "torchopt": by_torchopt,
    }
    for data, shape, channels, tasks in (("Omniglot", OMNIGLOT, 64, 4), ("miniImageNet", MINIIMAGENET, 32, 2)):
        backbone = partial(Conv4, shape, channels=channels, running_stats=False)
        for first_order in (False, True):
            for inner_steps in (1, 5):
                own = {name: make for name, make in peers.items() if not (first_order and name == "torchopt")}
                name = f"{'FOMAML' if first_order else 'MAML'}, {inner_steps} inner steps, {data}"
                table.append(Row(name, partial(maml, backbone, inner_steps, first_order), shape, 5, 1, 15, tasks, own))
        own = {"metacv": metacv, "plain loop": reptile_loop}
        # Where the gradient is 0, at biases before batch norm, Adam makes small steps out of rounding errors.
        table.append(Row(f"Reptile, {data}", partial(reptile, backbone), shape, 5, 10, 1, 5, own, tolerance=1e-7))
        own = {"metacv": metacv, "plain loop": relation_loop}
        table.append(Row(f"RelationNet, {data}", partial(relationnet, shape), shape, 5, 1, 15, 1, own))
    table.append(Row(PAPERS, partial(maml, strided, 1, False), OMNIGLOT, 5, 1, 1, 32, peers))
    head = partial(maml, partial(Features, (64, 1, 1)), 5, False)
    table.append(Row("MAML, 5 inner steps, head on 64 features", head, (64, 1, 1), 5, 1, 15, 32, peers))
    own = {"metacv": metacv, "plain loop": protonet_loop}
    table.append(Row("ProtoNet, 60-way, Omniglot", lambda: ProtoNet(Conv4(OMNIGLOT)), OMNIGLOT, 60, 1, 5, 1, own))
    return table


def strided() -> Conv4:
    """The network of MAML's paper on Omniglot."""
    return Conv4(OMNIGLOT, downsample="stride", global_pool=True, running_stats=False)


def relationnet(shape: tuple[int, int, int]) -> RelationNet:
    return RelationNet(Conv4(shape, downsample=["max_pool", "max_pool", "none", "none"], padding=[0, 0, 1, 1]))


def maml(backbone: Callable[[], Any], inner_steps: int, first_order: bool, inner_lr: float = 0.1) -> MAML:
    return MAML(backbone(), 5, inner_lr, inner_steps, inner_steps, first_order, adapt_norm=True)


def reptile(backbone: Callable[[], Conv4]) -> Reptile:
    return Reptile(backbone(), 5, 1e-3, 5, 10, 50, 5, reset_moments=True)


def gradient(step: Step, algorithm: Algorithm, tasks: TaskBatch) -> Tensor:
    algorithm.zero_grad()
    step(tasks)
    return torch.cat([p.grad.flatten() for p in algorithm.parameters() if p.grad is not None])


def disagreement(row: Row, names: list[str], dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative distance of an implementation's gradient from that of the first."""
    gradients = []
    for name in names:
        algorithm = row.algorithm(name, device, dtype)
        tasks = row.sampler(device).sample(min(2, row.tasks))
        tasks = replace(tasks, support_x=tasks.support_x.to(dtype), query_x=tasks.query_x.to(dtype))
        gradients.append(gradient(row.implementations[name](algorithm), algorithm, tasks))
    own, *others = gradients
    return max((float((other - own).norm() / own.norm()) for other in others), default=0.0)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, least: float = 0.5) -> float:
    """The mean time of one call, over as many calls as take `least` seconds."""
    wait(device)
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < least:
        work()
        calls += 1
        wait(device)
    return (time.perf_counter() - start) / calls


def in_turns(works: Mapping[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """The median time of each, in seconds."""
    for work in 3 * list(works.values()):
        work()  # warm up, so that freed memory is there for the next step
    times: dict[str, list[float]] = {name: [] for name in works}
    order = list(works)
    for _ in range(repeats):
        for name in order:
            times[name].append(seconds_of(works[name], device))
        order.append(order.pop(0))
    return {name: statistics.median(own) for name, own in times.items()}


def measure(row: Row, device: torch.device, repeats: int) -> dict[str, Any]:
    installed = {}
    for name, make in row.implementations.items():
        algorithm = row.algorithm(name, device)
        try:
            installed[name] = (algorithm, make(algorithm))
        except ImportError:
            continue
    apart = disagreement(row, list(installed), torch.float64, device)
    if apart > row.tolerance:
        raise SystemExit(f"benchmark: {row.name}: gradients differ by {apart:.1e} in float64")
    tasks = row.sampler(device).sample(row.tasks)

    def work(algorithm: Algorithm, step: Step) -> None:
        algorithm.zero_grad()
        step(tasks)

    works = {name: partial(work, *made) for name, made in installed.items()}
    times = in_turns(works, device, repeats)
    return {
        "row": row.name,
        "tasks_per_second": {name: row.tasks / seconds for name, seconds in times.items()},
        "against": {name: seconds / times["metacv"] for name, seconds in times.items() if name != "metacv"},
        "gradients_differ_by": apart,
    } | what_bounds(installed["metacv"][0], works["metacv"], times["metacv"], device)


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write. Views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if "empty" not in func.__name__:
            read, written = tensors((args, kwargs)), tensors(outputs)
            seen = {t.untyped_storage().data_ptr() for t in read}
            if func._schema.is_mutable or any(t.untyped_storage().data_ptr() not in seen for t in written):
                self.bytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in read + written)
        return outputs


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def what_bounds(
    algorithm: Algorithm, work: Callable[[], object], seconds: float, device: torch.device
) -> dict[str, Any]:
    """Floating-point operations and bytes per second of work that takes `seconds`, and shares of time by kind."""
    batching = algorithm.task_batching if isinstance(algorithm, InnerLoop) else "auto"
    if isinstance(algorithm, InnerLoop):
        algorithm.task_batching = "loop"  # the counter overestimates gradients of grouped convolutions
    with FlopCounterMode(display=False) as counter:
        work()
    if isinstance(algorithm, InnerLoop):
        algorithm.task_batching = batching
    with Traffic() as traffic:
        work()
    with profile() as profiler:
        seconds_of(work, device)
    spent = dict.fromkeys([*KINDS.values(), "rest"], 0.0)
    for event in profiler.key_averages():
        kind = next((kind for word, kind in KINDS.items() if word in event.key), "rest")
        if event.device_type == DeviceType.CPU:  # operations; on a GPU with the time of their kernels
            spent[kind] += event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
    return {
        "flops_per_second": counter.get_total_flops() / seconds,
        "bytes_per_second": traffic.bytes / seconds,
        "parts_of_time": {kind: own / sum(spent.values()) for kind, own in spent.items()},
    }


def limits(device: torch.device) -> dict[str, float]:
    """What a large matrix product and a large copy reach on this machine."""
    side, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**27)
    left, right = torch.rand(side, side, device=device), torch.rand(side, side, device=device)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = in_turns({"product": lambda: left @ right, "copy": lambda: target.copy_(source)}, device, 3)
    return {"flops_per_second": 2 * side**3 / times["product"], "bytes_per_second": 2 * size / times["copy"]}


def evaluation(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Episodes per second of evaluation, beside a loop that classifies one task at a time."""
    pooled = partial(Conv4, MINIIMAGENET, channels=32, running_stats=False)
    # With a higher inner learning rate, rounding errors grow over the steps and change labels.
    settings = (
        ("MAML, 5-way 1-shot, 1 query a class, Omniglot", maml(strided, 3, True, 0.01), noise(OMNIGLOT), 1, 64),
        ("MAML, 5-way 1-shot, 1 query a class, miniImageNet", maml(pooled, 10, True, 0.01), noise(MINIIMAGENET), 1, 8),
        # Each image is used as often as in 2000 episodes of Omniglot's 423 test characters.
        (
            "ProtoNet, 5-way 1-shot, 15 queries a class, Omniglot",
            ProtoNet(Conv4(OMNIGLOT)),
            noise(OMNIGLOT, 21, 20),
            15,
            100,
        ),
    )
    table = []
    for name, algorithm, bank, query, count in settings:
        usual = copy.deepcopy(algorithm)
        as_usually_written(usual)
        algorithm.to(device)
        usual.to(device).eval()
        episodes = EpisodeList(EpisodeSampler(bank, 5, 1, query, device=device), count)
        batch_norm = "transductive" if isinstance(algorithm, MAML) else "inductive"
        works = {
            "metacv": partial(evaluate_episodes, algorithm, episodes, batch_norm),
            "plain loop": partial(evaluation_loop, usual, episodes),
        }
        if (works["metacv"]() - works["plain loop"]()).abs().mean() > 1e-3:
            raise SystemExit(f"benchmark: evaluation, {name}: accuracies differ")
        times = in_turns(works, device, repeats)
        row = {
            "row": f"evaluation, {name}",
            "tasks_per_second": {who: count / seconds for who, seconds in times.items()},
            "against": {"plain loop": times["plain loop"] / times["metacv"]},
        }
        table.append(row | what_bounds(algorithm, works["metacv"], times["metacv"], device))
    return table


def evaluation_loop(algorithm: MAML | ProtoNet, episodes: EpisodeList) -> Tensor:
    """The accuracy of each episode, [E]."""
    right = []
    for task in episodes.batches(1):
        support_x, support_y, query_x = task.support_x[0], task.support_y[0], task.query_x[0]
        if isinstance(algorithm, MAML):
            params = {name: p.detach().requires_grad_() for name, p in algorithm.net.named_parameters()}
            for _ in range(algorithm.eval_inner_steps):
                loss = F.cross_entropy(functional_call(algorithm.net, params, (support_x,)), support_y)
                grads = torch.autograd.grad(loss, list(params.values()))
                params = {
                    name: (p - algorithm.inner_lr * grad).detach().requires_grad_()
                    for (name, p), grad in zip(params.items(), grads, strict=True)
                }
            with torch.no_grad():
                logits = functional_call(algorithm.net, params, (query_x,))
        else:
            with torch.no_grad():
                support, query = algorithm.backbone(support_x).flatten(1), algorithm.backbone(query_x).flatten(1)
                means = torch.stack([support[support_y == label].mean(0) for label in range(task.way)])
                logits = -torch.cdist(query, means)
        right.append(accuracies(logits.unsqueeze(0), task.query_y))
    return torch.cat(right).double().cpu()


def sampling(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """5-way 1-shot episodes per second, drawn one at a time beside torchvision's data set, and 32 together."""
    sampler = EpisodeSampler(noise(OMNIGLOT, 1100, 20), 5, 1, 15, "per_class", device=device)
    with tempfile.TemporaryDirectory() as folder:
        others = torchvision_episodes(Path(folder))
        works = {"1": lambda: sampler.sample(1), "32": lambda: sampler.sample(32), "torchvision": lambda: next(others)}
        times = in_turns(works, device, repeats)
        others.close()
    against = {"1": {"plain loop": times["torchvision"] / times["1"]}, "32": {}}
    names = {"1": "1 at a time (the loop: torchvision's Omniglot and a DataLoader)", "32": "32 at a time"}
    return [
        {
            "row": f"episodes of Omniglot's size, {names[n]}",
            "tasks_per_second": {"metacv": int(n) / times[n]},
            "against": against[n],
        }
        for n in names
    ]


class DrawnOmniglot(Omniglot):
    """torchvision's data set with files of noise, which downloads nothing."""

    def _check_integrity(self) -> bool:
        return True


def torchvision_episodes(folder: Path, classes: int = 100) -> Generator[Any, None, None]:
    """An endless stream of the 5 x 16 images of an episode, as a user of torchvision would draw them."""
    generator = torch.Generator().manual_seed(0)
    for label in range(classes):
        place = folder / f"omniglot-py/images_background/alphabet/character{label:04}"
        place.mkdir(parents=True)
        for image in range(20):
            pixels = torch.rand(105, 105, generator=generator) > 0.9
            to_pil_image(255 * pixels.to(torch.uint8)).convert("1").save(place / f"{label:04}_{image:02}.png")
    images = DrawnOmniglot(str(folder), transform=Compose([Resize(28), ToTensor()]))

    def rows() -> Iterator[list[int]]:
        while True:
            drawn = torch.randperm(classes, generator=generator)[:5].tolist()
            yield [20 * label + row for label in drawn for row in torch.randperm(20, generator=generator)[:16].tolist()]

    yield from DataLoader(images, batch_sampler=rows(), num_workers=os.cpu_count() or 1)


def memory_rows() -> list[Row]:
    """Rows with 25 support images, where the inner loop takes most of the memory."""
    backbone = partial(Conv4, OMNIGLOT, running_stats=False)

    def checkpointed() -> MAML:
        algorithm = maml(backbone, 5, False)
        algorithm.gradient_checkpointing = True
        return algorithm

    builds: dict[str, Callable[[], MAML]] = {
        "FOMAML, 1 inner step": partial(maml, backbone, 1, True),
        "FOMAML, 10 inner steps": partial(maml, backbone, 10, True),
        "MAML, 5 inner steps": partial(maml, backbone, 5, False),
        "MAML, 5 inner steps, gradient_checkpointing": checkpointed,
    }
    step: dict[str, Callable[[Any], Step]] = {"metacv": metacv, "plain loop": plain_loop}
    return [Row(f"{name}, 5-shot", build, OMNIGLOT, 5, 5, 15, 4, step) for name, build in builds.items()]


def peak_memory(row: Row, name: str, device: torch.device) -> int:
    """Bytes that a step adds to the memory in use, in a process of its own that returns freed memory to the system."""
    command = [sys.executable, __file__, "--device", str(device), "--peak", row.name, name]
    thresholds = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=os.environ | thresholds, capture_output=True, text=True, check=True)
    return int(done.stdout)


def print_peak(row: Row, name: str, device: torch.device) -> None:
    step, tasks = row.implementations[name](row.algorithm(name, device)), row.sampler(device).sample(row.tasks)
    step(tasks)  # the first step loads code and creates .grad
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(tasks)
        print(torch.cuda.max_memory_allocated(device) - before)
        return
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
    before = resident("VmRSS")
    step(tasks)
    print(resident("VmHWM") - before)


def resident(field: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def by_settings(device: torch.device, repeats: int) -> dict[str, float]:
    """Tasks per second of the paper's MAML with settings that change only its speed. The first is the default."""
    (row,) = [row for row in rows() if row.name == PAPERS]
    tasks = row.sampler(device).sample(row.tasks)
    settings = [
        "precision=fp32",
        "task_batching=loop",
        "task_batching=vmap",
        "gradient_checkpointing=true",
        "compile=true",
    ]
    if device.type == "cuda":
        settings += ["precision=tf32", "precision=bf16"]
    elif torch.ops.mkldnn._is_mkldnn_bf16_supported():
        settings += ["precision=bf16"]

    def work(algorithm: Algorithm, kind: str) -> None:
        algorithm.zero_grad()
        with precision(kind, device):
            algorithm.training_step(tasks)

    works = {}
    for setting in settings:
        algorithm = row.algorithm("metacv", device)
        name, value = setting.split("=")
        if name == "compile":
            algorithm.compile_training()
        elif name != "precision":
            setattr(algorithm, name, True if value == "true" else value)
        works[setting] = partial(work, algorithm, value if name == "precision" else "fp32")
        try:
            works[setting]()
        except UserError as error:  # a missing compiler
            print(f"benchmark: {error}", file=sys.stderr)
            del works[setting]
    return {setting: row.tasks / seconds for setting, seconds in in_turns(works, device, repeats).items()}


def trained(words: str, device: torch.device, processes: int = 1) -> tuple[float, float]:
    """Seconds of `metacv train algo=maml` on glyphs, start included, and the tasks per second at its end."""
    several = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    launch = [*(several if processes > 1 else []), "metacv"]
    settings = f"algo=maml {words} device={device} eval_episodes=2 dataset.classes={{train:30,val:8,test:8}}"
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes))}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", *launch, "train", *settings.split(), f"data_dir={folder}", "hydra.run.dir=."]
        subprocess.run(command, cwd=folder, env=os.environ | threads, check=True, capture_output=True)
        seconds = time.perf_counter() - start
        lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
        return seconds, [line for line in lines if "train/loss" in line][-1]["train/tasks_per_second"]


def one_step(device: torch.device, repeats: int) -> dict[str, float]:
    return {"seconds": statistics.median(trained("steps=1 log_every=1", device)[0] for _ in range(repeats))}


def by_processes(device: torch.device, repeats: int) -> dict[int, float]:
    """Tasks per second of training with one process, and with as many as there are GPUs or processors."""
    counts = sorted({1, torch.cuda.device_count() if device.type == "cuda" else torch.get_num_threads()})
    speeds = [{n: trained("steps=60 log_every=20 meta_batch=32", device, n)[1] for n in counts} for _ in range(repeats)]
    return {n: statistics.median(speed[n] for speed in speeds) for n in counts}


def markdown(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        f"{machine['device']}, torch {machine['torch']}, medians of {machine['repeats']}; a matrix product reaches "
        f"{machine['flops_per_second'] / 1e9:.0f} GFLOP/s, a copy {machine['bytes_per_second'] / 1e9:.1f} GB/s. "
        "The other implementations run the networks as they are usually written, except `with metacv's network`, a "
        "plain loop.",
        "",
        *speed_lines(result["rows"]),
        *limit_lines(result["rows"], machine),
        *part_lines(result),
    ]
    if "thread" in machine["device"]:
        lines += ["", "On a GPU: not run."]
    return "\n".join(lines) + "\n"


def speed_lines(table: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| | metacv, tasks/s | times as fast as a plain loop | with metacv's network | as `higher` | as `torchopt` "
        "| peak memory, MB (loop) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in table:
        against = [
            f"{row['against'][name]:.2f}" if name in row["against"] else ""
            for name in ("plain loop", OWN_NETWORK, "higher", "torchopt")
        ]
        memory = row.get("peak_bytes", {})
        peak = f"{memory['metacv'] / 1e6:.0f} ({memory['plain loop'] / 1e6:.0f})" if memory else ""
        speed = row["tasks_per_second"]["metacv"]
        lines.append(f"| {row['row']} | {speed:.3g} | {' | '.join(against)} | {peak} |")
    return lines


def limit_lines(table: list[dict[str, Any]], machine: dict[str, Any]) -> list[str]:
    steps = [row for row in table if "parts_of_time" in row]
    if not steps:
        return []
    kinds = list(steps[0]["parts_of_time"])
    lines = [
        "",
        "What limits a step of metacv: its floating-point operations per second as a share of those of the matrix "
        "product, the bytes that its operations read and write per second as a share of those of the copy (caches can "
        "be faster), and the shares of its time.",
        "",
        f"| | of the product | of the copy | {' | '.join(kinds)} |",
        f"| --- | --- | --- |{' --- |' * len(kinds)}",
    ]
    for row in steps:
        shares = [row[limit] / machine[limit] for limit in ("flops_per_second", "bytes_per_second")]
        shares += [row["parts_of_time"][kind] for kind in kinds]
        lines.append(f"| {row['row']} | {' | '.join(f'{share:.0%}' for share in shares)} |")
    return lines


def part_lines(result: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    if memory := result["memory"]:
        lines += ["", "| | peak memory, MB |", "| --- | --- |"]
        lines += [f"| {name} | {peak / 1e6:.0f} |" for name, peak in memory.items()]
    if speeds := result["settings"]:
        first = next(iter(speeds.values()))
        lines += ["", f"| {PAPERS} | tasks/s | times as fast |", "| --- | --- | --- |"]
        lines += [f"| {name} | {speed:.3g} | {speed / first:.2f} |" for name, speed in speeds.items()]
    if speeds := result["processes"]:
        lines += ["", "| `metacv train algo=maml`, processes | tasks/s |", "| --- | --- |"]
        lines += [f"| {count} | {speed:.3g} |" for count, speed in speeds.items()]
    if start := result["start"]:
        lines += [
            "",
            f"`metacv train` with a single step takes {start['seconds']:.1f} s, including imports, glyphs, validation "
            "on 2 episodes and checkpoints.",
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="words in names of rows; default: all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs/benchmark")
    parser.add_argument("--peak", nargs=2, metavar=("ROW", "IMPLEMENTATION"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    device = pick_device(given.device)
    if given.peak:
        (row,) = [row for row in rows() + memory_rows() if row.name == given.peak[0]]
        return print_peak(row, given.peak[1], device)
    names = [*(row.name for row in rows()), "evaluation", "sampling", *PARTS]
    for word in given.words:
        if not any(word.lower() in name.lower() for name in names):
            parser.error(f"{word} is in none of these names: {'; '.join(names)}")
    chosen = {name for name in names if not given.words or any(word.lower() in name.lower() for word in given.words)}
    keep_freed_memory()
    with precision("fp32", device):
        benchmark(chosen, device, given.repeats, given.out)


def benchmark(chosen: set[str], device: torch.device, repeats: int, out: Path) -> None:
    """Write the results so far after every part."""
    machine = {"device": describe_device(device), "torch": torch.__version__, "repeats": repeats} | limits(device)
    result: dict[str, Any] = {"machine": machine, "rows": []} | {part: {} for part in PARTS}

    def write() -> None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "benchmark.md").write_text(markdown(result))

    for row in rows():
        if row.name in chosen:
            peaks = {name: peak_memory(row, name, device) for name in ("metacv", "plain loop")}
            result["rows"].append(measure(row, device, repeats) | {"peak_bytes": peaks})
            print(row.name, flush=True)
            write()
    for part in (evaluation, sampling):
        if part.__name__ in chosen:
            result["rows"] += part(device, repeats)
            write()
    for name, measured in PARTS.items():
        if name in chosen:
            result[name] = measured(device, repeats)
            write()
    print(markdown(result))


PARTS: dict[str, Callable[[torch.device, int], dict[Any, float]]] = {
    "settings": by_settings,
    "processes": by_processes,
    "memory": lambda device, _: {row.name: peak_memory(row, "metacv", device) for row in memory_rows()},
    "start": one_step,
}


if __name__ == "__main__":
    main()
