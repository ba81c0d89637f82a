"""Files made to hang the program or to fill its memory: each is refused in one line that names it."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import bounded, resumed_run
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from metacv import limits
from metacv.config import ReportConfig
from metacv.data.bank import SPLITS, ImageBank, cached_bank
from metacv.data.image_files import open_exactly, open_image
from metacv.data.image_folder import ImageFolder
from metacv.data.miniimagenet import MiniImageNet
from metacv.data.omniglot import Omniglot
from metacv.data.sources import listed_files, read_as, unpack
from metacv.distributed import Ranks
from metacv.errors import UserError
from metacv.features import read_features
from metacv.files import copy_atomically
from metacv.logger import Logger
from metacv.model import load_checkpoint, save_checkpoint
from metacv.pickles import check_extent
from metacv.predictor import kept_support
from metacv.report import report
from metacv.report.figures import sample_episode
from metacv.results import read_results
from metacv.run import load_state, resumed
from metacv.train import prepare, training_step

SECONDS = 30
BILLION = 2 * 10**9
FRACTIONS, COUNTS = dict.fromkeys(SPLITS, 1.0), dict.fromkeys(SPLITS, 1)


def png() -> bytes:
    content = io.BytesIO()
    Image.new("L", (28, 28)).save(content, "png")
    return content.getvalue()


PNG = png()


@pytest.fixture(autouse=True)
def little_memory_and_time() -> Iterator[None]:
    with bounded(SECONDS):
        yield


def refusal(call: Callable[[], object], path: Path) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 1000
    return message


# Zip files: checkpoints and caches


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as zipped:
        return {name: zipped.read(name) for name in zipped.namelist()}


def write_zip(path: Path, entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as zipped:
        for name, content in entries:
            zipped.writestr(name, content)
    end_as_torch(path)


def end_as_torch(path: Path) -> None:
    """Replace the end of a zip file by that of torch.save, whose numbers have 64 bits."""
    content = path.read_bytes()
    body, end = content[:-22], content[-22:]
    count, length, start = struct.unpack("<10xHII2x", end)
    wide = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
    path.write_bytes(body + wide + struct.pack("<4sIQI", b"PK\6\7", 0, len(body), 1) + end)


def compressed_tensor(path: Path) -> None:
    content = load_checkpoint(path).content
    torch.save(content | {"algorithm": {"w": torch.zeros(2**24)}}, path)
    write_zip(path, [*entries_of(path).items()], zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20


def compressed_pickle(path: Path) -> None:
    entries = entries_of(path)
    entries = {name: content + bytes(2**26) * name.endswith("data.pkl") for name, content in entries.items()}
    write_zip(path, [*entries.items()], zipfile.ZIP_DEFLATED)


def lzma_compressed_tensor(path: Path) -> None:
    write_zip(path, [*entries_of(path).items(), ("archive/data/99", bytes(2**24))], zipfile.ZIP_LZMA)


def overlapping_entries(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("archive/data/0", bytes(2**20))
        (info,) = zipped.infolist()
        for i in range(1000):
            copy = zipfile.ZipInfo(f"archive/data/{i}")
            for name in ("header_offset", "CRC", "file_size", "compress_size", "compress_type"):
                setattr(copy, name, getattr(info, name))
            zipped.filelist.append(copy)
    end_as_torch(path)


def names_that_differ_in_case(path: Path) -> None:
    entries = entries_of(path)
    write_zip(path, [*entries.items(), ("archive/DATA.PKL", entries["archive/data.pkl"])])


def another_list_of_entries(path: Path) -> None:
    """Python looks for the zip directory just before the end record, torch where the end record points."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, len(content) - 98 + 48, 0)
    path.write_bytes(content)


def end_elsewhere(path: Path) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, len(content) - 42 + 8, 0)
    path.write_bytes(content)


def storage_that_claims_more_than_it_has(path: Path) -> None:
    save_checkpoint(path, load_checkpoint(path).content | {"algorithm": {"w": torch.zeros(12345)}})
    entries = entries_of(path)
    own = entries["archive/data.pkl"]
    assert own.count(struct.pack("<BH", ord("M"), 12345)) == 2  # of the storage, and of the tensor
    claimed = own.replace(struct.pack("<BH", ord("M"), 12345), struct.pack("<BI", ord("J"), BILLION))
    write_zip(path, [*(entries | {"archive/data.pkl": claimed}).items()])


