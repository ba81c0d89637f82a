"""Image files of any format, size and mode."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageOps

from metacv.data.image_files import (
    as_tensor,
    files_below,
    folders_in,
    has_only_folders,
    map_on_threads,
    open_exactly,
    open_image,
    read_classes,
    to_square,
)
from metacv.errors import UserError

RIGHT_IS_TOP = 6  # EXIF orientation: the file's left is the top of the picture


def noise(width: int = 6, height: int = 4) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


COLOR = np.array(noise())
GREY = np.array(noise().convert("L"))
LEFT_HALF = np.arange(24).reshape(4, 6) < 12


def saved(path: Path, image: Image.Image | np.ndarray, **options) -> np.ndarray:
    """The pixels that open_image reads from a file of this image."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **options)
    return np.array(open_image(path))


@pytest.mark.parametrize(("name", "options"), [("a.png", {}), ("a.bmp", {}), ("a.webp", {"lossless": True})])
def test_colour_images_are_read_as_they_are(tmp_path, name, options):
    assert np.array_equal(saved(tmp_path / name, noise(), **options), COLOR)


def test_greyscale_and_one_bit_images_are_greyscale(tmp_path):
    assert np.array_equal(saved(tmp_path / "grey.png", GREY), GREY)
    assert set(saved(tmp_path / "bits.png", noise().convert("1")).flat) == {0, 255}


def test_16_bit_images_are_scaled_to_8_bits(tmp_path):
    assert np.array_equal(saved(tmp_path / "a.png", GREY.astype(np.uint16) * 257), GREY)


def test_32_bit_integers_are_scaled_only_if_they_exceed_255(tmp_path):
    assert saved(tmp_path / "a.tiff", np.array([[510, 255, 0]], np.int32)).tolist() == [[255, 128, 0]]
    assert saved(tmp_path / "b.tiff", np.array([[255, 7, 0]], np.int32)).tolist() == [[255, 7, 0]]


def test_floats_from_0_to_1_may_exceed_the_range_or_be_nan(tmp_path):
    values = (GREY / 255).astype(np.float32)
    assert np.array_equal(saved(tmp_path / "a.tiff", values), GREY)
    values[0, 0], values[0, 1] = 1.02, np.nan
    pixels = saved(tmp_path / "b.tiff", values)
    assert np.array_equal(pixels[1:], GREY[1:])
    assert pixels[0, :2].tolist() == [255, 0]


def test_transparent_pixels_are_white(tmp_path):
    image = noise()
    image.putalpha(Image.fromarray(np.where(LEFT_HALF, 255, 0).astype(np.uint8)))
    assert np.array_equal(saved(tmp_path / "a.png", image), np.where(LEFT_HALF[..., None], COLOR, 255))


def test_cmyk_and_palette_images_become_rgb(tmp_path):
    assert saved(tmp_path / "c.jpg", noise().convert("CMYK"), quality=95).shape == (4, 6, 3)
    assert saved(tmp_path / "p.gif", noise().quantize(4)).shape == (4, 6, 3)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def test_images_are_rotated_as_their_exif_says(tmp_path):
    assert np.array_equal(saved(tmp_path / "a.png", noise(), exif=exif(RIGHT_IS_TOP)), np.rot90(COLOR, -1))


def test_damaged_exif_is_ignored(tmp_path):
    assert np.array_equal(saved(tmp_path / "a.png", noise(), exif=b"Exif\0\0no tags at all"), COLOR)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_large_image_that_is_read_at_a_smaller_scale_is_rotated_too(tmp_path, suffix):
    wide = np.zeros((400, 1200, 3), np.uint8)
    wide[:, :600], wide[:, 600:] = (255, 0, 0), (0, 0, 255)
    Image.fromarray(wide).save(tmp_path / f"a.{suffix}", exif=exif(RIGHT_IS_TOP))
    image = open_image(tmp_path / f"a.{suffix}", 28)
    assert 56 <= min(image.size) < 400
    red, _, blue = as_tensor(to_square(image, 28, "stretch")).float()
    assert min(red[:13].min(), blue[15:].min()) > 240
    assert max(red[15:].max(), blue[:13].max()) < 15


def three_stripes() -> Image.Image:
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = (255, 0, 0)
    wide[:, 80:] = (0, 0, 255)
    return Image.fromarray(wide)


def test_crop_takes_the_middle_square():
    red, _, blue = as_tensor(to_square(three_stripes(), 28, "crop"))
    assert red[:, 2:-2].min() > 240
    assert blue[:, 2:-2].max() < 15


def test_stretch_takes_the_whole_image():
    red, _, blue = as_tensor(to_square(three_stripes(), 28, "stretch"))
    assert [int(red[14, x] > 128) for x in (2, 14, 25)] == [0, 1, 0]
    assert blue[14, 25] > 240


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("notes.txt", b"not an image", "not an image, or damaged"),
        ("empty.jpg", b"", "not an image, or damaged"),
        ("cut.png", None, "not an image, or damaged"),
        ("phone.HEIC", b"\0\0\0\x18ftypheic", "Pillow does not read HEIC: convert it to JPEG or PNG"),
    ],
)
def test_a_file_that_is_not_an_image_is_refused_with_the_reason(tmp_path, name, content, reason):
    noise(100, 100).save(tmp_path / "whole.png")
    (tmp_path / name).write_bytes((tmp_path / "whole.png").read_bytes()[:60] if content is None else content)
    with pytest.raises(UserError, match=f"{name} cannot be read \\({reason}"):
        open_image(tmp_path / name)


