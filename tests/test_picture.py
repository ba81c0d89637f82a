"""The picture of an episode."""

import torch
from conftest import random_tasks

from metacv.data.image_files import as_tensor
from metacv.drawing import LINE, RIGHT, WRONG, captioned_picture, episode_picture, legible


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


def test_a_picture_of_labels_has_a_cell_for_each_image_in_as_many_rows_as_it_takes():
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    cells = [(image, "alpha 98%", RIGHT)] * 9 + [(image, "a name much too long for its place", WRONG)]
    picture = captioned_picture([("support", [(image, "alpha", LINE)] * 3), ("query", cells)])
    pixels = as_tensor(picture)

    def coloured(colour, top: int) -> int:
        """Pixels from so many cells down."""
        here = (pixels == torch.tensor(colour).view(3, 1, 1)).all(dim=0)
        return int(here[top : top + 76].sum())

    assert picture.width == 8 * 102 + 6  # columns of 96 pixels and a gap
    assert picture.height == 3 * (56 + 6 + 14) + 2 * (14 + 6) + 6
    frame = 2 * 4 * 58  # 56 pixels a side and the corners, two wide
    support, query = 24, 24 + 76 + 20  # frames begin two pixels above their image
    assert coloured(RIGHT, support) == coloured(WRONG, support) == coloured(WRONG, query) == 0
    assert coloured(RIGHT, query) >= 8 * frame
    assert min(coloured(RIGHT, query + 76), coloured(WRONG, query + 76)) >= frame


def test_names_that_the_font_lacks_become_numbers():
    assert legible("cat 2", "class 1") == "cat 2"
    assert legible("épsilon", "class 1") == "epsilon"
    assert legible("猫", "class 1") == "class 1"