def large_tensor_of_one_number(path: Path) -> None:
    one = torch.zeros(1).expand(BILLION)
    torch.save(load_checkpoint(path).content | {"centre": one}, path)


def with_pickle(*parts: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        entries = entries_of(path) | {"archive/data.pkl": b"\x80\x02" + b"".join(parts) + b"."}
        write_zip(path, [*entries.items()])

    return write


def nested_tuples(levels: int) -> bytes:
    """Pickle steps for (x, x) where x is such a pair of the level below: its hash takes 2**levels steps."""
    return b"K\x01q\x00" + b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(levels))


HOSTILE_ZIPS: dict[str, tuple[Callable[[Path], None], str]] = {
    "tensor that inflates": (compressed_tensor, "its parts are compressed, or overlap"),
    "pickle that inflates": (compressed_pickle, "its parts are compressed, or overlap"),
    "tensor that inflates, by LZMA": (lzma_compressed_tensor, "its parts are compressed, or overlap"),
    "entries that overlap": (overlapping_entries, "its parts are compressed, or overlap"),
    "names that differ in case": (names_that_differ_in_case, "two of its parts have the same name"),
    "another list of entries": (another_list_of_entries, "it does not end as torch.save ends it"),
    "end elsewhere": (end_elsewhere, "it does not end as torch.save ends it"),
    "storage of 2 billion numbers": (storage_that_claims_more_than_it_has, "the storage 0 has 49380 bytes"),
    "tensor of 2 billion numbers": (large_tensor_of_one_number, "has only 1 numbers"),
    "bytearray of 2 GB": (with_pickle(b"cbuiltins\nbytearray\nJ", struct.pack("<I", BILLION), b"\x85R"), "bytearray"),
    "key of nested tuples": (with_pickle(b"}", nested_tuples(40), b"K\x01s"), "neither text nor a whole number"),
    "lists in a list many times": (
        with_pickle(b"]q\x00", *(b"]q%c(h%ch%ch%ce" % (i + 1, i, i, i) for i in range(40))),
        "nested more than",
    ),
    "list in itself": (with_pickle(b"]q\x00h\x00a"), "nested more than"),
    "long pickle": (with_pickle(bytes(5_000_000)), "its pickle is larger than"),
    "long text many times": (
        with_pickle(b"X", struct.pack("<I", 10**6), b"a" * 10**6, b"q\x00", b"](", b"h\x00" * 10_000, b"e"),
        "its values are more than",
    ),
}


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    """A copy of a small checkpoint, in the working folder of the test."""
    return Path(shutil.copy(trained("protonet") / "best.pt", tmp_path / "hostile.pt"))


@pytest.mark.parametrize("name", HOSTILE_ZIPS)
def test_a_hostile_zip_is_refused_as_checkpoint(checkpoint, monkeypatch, name):
    monkeypatch.setattr(limits, "VALUES", 10**5)
    write, words = HOSTILE_ZIPS[name]
    write(checkpoint)
    assert words in refusal(lambda: load_checkpoint(checkpoint), checkpoint)


@pytest.mark.parametrize("name", HOSTILE_ZIPS)
def test_a_hostile_cache_is_replaced(checkpoint, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(limits, "VALUES", 10**5)
    bank = ImageBank("toy", torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 2]), ("a", "b"))
    cached_bank(tmp_path, "toy", {}, lambda: bank)
    (path,) = (tmp_path / "cache").iterdir()
    HOSTILE_ZIPS[name][0](checkpoint)
    shutil.copy(checkpoint, path)
    capsys.readouterr()
    assert cached_bank(tmp_path, "toy", {}, lambda: bank).images.shape == (2, 1, 4, 4)
    assert f"{path} cannot be read" in capsys.readouterr().err
    cached_bank(tmp_path, "toy", {}, lambda: pytest.fail("the new cache is not read"))


# Settings in checkpoints


def change(path: Path, *places: str, **values: Any) -> None:
    """Set values in nested dicts of a checkpoint, such as the `channels` of config, backbone."""
    content = load_checkpoint(path).content
    inner = content
    for place in places:
        inner = inner[place]
    inner |= values
    save_checkpoint(path, content)


