"""The image bank and its cache."""

import errno
from pathlib import Path

import pytest
import torch
from conftest import bank_of

from metacv.data.bank import Dataset, ImageBank, cached_bank
from metacv.errors import UserError


def make() -> ImageBank:
    return bank_of([3, 2, 4])


def refuse() -> ImageBank:
    raise AssertionError("made again although it is in the cache")


def cache_file(data_dir: Path) -> Path:
    (path,) = (data_dir / "cache").iterdir()
    return path


def test_selected_classes_keep_their_images_and_names():
    bank = make()
    selected = bank.select("two", [2, 0])
    assert (selected.name, selected.class_names, selected.sizes.tolist()) == ("two", ("class2", "class0"), [4, 3])
    assert torch.equal(selected.images, torch.cat([bank.images[5:9], bank.images[:3]]))


def test_the_fingerprint_depends_on_images_and_classes():
    bank = make()
    changed = bank.images.clone()
    changed[0, 0, 3, 3] += 1
    others = [
        ImageBank("b", changed, bank.offsets, bank.class_names),
        ImageBank("b", bank.images, torch.tensor([0, 2, 5, 9]), bank.class_names),
    ]
    assert make().fingerprint == bank.fingerprint
    assert len({bank.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_a_cached_bank_is_made_once_for_each_set_of_settings(tmp_path):
    first = cached_bank(tmp_path, "toy", {"size": 4}, make)
    again = cached_bank(tmp_path, "toy", {"size": 4}, refuse)
    assert (again.fingerprint, again.class_names) == (first.fingerprint, first.class_names)
    other = cached_bank(tmp_path, "toy", {"size": 5}, lambda: bank_of([1]))
    assert len(other.images) == 1


def test_two_programs_that_make_a_bank_at_once_leave_one_whole_file(tmp_path):
    def make_second() -> ImageBank:
        cached_bank(tmp_path, "toy", {}, make)  # by the other program, which is done first
        return make()

    assert cached_bank(tmp_path, "toy", {}, make_second).fingerprint == make().fingerprint
    assert cached_bank(tmp_path, "toy", {}, refuse).fingerprint == make().fingerprint
    assert cache_file(tmp_path).suffix == ".pt"


def test_cache_files_have_the_same_names_as_in_version_1(tmp_path):
    cached_bank(tmp_path, "omniglot-28-lanczos", {"size": 28, "resample": "lanczos"}, make)
    assert cache_file(tmp_path).name == "omniglot-28-lanczos-656fe348bf0c20b2.pt"


DAMAGE = {
    "cut short": lambda path, whole, content: path.write_bytes(whole[:1000]),
    "one byte changed": lambda path, whole, content: path.write_bytes(
        whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
    ),
    "something else": lambda path, whole, content: torch.save(None, path),
    "wrong type": lambda path, whole, content: torch.save(content | {"images": content["images"].float()}, path),
    "image missing": lambda path, whole, content: torch.save(content | {"images": content["images"][1:]}, path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_file_is_replaced_with_one_line(tmp_path, capsys, damage):
    bank = bank_of([100, 100])
    cached_bank(tmp_path, "toy", {}, lambda: bank)
    path = cache_file(tmp_path)
    DAMAGE[damage](path, path.read_bytes(), torch.load(path, weights_only=True))
    assert cached_bank(tmp_path, "toy", {}, lambda: bank).fingerprint == bank.fingerprint
    error = capsys.readouterr().err
    assert error.startswith(f"metacv: {path} cannot be read (")
    assert error.count("\n") == 1
    assert cached_bank(tmp_path, "toy", {}, refuse).fingerprint == bank.fingerprint
    assert capsys.readouterr().err == ""


def test_an_unwritable_cache_folder_is_reported_in_one_line(tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert cached_bank(tmp_path, "toy", {}, make).fingerprint == make().fingerprint
    assert "continuing without a cache" in capsys.readouterr().err


def test_a_full_disk_or_a_destroyed_file_only_disables_the_cache(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def destroyed(path: Path, _):
        path.write_bytes(b"half")

    for write, reason in ((full, "No space left on device"), (destroyed, "BadZipFile")):
        monkeypatch.setattr("metacv.data.bank.write_atomically", write)
        assert cached_bank(tmp_path, "toy", {}, make).fingerprint == make().fingerprint
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"({reason}); continuing without a cache" in error


def test_a_cached_bank_is_memory_mapped_so_that_programs_share_it(tmp_path):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux lists mapped files")
    for _ in range(2):  # just made, and loaded
        bank = cached_bank(tmp_path, "toy", {}, make)
        address = bank.images.data_ptr()
        (line,) = [
            line for line in maps.read_text().splitlines()
            if int(line.split("-")[0], 16) <= address < int(line.split(" ")[0].split("-")[1], 16)
        ]  # fmt: skip
        assert str(cache_file(tmp_path)) in line


class Toy(Dataset):
    def load(self, split: str) -> ImageBank:
        return make()


def test_a_data_set_without_read_is_reported(tmp_path):
    with pytest.raises(UserError, match="Toy does not define how image files are read"):
        Toy(tmp_path).read(tmp_path / "a.png")


def test_train_has_its_own_rotation_and_val_and_test_share_one(tmp_path):
    dataset = Toy(tmp_path, train_rotation="as_classes", test_rotation="per_class")
    assert [dataset.rotation(split) for split in ("train", "val", "test")] == ["as_classes", "per_class", "per_class"]
