"""Every method and backbone on a device other than the CPU: a fake device, whose tensors have no values.

There an operation on tensors of two devices fails, and so does one that needs a value on the host, for which a real GPU
would have to finish its work. Tensors on the CPU are real. The fake device is one of the whole process, which must have
it before its first backward pass, so a process of its own runs the steps, and returns the error of each, if any.
"""

import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import BACKBONES, Identity, SmoothNet, bank_of, each, random_tasks
from test_contracts import MODES, node_of, settings_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

from metacv import CONFIG_DIR, train
from metacv.algorithms.heads.base import Head, WithHead
from metacv.algorithms.metric.protonet import ProtoNet
from metacv.backbones.base import Backbone
from metacv.config import AugmentConfig, NormalizeConfig
from metacv.data import sampler
from metacv.data.sampler import EpisodeSampler, ImageSampler
from metacv.data.task import TaskBatch
from metacv.data.transforms import Augment
from metacv.distributed import Ranks
from metacv.episodes import evaluate_episodes
from metacv.evaluate import centre
from metacv.model import build_dataset, build_node, with_head
from metacv.precision import Compiled
from metacv.predictor import Support, label

SETUP = "_setup_privateuseone_for_python_backend"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(backend_registration, SETUP), reason="this torch has no fake devices"),
]
HEADS = sorted(path.stem for path in (CONFIG_DIR / "head").glob("*.yaml"))
GPU = torch.device("privateuseone", 0)  # whose name is gpu after `start`
# Settings of a method that lead to other operations than those of its YAML.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "FOMAML, task by task": ("maml", {"algo.first_order": True, "algo.task_batching": "loop"}),
    "MAML, steps computed again": ("maml", {"algo.gradient_checkpointing": True}),
    "Reptile, SGD": ("reptile", {"algo.inner_optimizer": "sgd"}),
    "Reptile, fresh moments": ("reptile", {"algo.reset_moments": True}),
    "Relation Networks, vectors": ("relationnet", {"algo.relation": "mlp"}),
    "classifier, angles": ("classifier", {"algo.rotations": True, "algo.cosine": True, "head.augment": 2}),
}
FEW_STEPS = {"algo.inner_steps": 1, "algo.eval_inner_steps": 1, "head.steps": 2}


class FakeDevice(FakeTensorMode):
    """Tensors on GPU have no values, those on the CPU are real."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.in_step = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """A training step, which also must not wait in ways that need no value."""
        self.in_step = True
        yield
        self.in_step = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        real = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]
        if len(real) == len(tensors) and kwargs.get("device") != GPU:
            return func(*args, **kwargs)
        if real:
            args, kwargs = tree_map_only(Tensor, self.fake, (args, kwargs))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.in_step:
            from_gpu = any(tensor.device == GPU for tensor in tensors)
            to_host = any(value.device != GPU for value in tree_leaves(result) if isinstance(value, Tensor))
            if (from_gpu and to_host) or func == torch.ops.aten._linalg_check_errors.default:
                raise RuntimeError(f"{func} copies to the CPU in a step")
            if any(tensor.dim() for tensor in real) and not kwargs.get("non_blocking"):
                raise RuntimeError(f"{func} waits for a copy from the CPU in a step")
        return result

    def fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.from_tensor(tensor)


# In the process with the fake device


def start() -> None:
    torch.set_num_threads(1)
    module: Any = backend_registration._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]  # asked for by autocast, also where it is disabled
    module.get_rng_state = module.set_rng_state = lambda *_: None
    getattr(backend_registration, SETUP)("gpu", module)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # real ones become fake ones


def error_of(function: Callable[..., None], *arguments: Any) -> str:
    try:
        function(*arguments)
    except Exception:
        return traceback.format_exc()
    return ""


def not_captured(compiled: Compiled, _: object) -> Callable[..., Sequence[Tensor]]:
    """What a CUDA graph computes."""
    return lambda *inputs: torch.enable_grad()(compiled.function)(*inputs)


def run_method(name: str, data_dir: Path, changes: dict[str, Any], settings: dict[str, Any]) -> None:
    """Training steps, validation in the method's own mode of batch norm, and prediction in the other one."""
    config = settings_of(name, data_dir)
    for key, value in (FEW_STEPS | changes).items():
        group, own = key.split(".")
        if own in getattr(config, group):
            config = replace(config, **{group: getattr(config, group) | {own: value}})
    more = {"augment": AugmentConfig(1, True, 0.1), "normalize": NormalizeConfig([0.5], [0.5]), "clip_norm": 1.0}
    config = replace(config, **more, eval_episodes=2, **settings)
    dataset = build_dataset(config.dataset, config.data_dir)
    banks = {split: dataset.load(split) for split in ("train", "val")}  # no file can be read below
    with (
        FakeDevice() as device,
        patch.object(train, "pick_device", lambda _: GPU),
        patch.object(train, "build_dataset", lambda *_: dataset),
        patch.object(dataset, "load", banks.get),
        patch.object(Compiled, "_captured", not_captured),
        patch.object(train, "flops_of_a_step", lambda *_: 0.0),  # takes long, and is tested below
    ):
        run, validation = train.prepare(config, [], Ranks())
        for _ in range(1 + config.compile):
            with device.step():
                scalars = train.training_step(run, Ranks()) if run.optimizer else {}
            assert all(value.device == GPU for key, value in scalars.items() if key != "lr")
        assert all(value.device == GPU for value in run.algorithm.state_dict().values())
        tested, images = with_head(run.tested, config), run.sampler.bank.images
        if isinstance(tested, WithHead) and tested.needs_centre:
            centre(tested, run.sampler.bank, GPU)
        evaluate_episodes(tested, validation, config.batch_norm)
        (other,) = {*MODES} - {config.batch_norm}
        label(tested, Support(images[:3], (1, 2), ("a", "b")), images[3:5], other, GPU)