@pytest.mark.parametrize(
    ("places", "values", "words"),
    [
        (("config",), {"episodes": BILLION}, "episodes=2000000000 is above"),
        (("config", "backbone"), {"channels": BILLION}, "channels=2000000000 is above"),
        (("config", "dataset"), {"images": BILLION}, "images=2000000000 is above"),
        (("config", "dataset", "classes"), {"test": BILLION}, "test=2000000000 is above"),
        (("config", "algo"), {"eval_inner_steps": BILLION}, "eval_inner_steps=2000000000 is above"),
        (("config",), {"head": {"augment": [1, BILLION]}}, "augment=2000000000 is above"),
        ((), {"image_shape": [3, 10**6, 10**6]}, "image_shape is [3, 1000000, 1000000]"),
        ((), {"image_shape": [BILLION, 1, 1]}, "image_shape is"),
        ((), {"image_shape": [-1, -(2**40), 1]}, "damaged"),
        (("config", "normalize"), {"mean": [0.5] * 10**5}, "its values are more than"),
        (("config", "dataset"), {"root": "x" * 10**5}, "its values are more than"),
        (("config",), {"paper": [{}] * 10**4}, "its values are more than"),
    ],
)
def test_settings_of_absurd_size_are_refused(checkpoint, places, values, words):
    change(checkpoint, *places, **values)
    assert words in refusal(lambda: load_checkpoint(checkpoint), checkpoint)


@pytest.mark.parametrize(
    "values", [{"channels": 10**6}, {"channels": 20_000}, {"_target_": "metacv.backbones.resnet18.ResNet18"}]
)
def test_a_network_larger_than_the_weights_is_not_built(checkpoint, values):
    change(checkpoint, "config", "backbone", **values)
    with pytest.raises(UserError):
        load_checkpoint(checkpoint).build()


def test_a_network_for_large_images_is_built_without_a_pass_through_it(checkpoint):
    change(checkpoint, image_shape=[1, 8192, 8192])
    assert load_checkpoint(checkpoint).build().embedding.features_dim == 8 * 512 * 512


def bomb(start: str) -> list[str]:
    """Settings of 2 kB that are 10 * 3**30 letters long when `${...}` is followed."""
    return [f"+{start}0=xxxxxxxxxx", *(f"+{start}{i}=" + f"${{{start}{i - 1}}}" * 3 for i in range(1, 30))]


def test_interpolations_in_a_checkpoint_are_text(checkpoint, metacv):
    names = {f"a{i}": "${dataset.a" + str(i - 1) + "}" * 3 for i in range(1, 30)} | {"a0": "x"}
    change(checkpoint, "config", "dataset", **names)
    assert load_checkpoint(checkpoint).config.dataset["a1"].startswith("${dataset.a0}")
    code, _, err = metacv("evaluate", f"checkpoint={checkpoint}")
    assert (code, err) == (1, f"metacv: {checkpoint}: dataset.a1: Glyphs has no such setting\n")


@pytest.mark.parametrize("words", [bomb("dataset.a"), bomb("x"), ["+dataset.root=${oc.env:HOME}"]])
def test_interpolations_in_the_words_of_a_run_are_not_followed(trained, tmp_path, words):
    change(Path(shutil.copy(trained("protonet") / "last.pt", tmp_path / "last.pt")), overrides=words)
    source = load_state(tmp_path / "last.pt")
    assert "is not one of its settings" in refusal(lambda: resumed(source, []), tmp_path / "last.pt")


@pytest.mark.parametrize("words", [[f"+dataset.a{i}=1" for i in range(100_000)], ["dataset.root=" + "[" * 10**6]])
def test_a_run_does_not_resume_from_endless_settings(trained, tmp_path, words):
    change(Path(shutil.copy(trained("protonet") / "last.pt", tmp_path / "last.pt")), overrides=words)
    assert "its values are more than 4000" in refusal(lambda: load_state(tmp_path / "last.pt"), tmp_path / "last.pt")


def test_interpolations_of_the_original_command_keep_their_value(trained, tmp_path, metacv):
    shutil.copytree(trained("protonet"), tmp_path / "run")
    change(
        tmp_path / "run/last.pt",
        overrides=[*load_checkpoint(tmp_path / "run/last.pt").content["overrides"], "shot=${seed}"],
    )
    change(tmp_path / "run/last.pt", "config", seed=1)
    err = metacv("train", "resume=run", "seed=2")[2]
    assert "seed is 2" in err
    assert "shot" not in err


