"""`metacv.load` and `FewShotClassifier`: the same labels as `metacv predict`, in the manner of scikit-learn."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from sklearn.utils.validation import check_is_fitted
from test_predict import CLASSES, lay_out

import metacv as package
from metacv.api import FewShotClassifier, load, prepared
from metacv.errors import UserError
from metacv.model import load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """8 dark glyphs on light paper for each of 3 classes as support, and 2 as query."""
    lay_out(folder := tmp_path_factory.mktemp("own"), [8, 8, 8], query=2)
    return folder


@pytest.fixture
def own(trained, place, monkeypatch, tmp_path) -> tuple[FewShotClassifier, list[str], list[str]]:
    """A trained model, and the paths and labels of the support images."""
    monkeypatch.chdir(tmp_path)
    paths = sorted(map(str, place.glob("support/*/*.png")))
    return load(trained("protonet")), paths, [Path(path).parent.name for path in paths]


def test_the_command_and_the_api_agree_to_the_bit_and_read_the_files_of_each_other(metacv, trained, own, place):
    classifier, paths, labels = own
    words = (f"query={place}/query", "hydra.run.dir=out")
    assert (
        metacv("predict", f"checkpoint={trained('protonet')}", f"support={place}/support", "save=cli.pt", *words)[0]
        == 0
    )
    found = json.loads(Path("out/predictions.json").read_text())["predictions"]
    queries = [one["file"] for one in found]
    expected = np.array([[*one["probabilities"].values()] for one in found], dtype=np.float32)
    classifier.fit(paths, labels).save("api.pt")
    for one in (classifier, load("cli.pt"), load(Path("api.pt"))):
        assert np.array_equal(one.predict_proba(queries), expected)
        assert list(one.classes_) == sorted(CLASSES[:3])
        assert list(one.predict(queries)) == [row["label"] for row in found]
    assert metacv("predict", "adapted=api.pt", *words)[0] == 0
    assert json.loads(Path("out/predictions.json").read_text())["predictions"] == found
    assert not any(str(path).encode() in Path("api.pt").read_bytes() for path in (place, Path.cwd()))


DATASETS = {
    "glyphs": {"_target_": "metacv.data.glyphs.Glyphs", "classes": {"train": 2, "val": 2, "test": 2}, "images": 2,
               "seed": 0},
    "cifar_fs": {"_target_": "metacv.data.cifar100.CIFARFS"},
    "miniimagenet": {"_target_": "metacv.data.miniimagenet.MiniImageNet", "resize": False},
    "cub": {"_target_": "metacv.data.cub.CUB", "size": 40, "crop": False},
}  # fmt: skip


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_images_in_memory_are_prepared_as_files_are(name, mode, tmp_path):
    """Large enough for `open_image` to reduce them, and not square."""
    from metacv.model import build_dataset

    dataset = build_dataset(DATASETS[name], str(tmp_path))
    shape = (410, 390) if mode == "L" else (410, 390, len(mode))
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(array).save(path := tmp_path / "a.png")
    tensor = torch.from_numpy(array[..., None] if mode == "L" else array).permute(2, 0, 1)
    kinds = [str(path), path, Image.open(path), Image.fromarray(array), array, array / 255, tensor, tensor / 255]

    class Model:
        check_shape = staticmethod(lambda *_: None)

    Model.dataset = dataset
    expected = dataset.read(path)
    for row, image in enumerate(prepared(kinds, Model)):
        assert torch.equal(image, expected), row


def test_a_rotated_photograph_in_memory_is_turned_upright_as_its_file_is(tmp_path):
    from metacv.data.image_files import open_image

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(
        path := tmp_path / "a.png", exif=exif
    )
    assert open_image(path).size == (20, 30)
    assert open_image(Image.open(path)).tobytes() == open_image(path).tobytes()


def test_an_image_that_the_caller_opened_stays_as_it_was(tmp_path):
    Image.new("RGB", (800, 800), "red").save(path := tmp_path / "a.jpg")
    from metacv.data.image_files import open_image

    mine = Image.open(path)
    open_image(mine, 20)
    assert mine.size == (800, 800)


def test_it_works_with_scikit_learn(own):
    classifier, paths, labels = own
    scores = cross_val_score(classifier, paths, labels, cv=4)
    assert scores.shape == (4,)
    assert scores.mean() > 0.5  # 1/3 by chance
    with pytest.raises(NotFittedError):
        check_is_fitted(classifier)
    with pytest.raises(NotFittedError):
        classifier.predict(paths)
    check_is_fitted(classifier.fit(paths, labels))
    other = clone(classifier.set_params(head="ncm", head_settings={"normalize": False}))
    assert other.get_params() == classifier.get_params()
    with pytest.raises(NotFittedError):
        check_is_fitted(other)
    right = np.mean(classifier.predict(paths) == np.array(labels))
    assert classifier.score(paths, labels) == right
    assert len(repr(FewShotClassifier("a/run"))) < 80


@pytest.mark.parametrize("kind", [str, int, bool])
def test_classes_may_be_text_or_numbers_and_a_file_keeps_their_type(own, place, kind, metacv):
    classifier, paths, _ = own
    classifier.fit(paths[:12], [kind(i % 2) for i in range(12)]).save("a.pt")
    again = load("a.pt")
    assert again.classes_.dtype == classifier.classes_.dtype
    assert np.array_equal(again.predict(paths), classifier.predict(paths))
    assert again.classes_.tolist() == sorted({kind(0), kind(1)})
    assert metacv("predict", "adapted=a.pt", f"query={place}/query", "save=b.pt", "hydra.run.dir=out")[0] == 0
    assert load("b.pt").classes_.tolist() == again.classes_.tolist()


def test_examples_added_in_parts_are_as_all_at_once(own):
    classifier, paths, labels = own
    whole = clone(classifier).fit(paths, labels)
    order = [*range(0, 24, 3), *range(1, 24, 3), *range(2, 24, 3)]
    paths, labels = [paths[i] for i in order], [labels[i] for i in order]
    classifier.partial_fit(paths[:8], labels[:8])
    classifier.save("part.pt")
    for part in (classifier, load("part.pt")):
        part.partial_fit(paths[8:16], labels[8:16]).partial_fit(paths[16:], labels[16:])
        assert part.support_.shots == (8, 8, 8)
        assert np.allclose(part.predict_proba(paths), whole.predict_proba(paths), atol=1e-5)
    first = clone(classifier).fit(paths[:2] + paths[3:5], ["b", "b", "c", "c"])
    first.partial_fit(paths[5:6], ["a"])
    assert (first.classes_.tolist(), first.support_.shots) == (["a", "b", "c"], (1, 2, 2))


GREY = np.zeros((28, 28), dtype=np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ("a.png", ["a"], "images: must be a list of images"),
        (GREY, ["a"], "images: must be a list of images"),
        (np.zeros((28, 28, 3), dtype=np.uint8), ["a"], "images: must be a list of images"),
        (torch.zeros(1, 28, 28), ["a"], "images: must be a list of images"),
        ([], [], "images: must not be empty"),
        (None, ["a"], "images: NoneType: must be a list"),
        ([GREY, GREY], None, "labels: NoneType: must be a list"),
        ([GREY, GREY], 3, "labels: int: must be a list"),
        ([GREY, GREY], np.array(3), "labels: ndarray: must be a list"),
        ([GREY, GREY], [["a"], ["b", "c"]], "labels: must be all text or all whole numbers"),
        ([GREY, "nowhere.png"], ["a", "b"], r"images\[1\]: nowhere.png cannot be read"),
        ([None, GREY], ["a", "b"], r"images\[0\]: NoneType: must be a path"),
        ([GREY.astype(int), GREY], ["a", "b"], r"images\[0\]: numbers of type int64: must be uint8, or floats from 0"),
        ([GREY + 255.0, GREY], ["a", "b"], r"images\[0\]: floats from 255 to 255: must be from 0 to 1, or uint8"),
        ([GREY * np.nan, GREY], ["a", "b"], r"images\[0\]: floats from nan to nan"),
        ([GREY[:0], GREY], ["a", "b"], r"images\[0\]: shape \(0, 28\)"),
        ([np.zeros((3, 28, 28)), GREY], ["a", "b"], r"shape \(3, 28, 28\): must be HxW or HxWxC with 1, 3 or 4"),
        ([torch.zeros(28, 28), GREY], ["a", "b"], r"shape \(28, 28\): must be \[C, H, W\]"),
        ([GREY, GREY], ["a"], r"labels: shape \(1,\) for 2 images: must be one label for each image"),
        ([GREY, GREY], [("a", 1), ("b", 2)], "labels: shape"),
        ([GREY, GREY], ["a", "a"], "labels: 1 class: must be from 2 to 10000"),
        ([GREY, GREY], [0.5, 1.5], "labels: must be all text or all whole numbers"),
        ([GREY, GREY], ["a", None], "labels: must be all text or all whole numbers"),
        ([GREY, GREY], ["a", "b\x1b[31m"], "labels: b.*: must be printable, with 1000 letters at most"),
        ([GREY, GREY], ["a", "b" * 1001], "labels: b.*: must be printable, with 1000 letters at most"),
    ],
)
def test_wrong_images_and_labels_have_one_plain_line_and_leave_the_examples_as_they_were(own, images, labels, message):
    classifier, paths, names = own
    classifier.fit(paths, names)
    before = classifier.predict_proba(paths[:3])
    for learn in (classifier.fit, classifier.partial_fit):
        if learn == classifier.partial_fit and "1 class" in message:
            continue  # an addition to known classes
        with pytest.raises(UserError, match=message) as raised:
            learn(images, labels)
        assert str(raised.value).isprintable()
    assert np.array_equal(classifier.predict_proba(paths[:3]), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "ncmm"}, "head=ncmm: there is no such head; did you mean ncm"),
        ({"head": "../algo/maml"}, "there is no such head"),
        ({"head": 5}, "head=5: there is no such head"),
        ({"head": "ncm", "head_settings": {"D": 1}}, "head.D: NearestMean has no such setting"),
        ({"head_settings": {"C": 1}}, "head.C: .* has no such setting"),
        ({"head": "ncm", "head_settings": {"_target_": "os.system"}}, "must be a class of metacv or torch.optim"),
        ({"batch_norm": "both"}, "batch_norm=both: must be one of inductive, transductive"),
        ({"device": "tpu"}, "device=tpu: must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_wrong_settings_are_reported_by_load_and_fit(trained, settings, message):
    with pytest.raises(UserError, match=message):
        load(trained("protonet"), **settings)
    with pytest.raises(UserError, match=message):
        FewShotClassifier(str(trained("protonet")), **settings).fit([GREY, GREY], ["a", "b"])


def test_save_replaces_only_its_own_files(own):
    classifier, paths, labels = own
    Path("notes.txt").write_text("mine")
    classifier.fit(paths, labels)
    with pytest.raises(UserError, match=r"save=notes\.txt: already exists"):
        classifier.save("notes.txt")
    classifier.save("a.pt")
    classifier.save("a.pt")


@pytest.mark.parametrize("classes", [[1, "a"], [1.5, 2.5], [2**63, 1], ["a" * 1001, "b"], [None, "a"], [True, 2]])
def test_a_file_with_classes_that_save_would_not_write_is_refused(own, classes):
    classifier, paths, _ = own
    classifier.fit(paths[:2], [0, 1]).save("a.pt")
    content = load_checkpoint("a.pt").content
    save_checkpoint(Path("a.pt"), content | {"support": content["support"] | {"classes": classes}})
    with pytest.raises(UserError, match="is damaged"):
        load("a.pt")


def test_images_unlike_those_in_training_warn_where_the_call_was(own):
    classifier, paths, labels = own
    classifier.fit(paths, labels)
    dark = [255 - np.array(Image.open(path)) for path in paths]
    for call in (classifier.predict, classifier.predict_proba):
        with pytest.warns(
            UserWarning, match="the images are unlike .*: brightness .*; inverted they would fit$"
        ) as seen:
            call(dark)
        assert seen[0].filename == __file__


def test_importing_metacv_imports_no_torch():
    code = "import sys, metacv; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert package.load is load
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018
