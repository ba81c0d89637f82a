"""Sample N-way K-shot tasks, or batches of images, from an image bank, reproducibly from a seed.

Rotations by multiples of 90 degrees, as in the papers' Omniglot experiments:
    none         images are not rotated
    per_class    each class of a task is rotated by its own random angle (MAML)
    per_episode  all classes of a task are rotated by the same random angle (Relation Networks)
    as_classes   each class becomes four, one for each angle (Vinyals et al. 2016, Prototypical Networks, Reptile)

Queries are balanced, or unbalanced as in Veilleux et al. (2021), https://arxiv.org/abs/2204.11181: the shares of the
classes in a task follow a Dirichlet distribution. Unbalanced tasks have the same support images as balanced ones.
"""

import copy
import hashlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from metacv.bounds import QueryBalance, Vary
from metacv.data.bank import ImageBank, Rotation
from metacv.data.task import ImageBatch, TaskBatch, TaskList
from metacv.data.transforms import Augment
from metacv.data.varied import ABSENT, values_per_task, varied
from metacv.errors import UserError
from metacv.terminal import warn
from metacv.text import in_bytes

ON_DEVICE = 2**32  # bytes of images that are copied to the device at once
MOST = 2**33  # maximum of bytes of a list of episodes, and of the images of a training step