def test_a_kept_support_set_of_10_001_classes_is_refused(checkpoint, metacv):
    images = torch.zeros(10_001, 1, 1, 1, dtype=torch.uint8)
    kept = {"images": images, "shots": [1] * len(images), "classes": [str(i) for i in range(len(images))]}
    save_checkpoint(checkpoint, load_checkpoint(checkpoint).content | {"support": kept})
    Path("a.png").write_bytes(PNG)
    code, _, err = metacv("predict", f"adapted={checkpoint}", "query=a.png")
    assert code == 1
    assert err.endswith(f"adapted={checkpoint} has 10001 classes, above 10000\n")


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # of torch
@pytest.mark.parametrize("number", [float("inf"), float("nan"), 2**70, "x", None])
def test_a_kept_support_set_with_an_impossible_number_of_images_is_refused(checkpoint, number):
    kept = {"images": torch.zeros(2, 1, 28, 28, dtype=torch.uint8), "shots": [1, 1], "classes": ["a", "b"]}
    content = load_checkpoint(checkpoint).content
    save_checkpoint(checkpoint, content | {"support": kept})
    assert kept_support(load_checkpoint(checkpoint)).shots == (1, 1)
    save_checkpoint(checkpoint, content | {"support": kept | {"shots": [number, 1]}})
    assert "is damaged" in refusal(lambda: kept_support(load_checkpoint(checkpoint)), checkpoint)
    save_checkpoint(checkpoint, content | {"support": torch.zeros(1)})
    assert "is damaged" in refusal(lambda: kept_support(load_checkpoint(checkpoint)), checkpoint)


# Devices, pipes and large files in place of files


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [endless, pipe])
@pytest.mark.parametrize(
    "read",
    [
        load_checkpoint,
        read_results,
        read_features,
        lambda path: read_as("Toy", path, lambda content: content),
        lambda path: listed_files(path, path.parent),
        unpack,
        open_image,
        lambda path: open_exactly(path, ("PNG",), "RGB"),
    ],
    ids=["checkpoint", "result", "features", "pickle", "list", "archive", "image", "own image"],
)
def test_only_regular_files_are_read(tmp_path, make, read):
    for name in ("odd.zip", "odd.tar"):
        make(tmp_path / name)
        assert "is not a regular file" in refusal(lambda: read(tmp_path / name), tmp_path / name)  # noqa: B023


@pytest.mark.parametrize("make", [endless, pipe])
def test_split_files_are_regular_files(tmp_path, make):
    make(tmp_path / "odd")
    (tmp_path / "photos/a").mkdir(parents=True)
    data = ImageFolder(tmp_path, str(tmp_path / "photos"), 28, True, "crop", False, FRACTIONS, 0, str(tmp_path / "odd"))
    assert "is not a regular file" in refusal(data.splits, tmp_path / "odd")
    omniglot = Omniglot(
        tmp_path, 28, "lanczos", True, "file", [], COUNTS, 0, str(tmp_path), dict.fromkeys(SPLITS, "odd")
    )
    assert "is not a regular file" in refusal(lambda: omniglot._split_classes(()), tmp_path / "odd")


