"""Drawing N-way K-shot tasks from a bank, by index and exactly seeded.

Rotations by right angles, as the papers use them on Omniglot:
    none         images as they are
    per_class    each class of a task is turned by an angle of its own (MAML)
    per_episode  all classes of a task are turned by the same angle (Relation Networks)
    as_classes   each class counts four times, once an angle (Vinyals et al. 2016, Prototypical Networks, Reptile)
"""

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metacv import MetacvError
from metacv.data.bank import ImageBank, Rotation
from metacv.data.transforms import Augment


@dataclass(frozen=True)
class TaskBatch:
    """T tasks of N classes, class-major: label i owns rows i*K to (i+1)*K of its task.

    Where the classes of a user's support set differ in size, `shots` says how many rows each owns.
    """

    support_x: Tensor  # [T, N*K, C, H, W], 0 to 1
    support_y: Tensor  # [T, N*K]
    query_x: Tensor  # [T, N*Q, C, H, W]
    query_y: Tensor  # [T, N*Q]
    way: int
    seeds: Tensor | None = None  # int64 [T], for an algorithm that draws at random within a task
    shots: tuple[int, ...] | None = None  # [N]; None: K each

    def __len__(self) -> int:
        return len(self.support_x)

    def class_means(self, values: Tensor, dim: int = 1) -> Tensor:
        """Of one value for each support image, [..., N*K, ...], the mean of each class: [..., N, ...]."""
        if self.shots is None:
            return values.unflatten(dim, (self.way, -1)).mean(dim + 1)
        return torch.stack([own.mean(dim) for own in values.split(self.shots, dim)], dim)

    def split(self, tasks: int) -> "Iterator[TaskBatch]":
        """As batches of so many tasks; the last may have fewer."""
        for start in range(0, len(self), tasks):
            part = slice(start, start + tasks)
            yield replace(
                self,
                support_x=self.support_x[part],
                support_y=self.support_y[part],
                query_x=self.query_x[part],
                query_y=self.query_y[part],
                seeds=None if self.seeds is None else self.seeds[part],
            )