class Sampler:
    """Base class: draws rows of a bank's images on the CPU, and augments the images by a separate random stream.

    Draws are copied to a GPU with `non_blocking`, because otherwise each copy waits for the previous step.
    """

    device: torch.device
    augment: Augment | None
    images: Tensor  # uint8 [M, C, H, W], or [4 * M, C, H, W] with rotations

    def images_at(self, rows: Tensor) -> Tensor:
        """Return the images of `rows` on the sampler's device, from 0 to 1."""
        return self.gathered(self.images, rows).float().div_(255)

    def gathered(self, images: Tensor, rows: Tensor) -> Tensor:
        """Return the images or features of `rows` on the sampler's device."""
        return images[rows.to(images.device, non_blocking=True)].to(self.device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        return {"augment": {"generator": self.augment.generator.get_state()}} if self.augment else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.augment:
            self.augment.generator.set_state(state["augment"]["generator"])


class EpisodeSampler(Sampler):
    """An endless stream of random tasks that does not depend on batch size, algorithm, device or machine."""

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
        query_balance: QueryBalance = "balanced",
        vary: Vary | None = None,
    ) -> None:
        """Copy the images of `bank` to `device`. `prefix` of settings in errors: train_ for train_way.

        vary: tasks differ in their numbers of classes and of support images, at most `way` and `shot`; see varied.py.
        """
        self.way, self.shot, self.query, self.device = way, shot, query, torch.device(device)
        self.bank, self.rotation, self.augment = bank, rotation, augment
        self.seed, self.query_balance, self.vary = seed, query_balance, vary
        if vary and query_balance != "balanced":
            raise UserError(f"query_balance={query_balance}: cannot be set together with vary={vary}")
        turns = 4 if rotation == "as_classes" else 1
        self.classes = len(bank.sizes) * turns
        most = turns * min(bank.classes_of_groups)
        place = f"{bank.name} has only {most} classes{' in one of its data sets' * (most < self.classes)}"
        advice = f"lower {prefix}way, or set dataset.fractions if the split is random"
        size, name = min(zip(bank.sizes.tolist(), bank.class_names, strict=True), default=(0, ""))
        least = 1 if vary else shot
        need = f"{prefix}shot={least} + {prefix}query={query} needs {least + query} images per class,"
        _, height, width = bank.image_shape
        check_crop(bank, augment)
        for wrong, message in (
            (way > most, f"{prefix}way={way}, but {place}; {advice}"),
            (least + query > size, f"{need} but {name} of {bank.name} has {size}"),
            (rotation != "none" and height != width, f"rotation={rotation} needs square images, not {height}x{width}"),
        ):
            if wrong:
                raise UserError(message)
        self.images = placed(rotated(bank, rotation), self.device)
        self.images_each = way * (shot + query)  # images per task
        self.generator = torch.Generator().manual_seed(seed)
        self.shares = torch.Generator().manual_seed((seed * 1_000_003 + 1) % 2**63)  # of the classes in the queries

    def draw(self, tasks: int) -> Tensor:
        """Draw rows of `self.images` for the next tasks, int64 [T, N, K+Q].

        The first K of a class are its support, and the others its queries. If unbalanced, the others are N * Q queries
        of any of the task's classes, sorted by class. With `vary`, rows are ABSENT for images that a task does
        not have.
        """
        sizes, largest = self.bank.sizes, int(self.bank.sizes.max())
        groups = torch.tensor(self.bank.chances, dtype=torch.float64).cumsum(0)[:-1]
        for_shapes = values_per_task(self.way) if self.vary else 0
        widths = [self.classes, self.way, self.way * largest, min(1, len(groups)), for_shapes]  # the same for each task
        random = torch.rand(tasks, sum(widths), generator=self.generator, dtype=torch.float64)
        for_class, for_angle, for_image, for_group, for_shape = random.split(widths, dim=1)

        if len(groups):
            group = torch.searchsorted(groups, for_group.contiguous(), right=True)  # [T, 1]
            own = torch.tensor(self.bank.groups).repeat(self.classes // len(sizes)) == group
            for_class = for_class.masked_fill(~own, -1)
        classes = for_class.topk(self.way).indices  # [T, N] without replacement
        turns = torch.zeros_like(classes)
        if self.rotation == "as_classes":
            turns, classes = classes // len(sizes), classes % len(sizes)
        elif self.rotation == "per_class":
            turns = (4 * for_angle).long()
        elif self.rotation == "per_episode":
            turns = (4 * for_angle[:, :1]).long().expand(-1, self.way)

        for_image = for_image.unflatten(1, (self.way, largest))  # [T, N, largest class]
        absent = torch.arange(largest) >= sizes[classes].unsqueeze(-1)
        balanced = self.query_balance == "balanced"
        count = min(largest, self.shot + self.query * (1 if balanced else self.way))
        images = for_image.masked_fill(absent, -1).topk(count).indices
        rows = images + (turns * len(self.bank.images) + self.bank.offsets[classes]).unsqueeze(-1)  # [T, N, count]
        if self.vary:
            return varied(self.vary, rows, sizes[classes], for_shape, self.shot, self.query)
        return rows if balanced else self.unbalanced(rows, sizes[classes] - self.shot)

    def unbalanced(self, rows: Tensor, room: Tensor) -> Tensor:
        """Keep N * Q queries of `rows` [T, N, K + any]: [T, N, K+Q]. A class has at most `room` [T, N] queries.

        The sum of two exponential variables has a gamma distribution with shape 2; gamma variables divided by their sum
        have a Dirichlet distribution, here with alpha 2. The queries are dealt by the method of Webster, which rounds
        shares to whole numbers with a given sum: to the largest values of share / 0.5, share / 1.5, ...
        """
        uniform = torch.rand(len(rows), 2, self.way, generator=self.shares, dtype=torch.float64)
        shares = -torch.log1p(-uniform).sum(1)  # [T, N]
        places = torch.arange(rows.shape[2] - self.shot)
        values = (shares.unsqueeze(2) / (places + 0.5)).masked_fill(places >= room.unsqueeze(2), -1)
        chosen = values.flatten(1).topk(self.way * self.query).indices.sort().values
        queries = rows[:, :, self.shot :].flatten(1).gather(1, chosen).unflatten(1, (self.way, self.query))
        return torch.cat([rows[:, :, : self.shot], queries], dim=2)

    def draw_disjoint(self) -> Tensor:
        """Draw rows [R, E, N, K+Q] of tasks that share no image, in as many rounds R as the smallest class allows.

        In each round every class is in one task, but for a remainder if the number of classes is no multiple of `way`.
        UserError if there are fewer than two tasks.
        """
        if self.rotation != "none":
            raise UserError("episodes=disjoint: uses each image once, so it needs dataset.test_rotation=none")
        if self.vary:
            raise UserError(f"episodes=disjoint: cannot be set together with vary={self.vary}")
        if self.bank.groups:
            raise UserError("episodes=disjoint: test on one of the data sets, such as dataset=cifar_fs")
        sizes, each = self.bank.sizes, self.shot + self.query
        largest, rounds, tasks = int(sizes.max()), int(sizes.min()) // each, self.classes // self.way
        if rounds * tasks < 2:
            raise UserError(f"episodes=disjoint: {self.bank.name} has images for one task only, and two are needed")
        random = torch.rand(self.classes, largest + rounds, generator=self.generator, dtype=torch.float64)
        absent = torch.arange(largest) >= sizes.unsqueeze(1)
        rows = random[:, :largest].masked_fill(absent, -1).topk(rounds * each).indices + self.bank.offsets[:-1, None]
        classes = random[:, largest:].mT.topk(tasks * self.way).indices.unflatten(1, (tasks, self.way))  # [R, E, N]
        return rows.unflatten(1, (rounds, each))[classes, torch.arange(rounds)[:, None, None]]

    def tasks(
        self, images: Tensor, rows: Tensor, index: Tensor | None = None, changes: Tensor | None = None
    ) -> TaskBatch:
        """Build the tasks of `rows` [T, N, K+Q] from images or features [U, ...]; uint8 is divided by 255.
        `index` [T, N, K+Q]: indices into `images`, by default `rows`. `changes` [T, N, K+Q, 6]: augmentation.
        With `vary`, T is 1."""
        if self.vary:
            return self.varied_task(images, rows[0].cpu(), rows if index is None else index, changes)
        values = self.gathered(images, rows if index is None else index)  # [T, N, K+Q, ...]
        if values.dtype == torch.uint8:
            values = values.float().div_(255)
        if self.augment and changes is not None:
            values = self.augment(values.flatten(0, 2), changes.flatten(0, 2)).view_as(values)
        labels = torch.arange(self.way, device=self.device)
        rows = rows.cpu()
        return TaskBatch(
            support_x=values[:, :, : self.shot].flatten(1, 2),
            support_y=labels.repeat_interleave(self.shot).expand(len(rows), -1),
            query_x=values[:, :, self.shot :].flatten(1, 2),
            query_y=self.query_labels(rows).to(self.device, non_blocking=True),
            way=self.way,
            classes=self.classes_of(rows[:, :, 0]).to(self.device, non_blocking=True),
            seeds=rows.flatten(1) @ torch.arange(1, rows[0].numel() + 1),
        )

    def varied_task(self, images: Tensor, rows: Tensor, index: Tensor, changes: Tensor | None) -> TaskBatch:
        """Build one task of `rows` [N, K+Q] without those that are ABSENT; other arguments as in `tasks`."""
        known, parts = rows != ABSENT, list[Tensor]()
        for columns in (slice(self.shot), slice(self.shot, None)):
            own = known[:, columns].nonzero(as_tuple=True)  # classes and places of images
            values = self.gathered(images, index[0, :, columns].cpu()[own])
            if values.dtype == torch.uint8:
                values = values.float().div_(255)
            if self.augment and changes is not None:
                values = self.augment(values, changes[0, :, columns][own])
            parts += [values[None], own[0][None].to(self.device, non_blocking=True)]
        way = int(known[:, self.shot].sum())
        classes = self.classes_of(rows[None, :way, self.shot]).to(self.device, non_blocking=True)
        support_x, support_y, query_x, query_y = parts
        seeds = rows.flatten()[None] @ torch.arange(1, rows.numel() + 1)
        return TaskBatch(support_x, support_y, query_x, query_y, way, classes, seeds)

    def query_labels(self, rows: Tensor) -> Tensor:
        """Return the labels of the queries [T, N * Q] of tasks of rows [T, N, K+Q]; ABSENT for no query."""
        if self.query_balance == "balanced":
            labels = torch.arange(self.way).repeat_interleave(self.query).expand(len(rows), -1)
            return labels.where(rows[:, :, self.shot :].flatten(1) != ABSENT, ABSENT) if self.vary else labels
        classes, queries = self.classes_of(rows[:, :, :1]), self.classes_of(rows[:, :, self.shot :].flatten(1))
        return (classes == queries.unsqueeze(1)).int().argmax(dim=1)

    def classes_of(self, rows: Tensor) -> Tensor:
        """Return the class of each row of `self.images`, from 0 to `self.classes` - 1, in the shape of `rows`."""
        classes = torch.bucketize(rows % len(self.bank.images), self.bank.offsets[1:], right=True)
        if self.rotation == "as_classes":
            classes += rows // len(self.bank.images) * len(self.bank.sizes)
        return classes

    def sample(self, tasks: int, part: slice = slice(None)) -> TaskBatch | TaskList:
        """Draw the next `tasks` tasks, augmented, and return those in `part`: ranks share a batch in this way."""
        rows = self.draw(tasks)
        changes = self.augment.draw(rows.numel()).view(*rows.shape, -1)[part] if self.augment else None
        rows = rows[part]
        if not self.vary:
            return self.tasks(self.images, rows, changes=changes)
        each = (slice(task, task + 1) for task in range(len(rows)))
        own = ((rows[one], None if changes is None else changes[one]) for one in each)
        return TaskList([self.tasks(self.images, some, changes=changed) for some, changed in own])

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()} | super().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.generator.set_state(state["generator"])


