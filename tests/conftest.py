"""Shared by tests: small networks and tasks with known answers, the command line in this process, short runs."""

import contextlib
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

from metacv import CONFIG_DIR, cli
from metacv.backbones.base import Backbone
from metacv.backbones.batch_norm import BatchNorm
from metacv.data.bank import ImageBank
from metacv.data.sampler import EpisodeSampler
from metacv.data.task import TaskBatch
from metacv.distributed import Ranks
from metacv.run import Run, load_state
from metacv.train import prepare

torch.set_num_threads(1)
ROOM = 3 * 2**30  # bytes

ALGORITHMS = sorted(path.stem for path in (CONFIG_DIR / "algo").glob("*.yaml"))
# One for each way through the core: inner loops with and without moments, vectors, maps, training on images.
KINDS = ["maml", "reptile", "protonet", "relationnet", "classifier"]
# timm is optional.
BACKBONES = [
    path.stem for path in sorted((CONFIG_DIR / "backbone").glob("*.yaml")) if path.stem != "timm" or find_spec("timm")
]
DATASETS = sorted(path.stem for path in (CONFIG_DIR / "dataset").glob("*.yaml"))


def each(*also: str) -> list[Any]:
    """All methods, as a parameter: the fast tests take one of each kind, and those of `also`."""
    return [name if name in {*KINDS, *also} else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS]


class SmoothNet(Backbone):
    """A twice differentiable network with batch norm, for finite differences."""

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
    """The image is its own embedding, for calculations by hand."""

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

    return TaskBatch(images(shot), labels(shot), images(query), labels(query), way, torch.arange(way).expand(tasks, -1))


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


def resumed_run(path: Path, data_dir: Path) -> Run:
    """The run of a last.pt of `trained`, ready for two more steps."""
    source = load_state(path)
    run, _ = prepare(replace(source.config, steps=6, data_dir=str(data_dir)), [], Ranks())
    run.load(source)
    return run


@contextlib.contextmanager
def bounded(seconds: int, room: int = ROOM) -> Iterator[None]:
    """Little time, and `room` bytes of memory beyond what the process has: a hostile file that is not refused then
    fails a test and does not stop the machine."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} seconds")

    before, statm = resource.getrlimit(resource.RLIMIT_AS), Path("/proc/self/statm")
    if statm.exists():
        pages = int(statm.read_text().split()[0])
        most = pages * resource.getpagesize() + room
        resource.setrlimit(resource.RLIMIT_AS, (most if before[1] < 0 else min(most, before[1]), before[1]))
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(autouse=True)
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads for one test. All others have one thread, because the number changes the rounding."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture
def sampler() -> EpisodeSampler:
    return EpisodeSampler(bank_of([20] * 12), way=5, shot=2, query=3)


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all workers of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def data_dir(shared) -> Path:
    """One folder of caches for all tests, so that the glyphs are drawn once."""
    return shared / "data"


@pytest.fixture(scope="session")
def trained(shared, data_dir) -> Callable[[str], Path]:
    """The folder of a finished short run of an algorithm, trained once for all tests. Copy it before changing it."""

    def run(algo: str) -> Path:
        folder = shared / "runs" / algo
        folder.parent.mkdir(exist_ok=True)
        with FileLock(folder.with_suffix(".lock")), pytest.MonkeyPatch.context() as patch:
            if not (folder / "result.json").exists():
                patch.chdir(shared)
                patch.setenv("METACV_DATA_DIR", str(data_dir))
                patch.setenv("HYDRA_FULL_ERROR", "1")
                patch.setattr(sys, "argv", ["metacv", "train", *quick(algo), f"hydra.run.dir={folder}"])
                with pytest.raises(SystemExit) as stop:
                    cli.main()
                assert stop.value.code == 0
        return folder

    return run


@pytest.fixture
def metacv(monkeypatch, tmp_path, data_dir, capsys):
    """The command line in this process, in an empty folder: metacv("train", "steps=2") -> (exit code, out, err)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METACV_DATA_DIR", str(data_dir))
    # They take most of the time of a short run; tests/test_pictures.py and tests/test_console.py draw them.
    monkeypatch.setattr("metacv.evaluate.write_details", lambda *_, **__: None)
    monkeypatch.setattr("metacv.curves.results_picture", lambda *_: b"")
    # Hydra composes the settings once more to read hydra.mode, which takes a tenth of the suite's time.
    monkeypatch.setattr("hydra._internal.hydra.Hydra.get_mode", lambda *_, **__: None)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["metacv", *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        logging.getLogger().handlers.clear()  # a sweep's handler writes to the captured stream, which is closed later
        code = stop.value.code
        return code if isinstance(code, int) else int(code is not None), captured.out, captured.err

    return run


def after_first_line(out: str) -> str:
    """What train prints after its first line, which repeats the command."""
    return re.sub(r"\Ametacv \S+: train.*\n", "", out)


@pytest.fixture
def may_be_at_chance(monkeypatch):
    """No warning of models that know nothing, for tests of something else."""
    for module in ("evaluate", "train"):
        monkeypatch.setattr(f"metacv.{module}.warn_at_chance", lambda *_: None)


def assert_same(one: Any, other: Any, place: str = "state") -> None:
    """Equal to the bit, and of the same types, through nested dicts, lists and tuples; but for seconds."""
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            if key != "seconds":
                assert_same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for i, (own, others) in enumerate(zip(one, other, strict=True)):
            assert_same(own, others, f"{place}[{i}]")
    elif isinstance(one, Tensor):
        assert torch.equal(one, other), place
    else:
        assert one == other, place


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# A glyph data set and a training run that are short enough for tests of everything around them.
SMALL = ("dataset.classes={train:30,val:8,test:8}", "backbone.channels=8", "query=5", "eval_episodes=8", "episodes=8")
TRAIN = (*SMALL, "steps=4", "eval_every=2", "log_every=1", "meta_batch=2")


def quick(algo: str) -> tuple[str, ...]:
    """TRAIN for an algorithm. Reptile's 50 inner steps in evaluation would take most of a test's time."""
    return (f"algo={algo}", *TRAIN, *(["algo.eval_inner_steps=3"] if algo == "reptile" else []))
