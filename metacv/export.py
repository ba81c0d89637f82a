"""`metacv export`: one file for other programs, with the network and, of a saved model, its classes."""

import copy
import json
import warnings
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from metacv import version
from metacv.algorithms.base import MetricMethod
from metacv.algorithms.heads.base import WithHead
from metacv.config import ExportConfig, PredictConfig
from metacv.errors import UserError
from metacv.files import user_path, write_bytes_atomically, written_or_refused
from metacv.predictor import Predictor, Support
from metacv.reliability import alone, with_own_copies
from metacv.text import first_line, setting

CLOSE = 1e-6  # of probabilities


class Exported(nn.Module):
    """Images [B, C, H, W] from 0 to 1 -> features [B, D], or the probabilities [B, N] of a linear layer on them.

    For fixed examples the logits of most heads are a linear function of the features, or of features of length 1, up
    to a number for each image that the softmax ignores: class means, ridge and logistic regression, an SVM.
    """

    def __init__(self, method: MetricMethod) -> None:
        super().__init__()
        self.method, self.normalized = method, False
        self.register_buffer("weight", None)  # [N, D]
        self.register_buffer("bias", None)  # [N]
        self.register_buffer("centre", None)  # [D], subtracted from features

    def forward(self, images: Tensor) -> Tensor:
        features = self.method.embed(images)
        return features.flatten(1) if self.weight is None else self.logits(features).softmax(-1)

    def logits(self, features: Tensor) -> Tensor:
        features = features - self.centre
        return F.linear(F.normalize(features, dim=-1) if self.normalized else features, self.weight, self.bias)

    def learn_from(self, predictor: Predictor, support: Support) -> None:
        """Set the linear layer to that of the model's head; UserError if its logits are no linear function."""
        method, centre = copy.deepcopy(self.method).double().eval(), torch.zeros(())
        if isinstance(method, WithHead) and method.classify.centred:
            centre = method.classify.centre
        features = predictor.with_features(support).features
        if features is None or features.dim() > 3:
            raise not_linear(method)
        tasks = support.task_of(features[:, 0].double(), features[:, 0].double())

        def logits(queries: Tensor) -> Tensor:
            task = support.task_of(features[:, 0].double(), queries)
            return method.head(with_own_copies(task, features.double().unsqueeze(0)))[0].double()

        with torch.no_grad():
            units = torch.eye(features.shape[-1], dtype=torch.float64)
            bias, rows, others = logits(centre + torch.cat([0 * units[:1], units, -units])).split(
                [1, *[len(units)] * 2]
            )
            bias, weight = bias[0] - bias.mean(), (rows - others).T / 2
            self.weight, self.bias, self.centre = weight - weight.mean(0), bias, centre.double()
            expected = method.probabilities(logits(tasks.query_x[0]))
            for self.normalized in (False, True):
                if (self.logits(tasks.query_x[0]).softmax(-1) - expected).abs().max() < CLOSE:
                    return
        raise not_linear(method)


def not_linear(method: MetricMethod) -> UserError:
    name = type(method.classify if isinstance(method, WithHead) else method).__name__
    return UserError(f"{name}: its labels are no linear function of features, as an exported file needs; set head=ncm")


def export(cfg: ExportConfig, folder: Path) -> None:
    """Write a checkpoint's network, or a saved model with its classes, to `cfg.file`."""
    if (cfg.checkpoint is None) == (cfg.adapted is None):
        raise UserError("give either checkpoint=RUN, for features, or adapted=FILE, for probabilities of its classes")
    path = user_path(cfg.file)
    if path.suffix != f".{cfg.format}":
        raise UserError(f"file={path}: must end with .{cfg.format}, as format={cfg.format}")
    predictor = Predictor.load(str(cfg.checkpoint or cfg.adapted), PredictConfig(head=cfg.head, device="cpu"))
    method = alone(predictor.algorithm, predictor.config.batch_norm, "export")
    model, about = Exported(method), {"metacv": version(), "normalization": "included"}
    if cfg.adapted:
        support = predictor.kept_support()
        model.learn_from(predictor, support)
        about["classes"] = json.dumps([str(name) for name in support.classes])
    model = model.float().eval()
    channels, height, width = predictor.checkpoint.image_shape
    about["images"] = f"[batch, {channels}, {height}, {width}], from 0 to 1"
    about["output"] = "probabilities" if cfg.adapted else "features"
    with suppress(UserError):  # of data sets that read no image files
        white = predictor.dataset.read(Image.new("L", (width, height), "white"))
        about["inverted"] = str(bool(white.float().mean() < 128)).lower()
    content = (as_onnx if cfg.format == "onnx" else as_safetensors)(model, (channels, height, width), about)
    with written_or_refused(path):
        write_bytes_atomically(path, content)
    names = f"{len(json.loads(about['classes']))} classes" if cfg.adapted else "features"
    print(f"written: {setting('file', path).partition('=')[2]} ({names}; images {about['images']})")


def as_onnx(model: Exported, image_shape: tuple[int, int, int], about: dict[str, str]) -> bytes:
    """Convert to ONNX with a dynamic batch size; `about` becomes its metadata."""
    needed("onnx"), needed("onnxscript")
    images = torch.zeros(2, *image_shape)
    batch = {"images": {0: torch.export.Dim("batch")}}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (images,),
                input_names=["images"],
                output_names=[about["output"]],
                dynamic_shapes=batch,
                dynamo=True,
                verbose=False,
            )
            if program is None:
                raise RuntimeError("no program")
            content = program.model_proto
    except Exception as error:  # the exporter raises errors of many types
        raise UserError(f"format=onnx: torch cannot export this network ({first_line(error)})") from error
    for key, value in about.items():
        content.metadata_props.add(key=key, value=value)
    found: bytes = content.SerializeToString()
    return found


def as_safetensors(model: Exported, image_shape: tuple[int, int, int], about: dict[str, str]) -> bytes:
    """Store the tensors of the network as `network.*`, and the linear layer as weight, bias and centre."""
    backbone = model.method.backbone
    tensors = {f"network.{name}": value for name, value in backbone.state_dict().items()}
    if backbone.mean is not None:
        tensors |= {"mean": backbone.mean, "std": backbone.std}
    if model.weight is not None:
        tensors |= {"weight": model.weight, "bias": model.bias, "centre": model.centre}
        about |= {"features": "of length 1" if model.normalized else "as they are"}
    about |= {"network": type(backbone).__name__, "normalization": "images - mean, divided by std, if there is a mean"}
    content: bytes = needed("safetensors.torch").save(
        {name: own.contiguous().clone() for name, own in tensors.items()}, about
    )
    return content


def needed(name: str) -> ModuleType:
    """Import a package of the extra `export`; UserError if it is missing."""
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UserError(f"{package} is not installed; pip install 'metacv[export]' installs it") from None
