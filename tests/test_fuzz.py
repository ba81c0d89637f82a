"""Small valid files, damaged at random: each is read, or refused in one line. No code runs, and nothing is written
outside of the folder. METACV_FUZZ=10000 tries as many of each kind, and others every time."""

import copy
import io
import json
import os
import pickle
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOM, bounded, resumed_run
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_hostile import SECONDS, entries_of, png, write_picture, write_zip

from metacv.config import to_dict
from metacv.data import cifar100, miniimagenet, tieredimagenet
from metacv.data.bank import SPLITS, ImageBank, cached_bank
from metacv.data.image_files import open_image
from metacv.data.image_folder import ImageFolder
from metacv.data.sources import listed_files, read_as, unpack
from metacv.distributed import Ranks
from metacv.errors import UserError
from metacv.features import read_features
from metacv.logger import Logger
from metacv.model import load_checkpoint, save_checkpoint
from metacv.predictor import kept_support
from metacv.report.figures import sample_episode
from metacv.report.gather import gather
from metacv.report.table import as_markdown, groups_of
from metacv.results import read_results
from metacv.run import STATE, load_state
from metacv.terminal import error_line
from metacv.text import printable
from metacv.train import training_step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin", "ignore:Duplicate name"),
]
USUAL = 30  # examples, unless METACV_FUZZ sets another number
EXAMPLES = int(os.environ.get("METACV_FUZZ", "0"))
fuzz = settings(
    max_examples=EXAMPLES or USUAL,
    derandomize=not EXAMPLES,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)

# Files


def flip(content: bytes, place: int, part: bytes) -> bytes:
    return content[:place] + bytes([content[place] ^ (1 << len(part) % 8)]) + content[place + 1 :]


def truncate(content: bytes, place: int, part: bytes) -> bytes:
    return content[:place]


def insert(content: bytes, place: int, part: bytes) -> bytes:
    return content[:place] + part + content[place:]


def overwrite(content: bytes, place: int, part: bytes) -> bytes:
    return content[:place] + part + content[place + len(part) :]


def repeat(content: bytes, place: int, part: bytes) -> bytes:
    return content[: place + 16 * len(part)] + content[place:]


PARTS = st.binary(min_size=1, max_size=9) | st.sampled_from(
    [
        b"\xff" * 8,
        b"\x7f\xff\xff\xff",
        bytes(8),
        b"\x80\x04\x95",
        b"cos\nsystem\n(S'true'\ntR",
        b"../../x",
        b"r\0\0\0\x10",
        b"\x86" * 9,
        b"R",
    ]
)
EDITS = st.lists(
    st.tuples(st.sampled_from([flip, truncate, insert, overwrite, repeat]), st.integers(0, 2**16), PARTS),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, edits: list[tuple[Callable[[bytes, int, bytes], bytes], int, bytes]]) -> bytes:
    for edit, place, part in edits:
        content = edit(content or b"?", place % len(content or b"?"), part)
    return content


# Values

NESTED: list[Any] = []
for _ in range(100):
    NESTED = [NESTED]
ODD = [None, True, -1, 0, 1.5, 2**31, 2**63, 2**70, float("nan"), float("inf"), "", "x" * 1000, "${way}", "../../x"]
ODD += ["\x1b[31m\n", "metacv.config.typed", [], {}, [[]], {"_target_": "os.system"}, [None] * 50, NESTED, "<b>|"]
FLAT = [own for own in ODD if own is not NESTED]  # of which json and deepcopy can make a file


class Code:
    """Runs a program when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)

    def __deepcopy__(self, memo: Any) -> "Code":
        return self


ODD += [Code()]
WITH_CODE = [(0, len(ODD) - 1)]  # the first value becomes the last odd one
TENSORS = [torch.zeros(1), torch.zeros(0, 2), torch.zeros((), dtype=torch.int64), torch.full((2,), torch.nan)]
CHANGES = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 2**16)), min_size=1, max_size=3)


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys that lead to every value in nested ones."""
    if len(above) > 20:
        return []
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((*above, key), *places(value[key], (*above, key)))]