class ImageSampler(Sampler):
    """An endless stream of image batches, in epochs: each image once, in random order.

    With `rotation` as_classes an image appears four times in an epoch, once for each of four classes.
    """

    def __init__(
        self, bank: ImageBank, rotation: Rotation, seed: int, device: torch.device, augment: Augment | None = None
    ) -> None:
        check_crop(bank, augment)
        if rotation not in ("none", "as_classes"):
            raise UserError(f"dataset.train_rotation={rotation}: must be none or as_classes for training on images")
        if len({*bank.chances}) > 1:
            raise UserError("dataset.weights: must be null for training on images, which takes all equally often")
        self.bank, self.device, self.augment, self.seed = bank, device, augment, seed
        self.images = placed(rotated(bank, rotation), device)
        self.classes = len(bank.sizes) * (4 if rotation == "as_classes" else 1)
        labels = torch.arange(len(bank.sizes)).repeat_interleave(bank.sizes)
        turns = torch.arange(len(self.images) // len(labels)).unsqueeze(1)
        self.labels = (labels + turns * len(bank.sizes)).flatten()  # label of each row of `images`
        self.images_each = 1
        self.position = 0  # number of images drawn so far
        self.order = -1, torch.empty(0, dtype=torch.long)  # epoch, and the order of its images

    def draw(self, count: int) -> Tensor:
        """Draw rows of `self.images`, int64 [B]."""
        rows = []
        while count:
            epoch, start = divmod(self.position, len(self.labels))
            if self.order[0] != epoch:
                generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
                self.order = epoch, torch.randperm(len(self.labels), generator=generator)
            rows.append(self.order[1][start : start + count])
            self.position += len(rows[-1])
            count -= len(rows[-1])
        return torch.cat(rows)

    def sample(self, count: int, part: slice = slice(None)) -> ImageBatch:
        """Draw the next `count` images, augmented, and return those in `part`: ranks share a batch in this way."""
        rows = self.draw(count)[part]
        images = self.images_at(rows)
        if self.augment:
            images = self.augment(images, self.augment.draw(count)[part])
        return ImageBatch(images, self.labels[rows].to(self.device, non_blocking=True))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position} | super().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if (position := int(state["position"])) < 0:
            raise ValueError(f"position {position}")
        self.position = position
        super().load_state_dict(state)


