"""The picture of an episode."""

import torch
from conftest import random_tasks

from metacv.picture import RIGHT, WRONG, episode_picture


def test_queries_are_framed_in_green_where_the_model_is_right_and_in_red_where_it_is_wrong():
    tasks = random_tasks(tasks=1, way=2, shot=1, query=2, shape=(1, 28, 28))
    said = torch.tensor([[0, 1, 1, 1]])  # of queries 0 0 1 1
    picture = episode_picture(tasks, torch.nn.functional.one_hot(said, 2).float())
    assert picture.dtype == torch.uint8
    assert picture.shape[0] == 3

    def coloured(colour) -> torch.Tensor:
        """How many pixels of each row have this colour."""
        return (picture == torch.tensor(colour).view(3, 1, 1)).all(dim=0).sum(dim=1)

    upper, lower = (slice(0, picture.shape[1] // 2), slice(picture.shape[1] // 2, None))
    assert coloured(WRONG)[upper].sum() > 400  # one frame of 56 pixels a side, two wide
    assert coloured(WRONG)[lower].sum() == 0
    assert coloured(RIGHT)[lower].sum() > 1.9 * coloured(RIGHT)[upper].sum()


def test_colour_images_and_large_tasks_fit():
    tasks = random_tasks(tasks=1, way=30, shot=5, query=15, shape=(3, 84, 84))
    picture = episode_picture(tasks, torch.zeros(1, 450, 30))
    assert picture.shape[1] < 20 * 110
    assert picture.shape[2] < 14 * 95