def changed(content: Any, changes: list[tuple[int, int]], odd: list[Any]) -> Any:
    content = copy.deepcopy(content)
    for where, what in changes:
        known = places(content)
        if not known:
            break
        *above, last = known[where % len(known)]
        inner = content
        for key in above:
            inner = inner[key]
        inner[last] = copy.deepcopy(odd[what % len(odd)])
    return content


# What must not happen

watched: dict[str, Any] = {"folder": None, "broken": []}  # what may be written to, and what was done against it
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "os.chmod")
WRITING = {"open": 0, "os.mkdir": 0, "os.truncate": 0, "os.rename": 1, "os.symlink": 1, "os.link": 1}  # which argument


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not (folder := watched["folder"]):
        return
    writes = event in WRITING and not (event == "open" and arguments[2] & os.O_ACCMODE == os.O_RDONLY)
    place = os.fsdecode(arguments[WRITING[event]]) if writes else ""
    outside = writes and not f"{os.path.realpath(place)}/".startswith(f"{folder}/") and place != os.devnull
    if event.startswith(FORBIDDEN) or outside:
        watched["broken"].append((event, *arguments))


sys.addaudithook(watch)


def try_to(read: Callable[[Path], object], name: str, content: bytes | Callable[[Path], object]) -> None:
    """`read` the file, in an empty folder: it returns, or raises a UserError that is one line."""
    with tempfile.TemporaryDirectory() as folder, bounded(seconds=60), redirect_stderr(io.StringIO()):
        path = Path(folder).resolve() / "inside" / name
        path.parent.mkdir()
        _ = path.write_bytes(content) if isinstance(content, bytes) else content(path)
        watched.update(folder=path.parent, broken=[])
        try:
            read(path)
        except UserError as error:
            line = printable(error_line(error))
            assert line
            assert len(line) <= 2000
        finally:
            watched["folder"] = None
        assert watched["broken"] == []


def test_the_security_page_states_the_limits_used_in_tests():
    page = " ".join((Path(__file__).parent.parent / "docs/security.md").read_text().split())
    assert f"{ROOM // 2**30} GiB of memory and {SECONDS} seconds." in page
    assert f"the same {USUAL} files of each kind" in page
    assert f"more than about {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels" in page


def must_return(read: Callable[[Path], object]) -> Callable[[Path], object]:
    """`read`, of which a UserError is an error."""

    def strictly(path: Path) -> None:
        try:
            read(path)
        except UserError as error:
            raise AssertionError(error) from error

    return strictly


def test_the_test_detects_readers_that_run_code_or_write_elsewhere(tmp_path):
    for wrong in (
        lambda path: (tmp_path / "a").write_text(""),
        lambda path: os.open(tmp_path / "a", os.O_WRONLY),
        lambda path: (path.parent / "../b").mkdir(),
        lambda path: os.system("true"),
        lambda path: os.symlink(path, tmp_path / "c"),
        lambda path: path.rename(tmp_path / "d"),
    ):
        with pytest.raises(AssertionError):
            try_to(wrong, "a", b"")
    try_to(lambda path: (path.parent / "a").write_text(""), "a", b"")


@pytest.fixture(scope="session")
def files(trained, tmp_path_factory) -> Path:
    """A small valid file of each kind."""
    folder = tmp_path_factory.mktemp("valid")
    for name in ("best.pt", "last.pt", "result.json", "metrics.jsonl"):
        (folder / name).write_bytes((trained("protonet") / name).read_bytes())
    kept = {"images": torch.zeros(2, 1, 28, 28, dtype=torch.uint8), "shots": [1, 1], "classes": ["a", "b"]}
    save_checkpoint(folder / "kept.pt", load_checkpoint(folder / "best.pt").content | {"support": kept})
    Image.new("RGB", (9, 5), "red").save(folder / "a.jpg", exif=exif())
    Image.new("RGB", (9, 5), "red").save(folder / "b.webp", exif=exif())
    (folder / "c.png").write_bytes(png())
    np.savez(folder / "a.npz", features=np.zeros((4, 2), np.float32), labels=np.arange(4))
    with (
        tarfile.open(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar,
        zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as zipped,
    ):
        for own in ("c.png", "result.json"):
            tar.add(folder / own, f"train/é{own}")
            zipped.write(folder / own, f"train/{own}")
    for kind in ("gz", "bz2", "xz"):
        with tarfile.open(folder / f"b.tar.{kind}", f"w:{kind}") as tar:
            tar.add(folder / "c.png", "val/c.png")
    write_picture(folder, png())
    return folder


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112], tags[0x010E], tags[0x011A] = 6, "a picture", 72.0
    return tags


