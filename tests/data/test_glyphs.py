"""Glyphs: generated characters."""

import pytest
import torch

from metacv import CONFIG_DIR
from metacv.data.glyphs import Glyphs, draw_glyphs


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return draw_glyphs(60, 6)  # uint8 [60, 6, 1, 28, 28]


def test_glyphs_depend_on_their_seed_and_not_on_the_number_of_classes():
    many, few = draw_glyphs(60, 2, seed=5), draw_glyphs(55, 2, seed=5)
    assert torch.equal(many[:55], few)
    assert not torch.equal(draw_glyphs(55, 2, seed=6), few)


def test_drawing_does_not_use_the_global_random_state():
    before = torch.get_rng_state()
    draw_glyphs(1, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_glyphs_are_thin_antialiased_strokes(images):
    assert images.shape == (60, 6, 1, 28, 28)
    assert images.dtype == torch.uint8
    ink = (images > 127).float().mean((2, 3, 4))
    assert ink.min() > 0.01
    assert 0.05 < ink.mean() < 0.25
    grey = ((images > 40) & (images < 215)).float().mean()
    assert grey > 0.02


def test_images_of_a_glyph_differ_but_less_than_glyphs_do(images):
    assert len(torch.unique(images.flatten(0, 1).flatten(1), dim=0)) == 360
    blurred = torch.nn.functional.avg_pool2d(images.float().view(60, 6, 28, 28), 4).flatten(2)
    nearest = torch.cdist(blurred[:, 1], blurred[:, 0]).argmin(dim=1)
    assert (nearest == torch.arange(60)).float().mean() > 0.2  # chance is 1/60


def test_splits_are_disjoint_and_have_the_sizes_of_the_settings(tmp_path):
    dataset = Glyphs(tmp_path, classes={"train": 20, "val": 8, "test": 5}, images=3, seed=0)
    banks = [dataset.load(split) for split in ("train", "val", "test")]
    assert [bank.sizes.tolist() for bank in banks] == [[3] * 20, [3] * 8, [3] * 5]
    assert len({name for bank in banks for name in bank.class_names}) == 33
    assert torch.equal(torch.cat([bank.images for bank in banks]), draw_glyphs(33, 3).flatten(0, 1))


def test_every_split_needs_classes(tmp_path):
    with pytest.raises(ValueError, match="must have train, val and test"):
        Glyphs(tmp_path, classes={"train": 5, "val": 5}, images=3, seed=0)


def test_glyphs_too_large_for_memory_are_refused_with_their_size(tmp_path):
    with pytest.raises(ValueError, match=r"images=200 take 15.7 GB, above 4.3 GB"):
        Glyphs(tmp_path, classes={"train": 100_000, "val": 8, "test": 5}, images=200, seed=0)


def test_the_default_data_set_has_enough_classes_for_training():
    from omegaconf import OmegaConf

    assert OmegaConf.load(CONFIG_DIR / "dataset" / "glyphs.yaml").classes.train >= 1000