def check_crop(bank: ImageBank, augment: Augment | None) -> None:
    _, height, width = bank.image_shape
    if augment and augment.crop >= min(height, width):
        extent = f"{height} pixels high and {width} wide"
        raise UserError(f"augment.crop={augment.crop}: must be smaller than the images, which are {extent}")


def placed(images: Tensor, device: torch.device) -> Tensor:
    """Copy the images to the device, unless they exceed ON_DEVICE: then only batches are copied."""
    return images.to(device) if images.numel() <= ON_DEVICE else images


def rotated(bank: ImageBank, rotation: Rotation) -> Tensor:
    """Return the images, uint8 [M, C, H, W], or with rotations [4 * M, C, H, W], so that a task is one gather."""
    if rotation == "none":
        return bank.images
    return torch.cat([torch.rot90(bank.images, turns, (2, 3)) for turns in range(4)])


class EpisodeList:
    """The first `episodes` tasks of a sampler's stream, to evaluate on the same tasks each time; or all its images in
    tasks that share no image."""

    def __init__(self, sampler: EpisodeSampler, episodes: int | Literal["disjoint"], setting: str = "episodes") -> None:
        """`setting` is the name of `episodes` in errors."""
        self.sampler, self.rounds = sampler, 0  # rounds of disjoint episodes
        if episodes == "disjoint":
            rows = sampler.draw_disjoint()
            self.rows, self.rounds = rows.flatten(0, 1), len(rows)
            return
        if (size := 8 * episodes * sampler.images_each) > MOST:
            text = f"the list of episodes takes {in_bytes(size)}, above {in_bytes(MOST)}; reduce it"
            raise UserError(f"{setting}={episodes}: {text}")
        chunks = torch.arange(episodes).split(1000)  # limits memory: a draw has a value for each image of a class
        self.rows = torch.cat([sampler.draw(len(chunk)) for chunk in chunks])  # [E, N, K+Q]

    def __len__(self) -> int:
        return len(self.rows)

    def balanced_as(self, query_balance: QueryBalance) -> "EpisodeList":
        """Return the episodes with the same support images, and balanced or unbalanced queries."""
        own = self.sampler
        if query_balance == own.query_balance:
            return self
        task = own.bank, own.way, own.shot, own.query, own.rotation, own.seed, own.device
        if (room := int(own.bank.sizes.min()) - own.shot) < 2 * own.query:
            text = f"classes of {own.bank.name} have images for {room} queries only, and {own.query} on average"
            warn(f"query_balance={query_balance}: {text}; a smaller query gives more unbalanced tasks")
        return EpisodeList(EpisodeSampler(*task, query_balance=query_balance, vary=own.vary), len(self))

    @property
    def queries(self) -> int:
        """The number of queries of an episode, at most if episodes vary."""
        return self.sampler.way * self.sampler.query

    @property
    def labels(self) -> Tensor:
        """The true class of each query, from 0 to N - 1, [E, N * Q]."""
        return self.sampler.query_labels(self.rows)

    def part(self, which: slice) -> "EpisodeList":
        """Return some of the episodes as a list."""
        part = copy.copy(self)
        part.rows = self.rows[which]
        return part

    def batches(self, tasks: int) -> Iterator[TaskBatch]:
        """Yield all episodes, `tasks` at a time; the last batch may be smaller."""
        for rows in self.rows.split(1 if self.sampler.vary else tasks):
            yield self.sampler.tasks(self.sampler.images, rows)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the images, of the rows of every task, and of the number of support images."""
        text = f"{self.sampler.bank.fingerprint}{self.sampler.shot} {tuple(self.rows.shape)}"
        return hashlib.sha256(text.encode() + self.rows.numpy().tobytes()).hexdigest()