# Readers


def use_checkpoint(path: Path) -> None:
    checkpoint = load_checkpoint(path)
    to_dict(checkpoint.config)
    checkpoint.build()
    if "support" in checkpoint.content:
        kept_support(checkpoint)
    if path.name == "last.pt":
        load_state(path)


def use_run(path: Path) -> None:
    """What a report does with a run, but for the figures."""
    runs, _ = gather([path.parent])
    if runs:
        groups, columns = groups_of(runs)
        cells = [row.cells(columns) for group in groups for row in group.rows]
        text = as_markdown([[*cells[0]], *([*own.values()] for own in cells)])
        assert "<" not in text
        assert text.count("\n") == len(cells) + 2
    sample_episode(path.parent)


def use_result(path: Path) -> None:
    for result in read_results(path).results:
        result.describe()


def use_cache(path: Path) -> None:
    bank = cached_bank(path.parent.parent, "toy", {}, lambda: BANK)
    assert bank.offsets[-1] == len(bank.images)
    assert len(bank.class_names) == len(bank.sizes)
    assert len(bank.fingerprint) == 64


def use_split(path: Path) -> None:
    (path.parent / "photos/a").mkdir(parents=True)
    arguments = 28, True, "crop", False, dict.fromkeys(SPLITS, 1.0), 0
    ImageFolder(path.parent, str(path.parent / "photos"), *arguments, str(path)).splits()