def on_gpu(tasks: TaskBatch) -> TaskBatch:
    return replace(tasks, **{key: value.to(GPU) for key, value in vars(tasks).items() if isinstance(value, Tensor)})


def run_backbone(name: str) -> None:
    with FakeDevice() as device:
        node = node_of("backbone", name, drop_block=0.1)
        backbone = build_node("backbone", node, Backbone, image_shape=(3, 84, 84)).to(GPU)
        images = torch.rand(2, 3, 84, 84).to(GPU)
        with device.step():
            backbone.features(images).sum().backward()
            backbone.eval().features(images)


def run_head(name: str) -> None:
    with FakeDevice():
        head = build_node("head", node_of("head", name, steps=2), Head).to(GPU)
        head(on_gpu(random_tasks(shape=(5,))))


def run_samplers(on_device: int) -> None:
    """Colour images that are on the device, or stay on the CPU because they are many. Also the count of operations."""
    bank, augment = bank_of([20] * 12, shape=(3, 6, 6)), Augment(1, True, 0.1)
    with FakeDevice() as device, patch.object(sampler, "ON_DEVICE", on_device):
        episodes = EpisodeSampler(bank, 5, 2, 3, "as_classes", device=GPU, augment=augment)
        images = ImageSampler(bank, "as_classes", 0, GPU, augment)
        with device.step():
            batches = episodes.sample(2), images.sample(2)
        assert all(t.device == GPU for own in batches for key, t in vars(own).items() if key not in ("way", "seeds"))
        train.flops_of_a_step(ProtoNet(SmoothNet((3, 6, 6))).to(GPU), episodes, 2, Ranks())


FAULTS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "item": (lambda logits: logits.max().item(), "_local_scalar_dense"),
    "if": (lambda logits: 1 if logits.sum() > 0 else 2, "_local_scalar_dense"),
    "rows by a mask": (lambda logits: logits[logits > 0], "nonzero"),
    "copy to the CPU": (lambda logits: logits.cpu(), "copies to the CPU in a step"),
    "errors of a solver": (lambda logits: torch.linalg.solve(logits.mT @ logits, logits.mT), "copies to the CPU"),
    "tensor on the CPU": (lambda logits: logits + torch.ones(logits.shape), "same device"),
    "copy that waits": (lambda logits: torch.ones(logits.shape).to(logits), "waits for a copy"),
    "new tensor": (lambda logits: logits.new_tensor([1.0, 2.0, 3.0]), "waits for a copy"),
    "index on the CPU": (lambda logits: logits[:, torch.arange(2)], "waits for a copy"),
}


class Faulty(ProtoNet):
    fault = ""

    def head(self, tasks: TaskBatch) -> Tensor:
        logits = super().head(tasks)
        if self.fault:
            FAULTS[self.fault][0](logits)
        return logits


def run_fault(fault: str) -> None:
    with FakeDevice() as device:
        algorithm, tasks = Faulty(Identity((1, 6, 6)), learn_temperature=True).to(GPU), on_gpu(random_tasks())
        algorithm.fault = fault
        with device.step():
            algorithm.training_step(tasks)


# In the process of the tests


@pytest.fixture(scope="module")
def error_on_gpu() -> Iterator[Callable[..., str]]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start) as process:
        yield lambda *arguments: process.submit(error_of, *arguments).result()


@pytest.mark.parametrize("name", each("r2d2", "dn4"))
def test_a_method_trains_and_predicts_on_its_device_without_waiting(name, error_on_gpu, data_dir):
    assert error_on_gpu(run_method, name, data_dir, {}, {}) == ""


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_a_method_run_on_their_device_without_waiting(name, error_on_gpu, data_dir):
    algo, changes = VARIANTS[name]
    assert error_on_gpu(run_method, algo, data_dir, changes, {}) == ""


@pytest.mark.parametrize("name", ["classifier", "protonet", "reptile", "maml"])
def test_compiled_steps_and_averaged_weights_run_on_their_device_without_waiting(name, error_on_gpu, data_dir):
    assert error_on_gpu(run_method, name, data_dir, {}, {"compile": True, "ema": 0.9}) == ""


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_computes_on_its_device_without_waiting(name, error_on_gpu):
    assert error_on_gpu(run_backbone, name) == ""


@pytest.mark.parametrize("name", [name for name in HEADS if name != "svm"])  # scikit-learn's, on the CPU
def test_a_head_computes_on_its_device_without_waiting(name, error_on_gpu):
    assert error_on_gpu(run_head, name) == ""


@pytest.mark.parametrize("on_device", [2**32, 0])
def test_sampled_batches_are_copied_to_the_device_without_waiting(on_device, error_on_gpu):
    assert error_on_gpu(run_samplers, on_device) == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_waits_or_mixes_devices_fails(fault, error_on_gpu):
    assert error_on_gpu(run_fault, "") == ""
    assert FAULTS[fault][1] in error_on_gpu(run_fault, fault)
