"""Pictures of episodes and of predictions, checked by their pixels."""

import dataclasses

import torch
from conftest import random_tasks
from torch import Tensor

from metacv.data.image_files import as_tensor
from metacv.drawing import LINE, RIGHT, WRONG, captioned_picture, episode_picture, legible
from metacv.text import aligned


def coloured(picture: Tensor, colour: tuple[int, int, int]) -> Tensor:
    """How many pixels of each row have this colour."""
    return (picture == torch.tensor(colour).view(3, 1, 1)).all(dim=0).sum(dim=1)


def test_queries_have_a_green_frame_if_the_prediction_is_correct_and_a_red_one_otherwise():
    tasks = random_tasks(tasks=1, way=2, shot=1, query=2, shape=(1, 28, 28))
    predicted = torch.tensor([[0, 1, 1, 1]])  # of queries 0 0 1 1
    picture = episode_picture(tasks, torch.nn.functional.one_hot(predicted, 2).float())
    assert picture.dtype == torch.uint8
    assert picture.shape[0] == 3
    wrong, right = coloured(picture, WRONG), coloured(picture, RIGHT)
    upper, lower = slice(0, -78), slice(-78, None)  # a row for each class
    assert wrong[upper].sum() > 400  # one frame of 56 pixels a side, two wide
    assert wrong[lower].sum() == 0
    assert right[lower].sum() > 1.9 * right[upper].sum()


def test_the_class_of_an_image_follows_from_its_label_not_its_position():
    tasks = random_tasks(tasks=1, way=3, shot=2, query=4, shape=(1, 28, 28))
    logits = torch.rand(1, 12, 3, generator=torch.Generator().manual_seed(0))
    support, query = torch.tensor([0, 2, 4, 1, 3, 5]), torch.tensor([0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11])
    shuffled = dataclasses.replace(
        tasks,
        support_x=tasks.support_x[:, support],
        support_y=tasks.support_y[:, support],
        query_x=tasks.query_x[:, query],
        query_y=tasks.query_y[:, query],
    )
    assert shuffled.query_y.tolist() == [[0, 1, 2] * 4]
    assert torch.equal(episode_picture(shuffled, logits[:, query]), episode_picture(tasks, logits))


def test_classes_may_have_different_numbers_of_images():
    tasks = random_tasks(tasks=1, way=2, shot=3, query=2, shape=(1, 28, 28))
    support = torch.tensor([0, 3, 4, 5])
    unequal = dataclasses.replace(
        tasks, support_x=tasks.support_x[:, support], support_y=tasks.support_y[:, support], query_y=torch.zeros(1, 4)
    )
    picture = episode_picture(unequal, torch.zeros(1, 4, 2))
    assert picture.shape[2] == (1 + 4) * 62 + 6


def test_colour_images_and_large_tasks_fit():
    tasks = random_tasks(tasks=1, way=30, shot=5, query=15, shape=(3, 84, 84))
    picture = episode_picture(tasks, torch.zeros(1, 450, 30))
    assert picture.shape[1] < 20 * 110
    assert picture.shape[2] < 14 * 95


def test_a_picture_of_predictions_has_a_cell_for_each_image_in_rows_of_eight():
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    cells = [(image, "alpha 98%", RIGHT)] * 9 + [(image, "a name much too long for its place", WRONG)]
    picture = captioned_picture([("support", [(image, "alpha", LINE)] * 3), ("query", cells)])
    assert picture.width == 8 * 102 + 6  # columns of 96 pixels and a gap
    assert picture.height == 3 * (84 + 6 + 14) + 2 * (14 + 6) + 6
    frame = 2 * 4 * 86  # 84 pixels a side, three times 28, and the corners, two wide
    starts = [24, 24 + 104 + 20, 24 + 2 * 104 + 20]  # of the rows of cells; frames begin two pixels above their image
    right, wrong = ([coloured(as_tensor(picture), c)[y : y + 104].sum() for y in starts] for c in (RIGHT, WRONG))
    assert right[0] == wrong[0] == wrong[1] == 0
    assert right[1] >= 8 * frame
    assert min(right[2], wrong[2]) >= frame


def test_names_that_no_font_can_show_become_numbers():
    for name in ("cat 2", "épsilon", "Ölberg", "Кириллица", "Ελλάδα", "عربي"):
        assert legible(name, "class 1") == name
    assert legible("\U0010fffd", "class 1") == "class 1"  # a letter of no script


def test_a_caption_is_drawn_with_its_own_letters():
    cell = torch.zeros(1, 28, 28, dtype=torch.uint8)
    drawn = [captioned_picture([("", [(cell, name, LINE)])]).tobytes() for name in ("Ölberg", "Olberg", "Кириллица")]
    assert len({*drawn}) == 3


def test_tables_of_the_terminal_are_aligned_by_columns_not_letters():
    assert aligned([["猫", "1"], ["Ölberg", "2"], ["e\u0301", "3"]]) == "猫      1\nÖlberg  2\ne\u0301       3"
