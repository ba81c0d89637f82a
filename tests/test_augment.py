"""Augmentation, on images whose every pixel is known."""

import pytest
import torch
from conftest import bank_of

from metacv import MetacvError
from metacv.data.sampler import EpisodeSampler
from metacv.data.transforms import Augment


def numbered(count: int, side: int = 5) -> torch.Tensor:
    """Pixels that tell row and column, none of them 0."""
    picture = torch.arange(1.0, side * side + 1).view(1, 1, side, side) / (side * side)
    return picture.expand(count, 3, side, side)


def augmented(augment: Augment, images: torch.Tensor) -> torch.Tensor:
    return augment(images, augment.draw(len(images)))


def test_nothing_is_asked_for_by_default():
    assert not Augment(0, False, 0.0)
    assert Augment(1, False, 0.0)
    assert Augment(0, True, 0.0)
    assert Augment(0, False, 0.1)


def test_crops_are_windows_of_the_padded_image_and_every_window_comes():
    images, seen = numbered(2000), set()
    padded = torch.nn.functional.pad(images[0], (2, 2, 2, 2))
    windows = {(y, x): padded[:, y : y + 5, x : x + 5] for y in range(5) for x in range(5)}
    for image in augmented(Augment(2, False, 0.0), images):
        (at,) = [at for at, window in windows.items() if torch.equal(window, image)]
        seen.add(at)
    assert seen == set(windows)


def test_half_of_the_images_are_flipped_and_only_left_to_right():
    images = numbered(2000)
    out = augmented(Augment(0, True, 0.0), images)
    flipped = (out == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped, ~(out == images).flatten(1).all(1))
    assert 0.45 < flipped.float().mean() < 0.55


def test_jitter_equals_torchvision_with_the_same_factors():
    from torchvision.transforms.v2 import functional

    augment = Augment(0, False, 0.4, seed=3)
    changes = augment.draw(6)
    factors = changes[:, 3:]
    assert (factors - 1).abs().max() <= 0.4
    images = torch.rand(6, 3, 7, 7, generator=torch.Generator().manual_seed(1))
    for image, found, (brightness, contrast, saturation) in zip(
        images, augment(images, changes), factors.tolist(), strict=True
    ):
        expected = functional.adjust_brightness(image, brightness)
        expected = functional.adjust_contrast(expected, contrast)
        expected = functional.adjust_saturation(expected, saturation)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_images_of_one_channel_stay_so():
    images = torch.rand(4, 1, 6, 6)
    out = augmented(Augment(1, True, 0.4), images)
    assert out.shape == images.shape
    assert 0 <= out.min() <= out.max() <= 1


def test_the_stream_of_tasks_is_the_same_with_and_without_augmentation_and_both_can_be_taken_up_again():
    def sampler(flip: bool) -> EpisodeSampler:
        return EpisodeSampler(bank_of([20] * 12, shape=(3, 4, 4)), 3, 1, 2, augment=Augment(0, flip, 0.0, seed=1))

    plain, changed = sampler(False), sampler(True)
    one, other = plain.sample(3), changed.sample(3)
    same = (one.query_x == other.query_x).flatten(2).all(2) | (one.query_x == other.query_x.flip(-1)).flatten(2).all(2)
    assert same.all()
    state = changed.state_dict()
    following = changed.sample(2)
    again = sampler(True)
    again.load_state_dict(state)
    assert torch.equal(again.sample(2).support_x, following.support_x)


@pytest.mark.parametrize(("crop", "jitter"), [(-1, 0.0), (2**20, 0.0), (0, -0.1), (0, 1.5)])
def test_impossible_settings_are_refused(crop, jitter):
    with pytest.raises(MetacvError, match="augment"):
        Augment(crop, False, jitter)


def test_a_crop_from_beyond_the_image_is_refused():
    with pytest.raises(MetacvError, match=r"augment.crop=4 but the images are 4 pixels high and 6 wide"):
        EpisodeSampler(bank_of([20] * 12, shape=(3, 4, 6)), 3, 1, 2, augment=Augment(4, False, 0.0))