class EpisodeSampler:
    """An endless seeded stream of tasks from one bank.

    Task t takes the same numbers from the generator however many are drawn at a time, and the generator is the
    CPU's in double precision, so the stream is the same for every batch size, algorithm, device and machine.
    """

    def __init__(
        self,
        bank: ImageBank,
        way: int,
        shot: int,
        query: int,
        rotation: Rotation = "none",
        seed: int = 0,
        device: torch.device | str = "cpu",
        prefix: str = "",
        augment: Augment | None = None,
    ) -> None:
        """`prefix` is of the settings' names in errors, such as train_ for train_way."""
        if way < 2:
            raise MetacvError(f"{prefix}way={way}: a task needs at least 2 classes")
        for name, value in (("shot", shot), ("query", query)):
            if value < 1:
                raise MetacvError(f"{prefix}{name}={value}: a class needs at least 1 image")
        if not 0 <= seed < 2**63:
            raise MetacvError(f"seed={seed}: must lie between 0 and 2**63 - 1")
        self.way, self.shot, self.query, self.device = way, shot, query, torch.device(device)
        self.bank, self.rotation, self.augment = bank, rotation, augment
        self.classes = len(bank.sizes) * (4 if rotation == "as_classes" else 1)
        if way > self.classes:
            raise MetacvError(f"{prefix}way={way} but {bank.name} has only {self.classes} classes")
        smallest = int(bank.sizes.min())
        if shot + query > smallest:
            name = bank.class_names[int(bank.sizes.argmin())]
            raise MetacvError(
                f"{prefix}shot={shot} + {prefix}query={query} needs {shot + query} images a class "
                f"but {name} of {bank.name} has {smallest}"
            )
        if augment and augment.crop >= min(bank.image_shape[1:]):
            raise MetacvError(f"augment.crop={augment.crop} but the images are {bank.images.shape[2]} pixels high and "
                              f"{bank.images.shape[3]} wide")  # fmt: skip
        images = bank.images
        if rotation != "none":  # turned once here, so that a task is one gather
            if images.shape[2] != images.shape[3]:
                raise MetacvError(f"rotation={rotation} needs square images, not {tuple(images.shape[2:])}")
            images = torch.cat([torch.rot90(images, turns, (2, 3)) for turns in range(4)])
        self.images = images.to(self.device)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, tasks: int) -> Tensor:
        """Rows of `self.images` for the next tasks, [T, N, K+Q]; the first K of each class are its support."""
        sizes, largest = self.bank.sizes, int(self.bank.sizes.max())
        widths = [self.classes, self.way, self.way * largest]
        random = torch.rand(tasks, sum(widths), generator=self.generator, dtype=torch.float64)
        for_class, for_angle, for_image = random.split(widths, dim=1)

        classes = for_class.topk(self.way).indices  # [T, N] without replacement
        turns = torch.zeros_like(classes)
        if self.rotation == "as_classes":
            turns, classes = classes // len(sizes), classes % len(sizes)
        elif self.rotation == "per_class":
            turns = (4 * for_angle).long()
        elif self.rotation == "per_episode":
            turns = (4 * for_angle[:, :1]).long().expand(-1, self.way)

        for_image = for_image.unflatten(1, (self.way, largest))  # [T, N, largest class]
        beyond = torch.arange(largest) >= sizes[classes].unsqueeze(-1)
        images = for_image.masked_fill(beyond, -1).topk(self.shot + self.query).indices  # [T, N, K+Q]
        return images + (turns * len(self.bank.images) + self.bank.offsets[classes]).unsqueeze(-1)

    def gather(self, rows: Tensor, changes: Tensor | None = None) -> TaskBatch:
        """The tasks that `draw` describes, their images augmented by `changes` [T, N, K+Q, ...] of each."""
        tasks = len(rows)
        images = self.images[rows.to(self.device)].float().div_(255)  # [T, N, K+Q, C, H, W]
        if self.augment and changes is not None:
            images = self.augment(images.flatten(0, 2), changes.flatten(0, 2)).view_as(images)
        labels = torch.arange(self.way, device=self.device)
        return TaskBatch(
            support_x=images[:, :, : self.shot].flatten(1, 2),
            support_y=labels.repeat_interleave(self.shot).expand(tasks, -1),
            query_x=images[:, :, self.shot :].flatten(1, 2),
            query_y=labels.repeat_interleave(self.query).expand(tasks, -1),
            way=self.way,
            seeds=rows.flatten(1) @ torch.arange(1, rows[0].numel() + 1),
        )

    def sample(self, tasks: int, part: slice = slice(None)) -> TaskBatch:
        """The next tasks, or that part of them."""
        rows = self.draw(tasks)
        changes = self.augment.draw(rows.numel()).view(*rows.shape, -1)[part] if self.augment else None
        return self.gather(rows[part], changes)

    def state_dict(self) -> dict[str, Any]:
        state = {"generator": self.generator.get_state()}
        return state | ({"augment": self.augment.state_dict()} if self.augment else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        if self.augment:
            self.augment.load_state_dict(state["augment"])


class EpisodeList:
    """The first `episodes` tasks of a sampler's stream, to go through again and again."""

    def __init__(self, sampler: EpisodeSampler, episodes: int, setting: str = "episodes") -> None:
        if not 2 <= episodes < 2**31:
            raise MetacvError(f"{setting}={episodes}: an interval needs at least 2, and 2**31 is too many")
        self.sampler = sampler
        parts = torch.arange(episodes).split(1000)  # a draw takes memory for every image of its classes
        self.rows = torch.cat([sampler.draw(len(part)) for part in parts])  # [episodes, N, K+Q]

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, which: slice) -> "EpisodeList":
        part = copy.copy(self)
        part.rows = self.rows[which]
        return part

    def batches(self, tasks: int) -> Iterator[TaskBatch]:
        for rows in self.rows.split(tasks):
            yield self.sampler.gather(rows)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the images, of every task's rows and of where its support ends."""
        digest = hashlib.sha256(self.sampler.bank.fingerprint.encode())
        digest.update(f"{self.sampler.shot} {tuple(self.rows.shape)}".encode())
        digest.update(self.rows.contiguous().numpy().data)
        return digest.hexdigest()