@pytest.mark.parametrize(
    "words", [("evaluate", "checkpoint=odd"), ("evaluate", "features=odd"), ("predict", "adapted=odd", "query=a.png")]
)
def test_a_device_in_place_of_a_file_has_one_line(metacv, words):
    endless(Path("odd"))
    code, _, err = metacv(*words)
    assert code == 1
    assert err.endswith("odd is not a regular file)\n" if "features=odd" in words else "odd is not a regular file\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("make", [endless, pipe])
@pytest.mark.parametrize(
    "name", ["best.pt", "result.json", "metrics.jsonl", ".hydra/overrides.yaml", "events.out.tfevents.1", "x.tfevents"]
)
def test_a_report_reads_regular_files_only(trained, tmp_path, monkeypatch, capsys, make, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained("protonet"), "runs/a")
    shutil.copytree("runs/a", "runs/b")
    (tmp_path / "runs/b" / name).unlink(missing_ok=True)
    if name == ".hydra/overrides.yaml":
        (tmp_path / "runs/b/result.json").unlink()
    make(tmp_path / "runs/b" / name)
    assert len(report(ReportConfig(["runs"]), Path("out"))) == (1 if name == "best.pt" else 2)
    if name == "best.pt" or "tfevents" in name:
        assert f"{name} is not a regular file" in capsys.readouterr().err


def test_a_log_that_is_no_file_is_not_copied_into_a_resumed_run(trained, tmp_path, metacv):
    shutil.copytree(trained("protonet"), tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").unlink()
    endless(tmp_path / "run/metrics.jsonl")
    assert metacv("train", "resume=run/last.pt", "hydra.run.dir=other")[0] == 0


def test_a_run_does_not_resume_in_a_folder_whose_log_is_a_pipe(trained, tmp_path, metacv):
    shutil.copytree(trained("protonet"), tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").unlink()
    pipe(tmp_path / "run/metrics.jsonl")
    code, _, err = metacv("train", "resume=true", "hydra.run.dir=run", "steps=6")
    assert (code, err.splitlines()[-1]) == (1, "metacv: run/metrics.jsonl is not a regular file")


def test_a_resumed_log_keeps_the_lines_that_have_numbers_alone(tmp_path):
    good = ['{"step": 1, "train/loss": 1.5}', '{"step": 2, "val/accuracy": NaN}', '{"step": 2, "\\ud800": 1}']
    bad = [
        "[1]",
        '{"step": 1, "val/accuracy": "x"}',
        '{"step": 1, "val/accuracy": [1]}',
        '{"step": -1}',
        '{"step": NaN}',
    ]
    bad += [
        '{"step": 1, "x": 1%s}' % ("0" * 400),
        "[" * 10**5,
        '{"step": {}}',
        '{"step": -1%s}' % ("0" * 30),
        '{"step": 3}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*bad, *good, *bad]))
    Logger(tmp_path, 2, 2).__exit__(None)
    Logger(tmp_path, 2, -1).__exit__(None)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == good[:1]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*bad, *good, *bad]))
    Logger(tmp_path, 2, 2).__exit__(None)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == good


def test_a_file_is_copied_without_all_of_it_in_memory(tmp_path):
    (tmp_path / "a").touch()
    os.truncate(tmp_path / "a", 2**27)
    with bounded(30, room=2**25):
        copy_atomically(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").stat().st_size == 2**27


@pytest.mark.slow
@pytest.mark.parametrize(
    ("places", "values"),
    [
        (("optimizer", "state", 0), {"exp_avg": [[]]}),
        (("optimizer", "state", 0), {"exp_avg": torch.zeros(1, 2)}),
        (("optimizer",), {"param_groups": torch.zeros(1)}),
        (("schedule",), {"step_size": 0}),
        (("schedule",), {"step": None}),
        ((), {"since_best": float("inf")}),
        ((), {"validated": 2**63}),
        ((), {"validated": 5}),
        ((), {"validated": -2}),
        ((), {"seconds": float("nan")}),
        ((), {"best": {"accuracy": 0.5}, "window": {"loss": torch.zeros(2, 2)}}),
        ((), {"best": {"accuracy": 0.5, "step": 4}}),
        ((), {"best": {"accuracy": 0.5, "ci95": "x", "step": 4}}),
        ((), {"best": {"accuracy": 0.5, "ci95": 0.1, "step": 4, "way": 5}}),
        ((), {"hardware": 3}),
        ((), {"hardware": "a\x1b[2J"}),
        ((), {"hardware": 1001 * "x"}),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # of torch, about param_groups
def test_an_invalid_training_state_is_refused(trained, tmp_path, data_dir, places, values):
    last = Path(shutil.copy(trained("protonet") / "last.pt", tmp_path / "last.pt"))
    assert resumed_run(last, data_dir).step == 4
    change(last, *places, **values)
    line = refusal(lambda: resumed_run(last, data_dir), last)
    assert line.startswith((f"{last}: its state does not fit its config (", f"{last} is damaged"))


def test_a_state_is_continued_where_only_the_last_validation_is_left(trained, tmp_path, data_dir):
    last = Path(shutil.copy(trained("protonet") / "last.pt", tmp_path / "last.pt"))
    one_cycle = {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.1, "total_steps": 6}
    change(last, "config", schedule=one_cycle)
    config = replace(load_checkpoint(last).config, steps=6, data_dir=str(data_dir))
    run, _ = prepare(config, [], Ranks())
    for _ in range(6):
        training_step(run, Ranks())
    save_checkpoint(last, run.state())
    assert resumed_run(last, data_dir).validation_due


def test_a_state_with_scalars_of_another_method_is_refused(trained, tmp_path, metacv):
    shutil.copytree(trained("protonet"), tmp_path / "run")
    change(tmp_path / "run/last.pt", window={"other": torch.zeros(1)})
    code, _, err = metacv("train", "resume=true", "hydra.run.dir=run", "steps=6")
    assert code == 1
    assert err.splitlines()[-1].startswith("metacv: resume: the last steps had other, not loss")


@pytest.mark.parametrize(
    "read",
    [read_results, lambda path: listed_files(path, path.parent), lambda path: Logger(path.parent, 1, 1)],
    ids=["result", "list of images", "log of a run"],
)
def test_a_text_of_many_megabytes_is_not_read(tmp_path, read):
    path = tmp_path / "metrics.jsonl"
    path.touch()
    os.truncate(path, 2**36)
    assert "is larger than" in refusal(lambda: read(path), path)


# Pickles and archives


def memo_of(number: int) -> bytes:
    return b"\x80\x02]r" + struct.pack("<I", number) + b"."


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (memo_of(2**28), "not a list of classes"),
        (memo_of(2**31), "not a list of classes"),
        (b"\x80\x02}" + nested_tuples(40) + b"K\x01s.", "it has a key that is neither text nor a whole number"),
        (b"\x80\x02}(" + nested_tuples(40) + b"K\x01u.", "it has a key that is neither text nor a whole number"),
        (b"\x80\x02(" + nested_tuples(40) + b"K\x01d.", "it has a key that is neither text nor a whole number"),
        (b"\x80\x04\x8f(" + nested_tuples(40) + b"\x90.", "it has the opcode EMPTY_SET"),
        (b"\x80\x04(" + nested_tuples(40) + b"\x91.", "it has the opcode FROZENSET"),
        (b"\x80\x02cnumpy\ndtype\n" + nested_tuples(40) + b"\x85R.", "a dtype has the name tuple"),
        (b"\x80\x02cnumpy\nndarray\n)R(K\x01" + nested_tuples(40) + b"U\x02u1\x89U\0tb.", "no type or no shape"),
        (b"\x80\x02cnumpy\ndtype\n}U\x01aK\x01sb.", "it changes an object"),
        (b"\x80\x02\x8b" + struct.pack("<I", 2**30) + b"\x01.", "it has the opcode LONG4"),
        (b"\x80\x02X" + struct.pack("<I", 2**31 + 2**30) + b"a.", "is not a pickle of Toy"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"a.", "is not a pickle of Toy"),
    ],
)
def test_a_hostile_pickle_is_refused(tmp_path, content, words):
    path = tmp_path / "odd.pickle"
    path.write_bytes(content)

    def read(content: Any) -> None:
        raise ValueError("not a list of classes")

    assert words in refusal(lambda: read_as("Toy", path, read), path)


def test_a_pickle_of_endless_steps_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "STEPS", 1000)
    (tmp_path / "odd.pickle").write_bytes(b"\x80\x02" + b"}" * 2000 + b".")
    words = refusal(lambda: read_as("Toy", tmp_path / "odd.pickle", list), tmp_path / "odd.pickle")
    assert "it has more than 1000 steps" in words


@pytest.mark.parametrize("classes", [1000, 64])
def test_a_miniimagenet_pickle_whose_classes_share_one_list_is_refused(tmp_path, classes):
    rows = [0] * 1_000_000
    content = {"image_data": np.zeros((1, 84, 84, 3), np.uint8), "class_dict": {f"n{i}": rows for i in range(classes)}}
    path = tmp_path / "mini-imagenet-cache-train.pkl"
    path.write_bytes(pickle.dumps(content))
    data = MiniImageNet(tmp_path, resize=False)
    assert "its class_dict is too large" in refusal(lambda: data.load("train"), path)


def tar_header(size: int, kind: bytes) -> bytes:
    info = tarfile.TarInfo("a.png")
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def sparse_tar(path: Path) -> None:
    """A sparse member of 1 TB with one byte in the archive."""
    header = bytearray(tar_header(512, tarfile.GNUTYPE_SPARSE))
    header[386:398], header[398:410] = b"%011o\0" % 0, b"%011o\0" % 1
    header[483:495] = b"\x80" + bytes(3) + struct.pack(">Q", 2**40)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + bytes(1536))