BANK = ImageBank("toy", torch.zeros(4, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 2, 4]), ("a", "b"))
CIFAR = {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [3, 4], "filenames": [b"a", b"b"]}
MINI = {"image_data": np.zeros((2, 84, 84, 3), np.uint8), "class_dict": {"n01": [0], "n02": np.array([1])}}
TIERED = {"label_specific": np.array([0, 1]), "label_specific_str": ["a", "b"]}
CSV = b"filename,label\na.png,x\n../b.png,y\n"
NAMES = ["a", "a/b", "../c", "a/../../d", "/tmp/e", ".", "..", "a//b", "a\0b", "x" * 300, "c:\\f", "\n", ""]
TYPES = [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
ARRAYS = [
    np.array([[Code()], [1]], object),
    np.full((2, 1), np.nan),
    np.ones((2, 1)),
    np.arange(2),
    np.array([-1, 2**62]),
]
ARRAYS += [
    np.ones(()),
    np.ones((0, 3)),
    np.array(["a", "b"]),
    np.zeros(2, "M8[s]"),
    np.zeros(2, "i4,f8"),
    np.zeros(2, ">i8"),
]
ARRAYS += [np.ones((2, 1), "f2"), np.ones((2, 1), complex), np.ones((2, 1, 1)), np.array([True, False])]
READERS: dict[str, Callable[[Path], object]] = {
    "best.pt": use_checkpoint,
    "last.pt": use_checkpoint,
    "kept.pt": use_checkpoint,
    "result.json": use_result,
    "a.npz": read_features,
    "a.tar": unpack,
    "a.zip": unpack,
    "b.tar.gz": unpack,
    "b.tar.bz2": unpack,
    "b.tar.xz": unpack,
    "a.jpg": open_image,
    "b.webp": open_image,
    "c.png": open_image,
}


@pytest.mark.parametrize("name", READERS)
def test_valid_files_are_read(files, name):
    try_to(READERS[name], name, (files / name).read_bytes())


@pytest.mark.parametrize("name", READERS)
@fuzz
@given(edits=EDITS)
def test_a_damaged_file_is_read_or_refused(files, name, edits):
    try_to(READERS[name], name, damaged((files / name).read_bytes(), edits))


@pytest.mark.parametrize("name", ["best.pt", "last.pt", "kept.pt"])
@fuzz
@given(edits=EDITS)
def test_a_checkpoint_with_a_damaged_pickle_is_read_or_refused(files, name, edits):
    entries = entries_of(files / name)
    entries["archive/data.pkl"] = damaged(entries["archive/data.pkl"], edits)
    try_to(use_checkpoint, name, lambda path: write_zip(path, [*entries.items()]))


@pytest.mark.parametrize("name", ["best.pt", "last.pt", "kept.pt"])
@fuzz
@given(changes=CHANGES)
@example(changes=WITH_CODE)
def test_a_checkpoint_with_changed_values_is_read_or_refused(files, name, changes):
    content = changed(load_checkpoint(files / name).content, changes, [*ODD, *TENSORS])
    try_to(use_checkpoint, name, lambda path: torch.save(content, path))


@fuzz
@given(changes=CHANGES, edits=EDITS)
@example(changes=WITH_CODE, edits=[])
def test_a_run_resumes_from_changed_files_or_refuses_them(files, data_dir, changes, edits):
    def write(path: Path) -> None:
        content = load_checkpoint(files / "last.pt").content
        state = {name: content[name] for name in (*STATE, "step", "seconds", "earlier")}
        torch.save(content | changed(state, changes, [*ODD, *TENSORS]), path)
        path.with_name("metrics.jsonl").write_bytes(damaged((files / "metrics.jsonl").read_bytes(), edits))

    def resume(path: Path) -> None:
        run = resumed_run(path, data_dir)
        with Logger(path.parent, run.step, run.validated):
            if not run.finished:
                training_step(run, Ranks())

    with torch.random.fork_rng():
        try_to(resume, "last.pt", write)


@fuzz
@given(edits=EDITS, changes=CHANGES, in_pickle=st.booleans())
@example(edits=[], changes=WITH_CODE, in_pickle=False)
def test_a_damaged_cache_is_replaced(edits, changes, in_pickle):
    with tempfile.TemporaryDirectory() as folder:
        cached_bank(Path(folder), "toy", {}, lambda: BANK)
        (cache,) = Path(folder).glob("cache/*")
        content = torch.load(cache, weights_only=True)
        entries = entries_of(cache)
    odd = [*ODD, BANK.images.float(), BANK.images[:0], torch.tensor([4, 2, 4]), torch.tensor([0, 5, 4]), *TENSORS]
    inner = {"archive/data.pkl": damaged(entries["archive/data.pkl"], edits)}

    def write(path: Path) -> None:
        path.parent.joinpath("cache").mkdir()
        path = path.parent / "cache" / cache.name
        write_zip(path, [*(entries | inner).items()]) if in_pickle else torch.save(changed(content, changes, odd), path)

    try_to(lambda path: use_cache(path.parent / "cache" / cache.name), "any", write)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    ("content", "read"),
    [
        (CIFAR, cifar100.read_content),
        (MINI, lambda content: miniimagenet.read_content(content, Path("a"), "train")),
        (TIERED, tieredimagenet.check_labels),
    ],
    ids=["cifar", "mini", "tiered"],
)
@fuzz
@given(edits=EDITS, changes=CHANGES, whole=st.booleans())
@example(edits=[], changes=WITH_CODE, whole=True)
def test_a_damaged_pickle_is_read_or_refused(content, read, protocol, edits, changes, whole):
    own = pickle.dumps(changed(content, changes, ODD) if whole else content, protocol)
    try_to(lambda path: read_as("Toy", path, read), "a.pkl", own if whole else damaged(own, edits))


