"""The warning for images unlike those that a model was trained on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_predict import lay_out

from metacv import CONFIG_DIR
from metacv.data.glyphs import draw_glyphs
from metacv.look import look_in_training, look_of, statistics, unlike
from metacv.model import Training, load_checkpoint, save_checkpoint

PHOTO = {"brightness": [0.1, 0.5, 0.9], "contrast": [0.1, 0.2, 0.4], "saturation": [0.0, 0.2, 0.5]}


def with_look(trained, look):
    checkpoint = load_checkpoint(trained("protonet"))
    return replace(checkpoint, training=replace(checkpoint.training, look=look))


def plain(red: int, green: int, blue: int, count: int = 3) -> torch.Tensor:
    """Images with a black left half, and the right half in one colour."""
    images = torch.zeros(count, 3, 4, 4, dtype=torch.uint8)
    images[..., 2:] = torch.tensor([red, green, blue], dtype=torch.uint8).view(3, 1, 1)
    return images


def test_image_statistics_equal_a_calculation_by_hand():
    (brightness,), (contrast,), (saturation,) = (own[:1] for own in statistics(plain(255, 0, 0)).values())
    assert float(brightness) == pytest.approx(1 / 6)
    assert float(contrast) == pytest.approx((1 / 6 * 5 / 6) ** 0.5)
    assert float(saturation) == pytest.approx(1 / 2)
    assert statistics(plain(9, 9, 9)[:, :1]).keys() == {"brightness", "contrast"}


def test_training_records_quantiles_of_its_images_which_a_later_stage_replaces(trained):
    training = load_checkpoint(trained("protonet")).training
    low, middle, high = training.look["brightness"]
    assert 0 < low < middle < high < 0.4
    assert training.look == look_of(draw_glyphs(46, 20)[:30].flatten(0, 1))  # 30 of them are for training
    later = Training(look=PHOTO).after(training)
    assert later.look == PHOTO
    assert Training().after(later).look == PHOTO


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (plain(200, 150, 100), None),
        (plain(255, 255, 255)[:1], None),  # a single image may be an exception
        (plain(100, 100, 100, 2), "grey, in training in colour"),
        (torch.cat([plain(100, 100, 100, 1), plain(200, 150, 100, 1)]), None),
        (
            torch.full((3, 3, 4, 4), 255, dtype=torch.uint8),
            "contrast 0.00, in training 0.10 to 0.40, grey",
        ),
    ],
)
def test_colour_images_are_unlike_photographs_only_if_grey_or_without_contrast(trained, images, expected):
    text = unlike("they", images, with_look(trained, PHOTO))
    assert (text is None) if expected is None else (expected in text)


def test_colour_images_are_unlike_grey_ones(trained):
    text = unlike("they", plain(255, 0, 0), with_look(trained, PHOTO | {"saturation": [0.0, 0.0, 0.0]}))
    assert text == "they are unlike those that the model was trained on: saturation 0.50, in training 0.00 to 0.00"


def test_an_older_checkpoint_has_the_look_of_its_data_set_unless_inverted(trained):
    checkpoint = with_look(trained, {})
    assert look_in_training(checkpoint)["brightness"] == [0.035, 0.089, 0.214]
    inverted = checkpoint.config.dataset | {"invert": False}
    checkpoint = replace(checkpoint, config=replace(checkpoint.config, dataset=inverted))
    assert look_in_training(checkpoint) == {}
    assert unlike("they", torch.full((3, 1, 4, 4), 255, dtype=torch.uint8), checkpoint) is None


def photographs(folder: str, size: int = 40) -> None:
    """Blobs of colour, 3 in each of 2 classes."""
    rng = np.random.default_rng(0)
    for name in "ab":
        Path(folder, name).mkdir(parents=True)
        for i in range(3):
            blobs = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            blobs.resize((size, size)).save(f"{folder}/{name}/{i}.png")


def test_photographs_for_a_model_of_glyphs_give_one_warning(metacv, trained):
    photographs("photos")
    words = (f"checkpoint={trained('protonet')}", "support=photos", "hydra.run.dir=out")
    for query, kind in (("photos", "query"), ("photos/a/0.png", "support")):
        code, _, err = metacv("predict", *words, f"query={query}")
        (line,) = (line for line in err.splitlines() if "unlike" in line)
        assert code == 0
        assert line.startswith(
            f"metacv: warning: the {kind} images are unlike those that the model was trained on: bri"
        )


@pytest.mark.usefixtures("may_be_at_chance")
def test_inverted_images_give_a_warning_with_the_setting_to_change(metacv, trained):
    """ImageFolder has the setting, and Glyphs, which always inverts, has not."""
    content = load_checkpoint(trained("protonet")).content
    dataset = yaml.safe_load((CONFIG_DIR / "dataset/image_folder.yaml").read_text())
    dataset |= {"root": None, "size": 28, "color": False}
    look = {"brightness": [0.8, 0.9, 0.97], "contrast": [0.1, 0.25, 0.4]}  # dark ink on light paper
    training = content["training"] | {"look": look, "trained_on": ["other"], "validated_on": ["another"]}
    save_checkpoint(
        Path("paper.pt"), content | {"config": content["config"] | {"dataset": dataset}, "training": training}
    )
    lay_out(Path("own"), [6] * 5, query=0)
    Path("own/support").rename("own/test")
    Path("own/train").mkdir()
    words = ("support=own/test", "query=own/test", "hydra.run.dir=out")
    assert "unlike" not in metacv("predict", "checkpoint=paper.pt", *words)[2]
    for path in Path("own/test").glob("*/*.png"):
        Image.fromarray(255 - np.array(Image.open(path))).save(path)
    advice = "inverted they would fit: try dataset.invert=true\n"
    assert metacv("predict", "checkpoint=paper.pt", *words)[2].endswith(advice)
    assert "unlike" not in metacv("predict", "checkpoint=paper.pt", "dataset.invert=true", *words)[2]
    test = ("evaluate", "checkpoint=paper.pt", "dataset.root=own", "query=2", "shot=1", "episodes=2")
    code, _, err = metacv(*test, "hydra.run.dir=test")
    assert (code, err.count("warning"), err.endswith(advice)) == (0, 1, True), err
    err = metacv("predict", f"checkpoint={trained('protonet')}", *words)[2]
    assert err.endswith("; inverted they would fit\n")


@pytest.mark.parametrize(
    "look", [{"brightness": [0.1, 0.2]}, {"brightness": "x"}, {"brightness": [float("nan")] * 3}, 3]
)
def test_a_damaged_record_is_refused(metacv, trained, look):
    content = load_checkpoint(trained("protonet")).content
    save_checkpoint(Path("odd.pt"), content | {"training": content["training"] | {"look": look}})
    lay_out(Path("own"), [1, 1], query=1)
    code, _, err = metacv("predict", "checkpoint=odd.pt", "support=own/support", "query=own/query")
    assert code == 1
    assert err.startswith("metacv: odd.pt is not a checkpoint of metacv, or is damaged")