def packed(compress: Callable[[bytes], bytes], start: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(compress(start + bytes(LARGE)))


def zip_of(method: int) -> Callable[[Path], None]:
    return lambda path: write_zip(path, [("a.png", bytes(LARGE))], method)


LARGE = 2**24


@pytest.fixture
def little_room(monkeypatch) -> None:
    monkeypatch.setattr(limits, "SMALL", 2**20)


BOMBS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "sparse member": ("a.tar", sparse_tar),
    "large member": ("a.tgz", packed(gzip.compress, tar_header(LARGE, tarfile.REGTYPE))),
    "large member of bzip2": ("a.tbz", packed(bz2.compress, tar_header(LARGE, tarfile.REGTYPE))),
    "large member of xz": ("a.txz", packed(lzma.compress, tar_header(LARGE, tarfile.REGTYPE))),
    "large header": ("a.tgz", packed(gzip.compress, tar_header(LARGE, tarfile.XHDTYPE))),
    "long name": ("a.tgz", packed(gzip.compress, tar_header(LARGE, tarfile.GNUTYPE_LONGNAME))),
    "member that is skipped": ("a.tgz", packed(gzip.compress, tar_header(LARGE, b"Z"))),
    "zeros at the end": ("a.tgz", packed(gzip.compress, b"")),
    "zip that inflates": ("a.zip", zip_of(zipfile.ZIP_DEFLATED)),
    "zip of bzip2": ("a.zip", zip_of(zipfile.ZIP_BZIP2)),
    "zip of LZMA": ("a.zip", zip_of(zipfile.ZIP_LZMA)),
    "zip of entries that overlap": ("a.zip", overlapping_entries),
}


