import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from metacv import cli
from metacv.backbones.base import Backbone
from metacv.backbones.batch_norm import BatchNorm
from metacv.config_dir import config_dir
from metacv.data.bank import ImageBank
from metacv.data.sampler import EpisodeSampler, TaskBatch

torch.set_num_threads(1)

ALGORITHMS = sorted(path.stem for path in (config_dir() / "algo").glob("*.yaml"))


class SmoothNet(Backbone):
    """Twice differentiable, with batch norm: what a finite difference can check."""

    def __init__(self, image_shape: tuple[int, int, int] = (1, 6, 6), channels: int = 4, running_stats: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(image_shape[0], channels, 3, padding=1)
        self.norm1 = BatchNorm(channels, track_running_stats=running_stats)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = BatchNorm(channels, track_running_stats=running_stats)
        self.pool = nn.AvgPool2d(2)
        self.out_shape = (channels, image_shape[1] // 2, image_shape[2] // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.norm1(self.conv1(x)))
        return self.pool(nn.functional.gelu(self.norm2(self.conv2(x))))


class Identity(Backbone):
    """The image is its own embedding: what a hand calculation can check."""

    def __init__(self, image_shape: tuple[int, int, int] = (1, 1, 2)):
        super().__init__()
        self.out_shape = image_shape

    def forward(self, x: Tensor) -> Tensor:
        return x


def random_tasks(tasks=2, way=3, shot=2, query=4, shape=(1, 6, 6), dtype=torch.float32, seed=0) -> TaskBatch:
    generator = torch.Generator().manual_seed(seed)

    def images(each: int) -> Tensor:
        return torch.rand(tasks, way * each, *shape, generator=generator, dtype=torch.float64).to(dtype)

    def labels(each: int) -> Tensor:
        return torch.arange(way).repeat_interleave(each).expand(tasks, -1)

    return TaskBatch(images(shot), labels(shot), images(query), labels(query), way)


def bank_of(sizes: list[int], shape=(1, 4, 4), name="toy train") -> ImageBank:
    """Image i of class c has c and i in its first two pixels and noise elsewhere."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (sum(sizes), *shape), generator=generator, dtype=torch.uint8)
    row = 0
    for c, size in enumerate(sizes):
        for i in range(size):
            images[row, 0, 0, 0], images[row, 0, 0, 1] = c, i
            row += 1
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return ImageBank(name, images, offsets, tuple(f"class{c}" for c in range(len(sizes))))


@pytest.fixture
def sampler() -> EpisodeSampler:
    return EpisodeSampler(bank_of([20] * 12), way=5, shot=2, query=3)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """One folder of caches for the whole session: the glyphs are drawn once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def metacv(monkeypatch, tmp_path, data_dir, capsys):
    """Runs the command line in this process, in an empty folder: metacv("train", "steps=2") -> (code, out, err)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METACV_DATA_DIR", str(data_dir))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["metacv", *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


# A glyph data set and a training short enough for a test of everything around them.
SMALL = ("dataset.classes={train:30,val:8,test:8}", "backbone.channels=8", "query=5", "eval_episodes=8", "episodes=8")
TRAIN = (*SMALL[:4], "steps=4", "eval_every=2", "log_every=1", "meta_batch=2")


def quick(algo: str) -> tuple[str, ...]:
    """TRAIN for this algorithm; Reptile's 50 inner steps in evaluation would take most of a test's time."""
    return (f"algo={algo}", *TRAIN, *(["algo.eval_inner_steps=3"] if algo == "reptile" else []))
