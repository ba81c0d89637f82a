"""Augmentation, on images in which every pixel is known."""

import pytest
import torch
from conftest import bank_of

from metacv.data.sampler import EpisodeSampler
from metacv.data.transforms import Augment
from metacv.errors import UserError


def numbered_images(count: int, side: int = 5) -> torch.Tensor:
    """Images [count, 3, side, side] in which all pixels differ, and none is 0."""
    image = torch.arange(1.0, side * side + 1).view(1, 1, side, side) / (side * side)
    return image.expand(count, 3, side, side)


def augmented(augment: Augment, images: torch.Tensor) -> torch.Tensor:
    return augment(images, augment.draw(len(images)))


def test_augmentation_is_off_unless_a_setting_switches_it_on():
    assert not Augment(0, False, 0.0)
    assert Augment(1, False, 0.0)
    assert Augment(0, True, 0.0)
    assert Augment(0, False, 0.1)


def test_crops_are_windows_of_the_padded_image_and_all_windows_occur():
    images, seen = numbered_images(500), set()
    padded = torch.nn.functional.pad(images[0], (2, 2, 2, 2), "reflect")
    windows = {(y, x): padded[:, y : y + 5, x : x + 5] for y in range(5) for x in range(5)}
    for image in augmented(Augment(2, False, 0.0), images):
        (place,) = [place for place, window in windows.items() if torch.equal(window, image)]
        seen.add(place)
    assert seen == set(windows)


def test_half_of_the_images_are_flipped_left_to_right():
    images = numbered_images(2000)
    result = augmented(Augment(0, True, 0.0), images)
    flipped = (result == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped, ~(result == images).flatten(1).all(1))
    assert 0.45 < flipped.float().mean() < 0.55


def test_jitter_equals_torchvision_with_the_same_factors():
    from torchvision.transforms.v2 import functional

    augment = Augment(0, False, 0.4, seed=3)
    changes = augment.draw(6)
    factors = changes[:, 3:]
    assert (factors - 1).abs().max() <= 0.4
    images = torch.rand(6, 3, 7, 7, generator=torch.Generator().manual_seed(1))
    for image, result, (brightness, contrast, saturation) in zip(
        images, augment(images, changes), factors.tolist(), strict=True
    ):
        expected = functional.adjust_brightness(image, brightness)
        expected = functional.adjust_contrast(expected, contrast)
        expected = functional.adjust_saturation(expected, saturation)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)


def test_greyscale_images_stay_greyscale_and_between_0_and_1():
    images = torch.rand(4, 1, 6, 6)
    result = augmented(Augment(1, True, 0.4), images)
    assert result.shape == images.shape
    assert 0 <= result.min() <= result.max() <= 1


def flip_sampler(flip: bool) -> EpisodeSampler:
    return EpisodeSampler(bank_of([20] * 12, shape=(3, 4, 4)), 3, 1, 2, augment=Augment(0, flip, 0.0, seed=1))


def test_augmentation_does_not_change_which_tasks_are_drawn():
    plain, flipped = flip_sampler(False).sample(3).query_x, flip_sampler(True).sample(3).query_x
    assert ((plain == flipped).flatten(2).all(2) | (plain == flipped.flip(-1)).flatten(2).all(2)).all()
    assert not torch.equal(plain, flipped)


def test_the_state_of_a_sampler_contains_that_of_its_augmentation():
    sampler = flip_sampler(True)
    sampler.sample(3)
    state = sampler.state_dict()
    expected = sampler.sample(2)
    resumed = flip_sampler(True)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.sample(2).support_x, expected.support_x)


def test_a_part_of_a_batch_is_augmented_as_in_the_whole_batch():
    whole, part = flip_sampler(True).sample(4), flip_sampler(True).sample(4, slice(1, 4, 2))
    assert torch.equal(whole.query_x[1::2], part.query_x)


def test_a_crop_larger_than_the_image_is_refused():
    with pytest.raises(
        UserError, match=r"augment.crop=4: must be smaller than the images, which are 4 pixels high and 6 wide"
    ):
        EpisodeSampler(bank_of([20] * 12, shape=(3, 4, 6)), 3, 1, 2, augment=Augment(4, False, 0.0))