@pytest.mark.parametrize("name", BOMBS)
def test_an_archive_that_grows_is_not_unpacked(tmp_path, little_room, name):
    file, make = BOMBS[name]
    make(tmp_path / file)
    assert "it would unpack to more than 20 times its size" in refusal(lambda: unpack(tmp_path / file), tmp_path / file)
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_features_that_inflate_are_refused(tmp_path, little_room):
    path = tmp_path / "features.npz"
    np.savez_compressed(path, features=np.zeros((LARGE // 4, 1), np.float32), labels=np.zeros(LARGE // 4, np.uint8))
    assert "it would unpack to more than 20 times its size" in refusal(lambda: read_features(path), path)


# Results and reports


@pytest.fixture
def run(trained, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained("protonet"), "runs/a"))


def test_numbers_in_the_billions_in_a_result_do_not_slow_a_report(run):
    content = json.loads((run / "result.json").read_text())
    digest = load_checkpoint(run).sha256
    for i in range(4):
        huge = dict.fromkeys(("way", "shot", "query", "episodes", "seed", "step", "train_images"), BILLION * 10**i)
        record = content["results"][0] | huge | {"checkpoint_sha256": digest, "train_flops": 1e24 / 10**i}
        (run / f"{i}.json").write_text(json.dumps(content | {"results": [record | {"episodes_sha256": str(i)}]}))
    (run / "metrics.jsonl").write_text(
        f'{{"step": {10**14}, "val/accuracy": 1e14}}\n{{"step": 1, "val/accuracy": 0}}\n'
    )
    assert len(report(ReportConfig(["runs"]), Path("out"))) == 4


@pytest.mark.parametrize(
    ("place", "count"), [("result.json", 100_000), ("result.json", 5000), (".hydra/overrides.yaml", 100_000)]
)
def test_a_report_ignores_thousands_of_overrides(run, monkeypatch, capsys, place, count):
    monkeypatch.setattr(yaml, "load", lambda text, _: [] if len(text) < 1000 else pytest.fail("it is parsed"))
    words = [f"dataset.a{i}={i}" for i in range(count)]
    content = json.loads((run / "result.json").read_text())
    if place == "result.json":
        (run / place).write_text(json.dumps(content | {"training": content["training"] | {"overrides": words}}))
    else:
        (run / "result.json").unlink()
        (run / place).write_text("".join(f"- {word}\n" for word in words))
    (row,) = report(ReportConfig(["runs"]), Path("out"))
    assert not [name for name in row if name.startswith("dataset.a")]
    refused = (place, count) == ("result.json", 100_000)  # with all that it says
    assert ("without the settings of its command line" in capsys.readouterr().err) == (not refused)


def test_a_result_of_many_changes_is_left_out(run):
    content = json.loads((run / "result.json").read_text())
    changes = {f"a{i}": i for i in range(5000)}
    record = content["results"][0] | {"changes": changes, "checkpoint_sha256": load_checkpoint(run).sha256}
    (run / "1.json").write_text(json.dumps(content | {"results": [record]}))
    refusal(lambda: read_results(run / "1.json"), run / "1.json")
    assert len(report(ReportConfig(["runs"]), Path("out"))[0]) < 12


@pytest.mark.parametrize(
    "text",
    [
        '{"schema": 2, "results": ' + "[" * 10**5,
        '{"schema": 2, "results": [' + "{}," * 10**6 + "{}]}",
        "[1" + "0" * 10**6 + "]",
    ],
    ids=["nested", "many", "long number"],
)
def test_a_result_file_of_many_values_is_refused(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    refusal(lambda: read_results(tmp_path / "result.json"), tmp_path / "result.json")


def test_a_result_file_may_have_100_000_values(run):
    content = json.loads((run / "result.json").read_text())
    for count, read in ((99_000, True), (100_000, False)):
        (run / "result.json").write_text(json.dumps(content | {"training": {"losses": [0] * count}}))
        if read:
            assert len(read_results(run / "result.json").results) == 1
        else:
            refusal(lambda: read_results(run / "result.json"), run / "result.json")


def test_lists_may_be_nested_50_times():
    value: list[Any] = []
    for _ in range(50):
        value = [value]
    check_extent(value, 1000)
    with pytest.raises(ValueError, match="nested more than 50 times"):
        check_extent([value], 1000)


def write_picture(folder: Path, content: bytes) -> None:
    from tensorboard.compat.proto.summary_pb2 import Summary

    with SummaryWriter(str(folder)) as writer:
        image = Summary.Image(height=1, width=1, colorspace=1, encoded_image_string=content)
        writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag="val/episode", image=image)]), 1)


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (PNG, True),
        (PNG + bytes(2000), False),
        (PNG[:16] + struct.pack(">II", 10**5, 10**5) + PNG[24:], False),
        (PNG[:16], False),
        (b"GIF89a" + bytes(100), False),
    ],
)
def test_a_report_shows_small_pictures_only(tmp_path, monkeypatch, content, shown):
    monkeypatch.setattr(limits, "PICTURE", 1000)
    write_picture(tmp_path, content)
    assert sample_episode(tmp_path) == (content if shown else None)