@fuzz
@given(entries=st.lists(st.tuples(st.text(max_size=9) | st.sampled_from(NAMES), st.sampled_from(TYPES)), max_size=3))
@example(entries=[("a", tarfile.SYMTYPE)])
@example(entries=[("a", tarfile.SYMTYPE), ("a/b", tarfile.REGTYPE)])
@example(entries=[("../b", tarfile.REGTYPE)])
def test_an_archive_writes_into_its_folder_or_is_refused(entries):
    entries = [(name.encode(errors="replace").decode(), kind) for name, kind in entries]

    def write_tar(path: Path) -> None:
        with tarfile.open(path, "w") as tar:
            for name, kind in entries:
                own = tarfile.TarInfo(name)
                own.type, own.linkname = kind, "../../.."
                tar.addfile(own)

    def read(path: Path) -> None:
        found = [*unpack(path).rglob("*")]
        assert all(own.is_file() or own.is_dir() for own in found)
        assert not any(own.is_symlink() for own in found)

    try_to(read, "a.tar", write_tar)
    try_to(read, "a.zip", lambda path: write_zip(path, [(name, b"x") for name, _ in entries if name]))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@fuzz
@given(edits=EDITS)
def test_an_image_is_read_whatever_its_exif_says(kind, edits):
    def write(path: Path) -> None:
        Image.new("RGB", (9, 5), "red").save(path, kind, exif=b"Exif\0\0" + damaged(exif().tobytes()[6:], edits))

    def read(path: Path) -> None:
        image = open_image(path)
        assert image.size in ((9, 5), (5, 9))
        assert image.getpixel((0, 0))[0] > 200

    try_to(must_return(read), "a", write)


@fuzz
@given(features=st.sampled_from(ARRAYS), labels=st.sampled_from(ARRAYS))
def test_features_of_any_type_are_read_or_refused(features, labels):
    def read(path: Path) -> None:
        bank = read_features(path)
        assert bank.images.isfinite().all()
        assert int(bank.sizes.sum()) == len(bank.images)

    try_to(read, "a.npz", lambda path: np.savez(path, features=features, labels=labels))


@fuzz
@given(edits=EDITS)
def test_a_damaged_list_is_read_or_refused(edits):
    def read_list(path: Path) -> None:
        for own in listed_files(path, path.parent / "images").values():
            assert {file.parent for file in own} <= {path.parent / "images"}

    try_to(read_list, "train.csv", damaged(CSV, edits))
    split = json.dumps({"train": ["a"], "val": [], "test": []}).encode()
    try_to(use_split, "split.json", damaged(split, edits))


@fuzz
@given(changes=CHANGES)
def test_a_result_with_changed_values_is_read_or_refused(files, changes):
    content = changed(json.loads((files / "result.json").read_text()), changes, FLAT)
    try_to(use_result, "result.json", json.dumps(content).encode())


@fuzz
@given(
    name=st.sampled_from(["result.json", "metrics.jsonl", "1.json", ".hydra/overrides.yaml", "events"]),
    edits=EDITS,
    changes=CHANGES,
)
@example(name=".hydra/overrides.yaml", edits=[], changes=[])
def test_a_report_of_damaged_files_is_written(files, name, edits, changes):
    known = {own: (files / own).read_bytes() for own in ("best.pt", "result.json", "metrics.jsonl")}
    record = json.loads(known["result.json"])
    record["results"][0]["dataset"] = "<b>"
    record["results"][0]["checkpoint_sha256"] = load_checkpoint(files / "best.pt").sha256
    known["1.json"] = json.dumps(changed(record, changes, FLAT) if name == "1.json" else record).encode()
    if name == ".hydra/overrides.yaml":  # read only where no result has them
        known.pop("result.json")
        record.pop("training")
        known["1.json"] = json.dumps(record).encode()
    known[".hydra/overrides.yaml"] = b"- shot=1\n- !!python/object/apply:os.system ['true']\n- &a [x, *a]\n- way=5\n"
    (events,) = files.glob("*tfevents*")
    known["events.out.tfevents.1"] = events.read_bytes()
    name = "events.out.tfevents.1" if name == "events" else name
    known[name] = known[name] if name == "1.json" else damaged(known[name], edits)

    def write(path: Path) -> None:
        for own, content in known.items():
            (path.parent / own).parent.mkdir(exist_ok=True)
            (path.parent / own).write_bytes(content)

    try_to(use_run, "any", write)