def test_postscript_does_not_start_ghostscript(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **options: started.append(arguments))
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    with pytest.raises(UserError, match=r"a.jpg cannot be read \(not an image"):
        open_image(tmp_path / "a.jpg")
    assert not started


def test_a_missing_file_is_refused_with_the_reason(tmp_path):
    with pytest.raises(UserError, match=r"a.png cannot be read \(No such file or directory\)"):
        open_image(tmp_path / "a.png")


def test_an_image_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    noise(100, 100).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"cannot be read .*exceeds limit"):
        open_image(tmp_path / "a.png")


def test_files_of_a_published_data_set_have_the_expected_format(tmp_path):
    noise().save(tmp_path / "a.png")
    noise().save(tmp_path / "b.gif")
    assert np.array_equal(np.array(open_exactly(tmp_path / "a.png", ("JPEG", "PNG"), "RGB")), COLOR)
    assert open_exactly(tmp_path / "a.png", ("PNG",), "L").mode == "L"
    with pytest.raises(UserError, match=r"b.gif is not a readable image"):
        open_exactly(tmp_path / "b.gif", ("JPEG", "PNG"), "RGB")


@pytest.mark.parametrize("count", [0, 3, 1000])
def test_results_of_threads_come_in_the_order_of_the_files(count):
    files = [Path(str(i)) for i in range(count)]
    assert list(map_on_threads("files", lambda path: int(path.name), files)) == list(range(count))


def test_the_first_error_of_a_thread_is_raised():
    def read(path: Path) -> torch.Tensor:
        if path.name == "7":
            raise UserError("7 is damaged")
        return torch.zeros(1, 2, 2)

    with pytest.raises(UserError, match="7 is damaged"):
        read_classes("files", {"a": [Path(str(i)) for i in range(20)]}, read, (1, 2, 2))


def test_hidden_files_and_folders_are_not_listed(tmp_path):
    for name in ("b/c/2.png", "a/1.png", ".trash/3.png", "__MACOSX/4.png", "b/.DS_Store"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert folders_in(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert files_below(tmp_path) == [tmp_path / "a/1.png", tmp_path / "b/c/2.png"]
    assert [has_only_folders(tmp_path / name) for name in (".", "a", "b", "b/c")] == [True, False, True, False]


def raw_exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF with these tags: number, type, count, value of 4 bytes."""
    body = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4)


WRONG_TAGS = {  # all of which Pillow reads, and some of which it cannot write
    "resolution as text": (0x011A, 2, 4, b"abc\0"),
    "width as text": (0x0100, 2, 3, b"ab\0\0"),
    "unit as a float": (0x0128, 11, 1, struct.pack("<f", 1.5)),
    "a folder of tags beyond the end": (0x8769, 4, 1, struct.pack("<I", 99999)),
    "an unknown tag": (0x9C9B, 7, 4, b"abcd"),
}


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("wrong", WRONG_TAGS)
def test_an_image_is_turned_whatever_its_other_exif_tags_are(tmp_path, wrong, kind):
    orientation = (0x0112, 3, 1, struct.pack("<HH", RIGHT_IS_TOP, 0))
    tags = sorted([orientation, WRONG_TAGS[wrong]])
    noise().save(tmp_path / f"a.{kind}", exif=raw_exif(*tags), lossless=True)
    noise().save(tmp_path / f"b.{kind}", lossless=True)
    turned, straight = (np.array(open_image(tmp_path / f"{name}.{kind}")) for name in "ab")
    assert np.array_equal(turned, np.rot90(straight, -1))


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_that_of_pillow(tmp_path, orientation):
    noise().save(tmp_path / "a.png", exif=raw_exif((0x0112, 3, 1, struct.pack("<HH", orientation, 0))))
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.array(open_image(tmp_path / "a.png")), np.array(ImageOps.exif_transpose(image)))


def test_links_to_folders_and_files_are_followed(tmp_path):
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    for place in ("elsewhere/1.png", "elsewhere/deep/2.png"):
        noise().save(tmp_path / place)
    (tmp_path / "root/cat").mkdir(parents=True)
    os.symlink(tmp_path / "elsewhere", tmp_path / "root/cat/more")
    os.symlink(tmp_path / "elsewhere/1.png", tmp_path / "root/cat/0.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "root/dog")
    found = [path.relative_to(tmp_path / "root").as_posix() for path in files_below(tmp_path / "root")]
    assert found == ["cat/0.png", "cat/more/1.png", "cat/more/deep/2.png", "dog/1.png", "dog/deep/2.png"]
    assert [path.name for path in folders_in(tmp_path / "root")] == ["cat", "dog"]


@pytest.mark.parametrize("target", [".", "..", "../cat", "../.."])
def test_a_link_to_a_parent_folder_is_skipped_with_a_message(tmp_path, capsys, target):
    (tmp_path / "root/cat").mkdir(parents=True)
    noise().save(tmp_path / "root/cat/1.png")
    os.symlink(target, tmp_path / "root/cat/loop")
    assert [path.name for path in files_below(tmp_path / "root/cat")] == ["1.png"]
    message = f"metacv: {tmp_path / 'root/cat/loop'} is left out: a link to a folder that contains it\n"
    assert capsys.readouterr().err == message


def test_broken_links_and_pipes_are_skipped_with_a_message(tmp_path, capsys):
    noise().save(tmp_path / "1.png")
    os.symlink("missing", tmp_path / "2.png")
    os.mkfifo(tmp_path / "3.png")
    assert [path.name for path in files_below(tmp_path)] == ["1.png"]
    err = capsys.readouterr().err
    assert f"{tmp_path / '2.png'} is left out: a broken link\n" in err
    assert f"{tmp_path / '3.png'} is left out: neither a file nor a folder\n" in err