def test_large_files_of_tensorboard_are_not_read(tmp_path, capsys):
    write_picture(tmp_path, PNG)
    (path,) = tmp_path.iterdir()
    os.truncate(path, 2**36)
    assert sample_episode(tmp_path) is None
    assert f"{tmp_path}: the files of TensorBoard have more than" in capsys.readouterr().err


def test_control_characters_in_a_checkpoint_do_not_reach_the_terminal(checkpoint, metacv):
    change(checkpoint, "training", stages=["\x1b[2J\x1b]0;title\x07first\nmetacv: accuracy 100 %"])
    code, out, _ = metacv("evaluate", f"checkpoint={checkpoint}", "episodes=2", "query=2", "device=cpu")
    assert code == 0
    assert out.splitlines()[6] == "  after: ?[2J?]0;title?first?metacv: accuracy 100 %"
    assert "\x1b" not in out


def test_texts_of_a_result_are_escaped_in_markdown(run):
    odd = "<script>alert(1)</script> | [a](http://b) https://evil.example www.evil.example @everyone `x` ![](//c)"
    content = json.loads((run / "result.json").read_text())
    digest = load_checkpoint(run).sha256
    record = content["results"][0] | {"dataset": odd, "rotation": odd, "checkpoint_sha256": digest}
    records = [record | {"changes": {odd: "=1+1" + odd * i}, "head": odd, "method": odd} for i in (1, 2)]
    (run / "1.json").write_text(json.dumps(content | {"results": records}))
    report(ReportConfig(["runs"]), Path("out"))
    markdown = Path("out/report.md").read_text()
    heading, *lines = [line for line in markdown.splitlines() if line.startswith(("## ", "| ")) and "odd" not in line]
    header, _, *lines = lines
    assert len(lines) == 2
    assert "<" not in markdown
    for text in (heading, header, *lines):
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
        assert r"https\://evil.example www\.evil.example \@everyone" in text
        assert "](" not in text.replace(r"\](", "")
    assert "<script" not in Path("out/report.html").read_text()
    cells = [cell for line in csv.reader(Path("out/report.csv").read_text("utf-8-sig").splitlines()) for cell in line]
    assert sum(cell.startswith("'=1+1<script>") for cell in cells) == 2
    assert not [cell for cell in cells if cell.startswith("=")]
