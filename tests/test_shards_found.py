"""What a stranger found wrong with archives, and must not come back."""

import errno
import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import run_main, write_shards
from test_shards import labelled, picture, shades, tar_of

import main_pretrain
from util.data.index import Index, Strings
from util.data.source import in_order
from util.datasets import open_dataset, open_labelled
from util.errors import NoSplit, UserError


def test_a_read_only_folder_is_no_error(tmp_path, monkeypatch):
    """The kernel refuses even to remove what is not there."""

    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    index = Index(Strings.pack(["a"]).named("names"), {"id": "x"})
    monkeypatch.setattr("util.data.index.save_file", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    assert index.write(tmp_path / "a.safetensors") is False


def test_classes_of_both_splits_have_one_order(tmp_path):
    for split, names in (("train", "a\nb\n"), ("val", "b\na\n")):
        (tmp_path / split).mkdir()
        tar_of(tmp_path / split / "0.tar", labelled({"0": 0, "1": 0, "2": 1}))
        (tmp_path / split / "classes.txt").write_text(names)
    train, val, _ = open_labelled(str(tmp_path))
    assert [train.classes[label] for label in train.targets] == ["a", "a", "b"]
    assert train.classes == val.classes
    assert val.targets.tolist() == [1, 1, 0]


def test_classes_without_images_keep_their_numbers(tmp_path):
    for split, labels in (("train", [0, 1, 2]), ("val", [0, 2, 2])):
        (tmp_path / split).mkdir()
        names = {str(i): label for i, label in enumerate(labels)}
        tar_of(tmp_path / split / "0.tar", labelled(names))
        (tmp_path / split / "classes.txt").write_text("a\nb\nc\n")
    _, val, classes = open_labelled(str(tmp_path))
    assert (classes, val.targets.tolist(), val.empty) == (3, [0, 2, 2], ["b"])


@pytest.mark.parametrize("text", [b"\xef\xbb\xbfcat\r\nd\xe9g\r\n\r\n", b"cat\nd\xe9g\n \n\n"])
def test_names_of_classes_as_windows_writes_them(text, tmp_path):
    tar_of(tmp_path / "0.tar", labelled({"0": 0, "1": 1}))
    (tmp_path / "classes.txt").write_bytes(text)
    dataset = open_dataset(str(tmp_path), train=True)
    assert (dataset.classes, dataset.empty) == (["cat", os.fsdecode(b"d\xe9g")], [])
    (tmp_path / "list.txt").write_bytes("\ufeff0.tar\r\n\r\n".encode())
    assert len(open_dataset(str(tmp_path / "list.txt"), train=True)) == 2


def test_a_damaged_image_in_a_zip_is_replaced(flags, tmp_path, capsys):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(32):
            archive.writestr(f"{i:02d}.bmp", picture(i, "BMP", 16))
        place = archive.getinfo("07.bmp").header_offset + 30 + 6 + 4
    content = bytearray(path.read_bytes())
    content[place : place + 8] = b"\xff" * 8
    path.write_bytes(content)
    flags = [*flags, "--data_path", path, "--epochs", 1]
    assert run_main(main_pretrain, *flags) == 0
    assert "a.zip: 07.bmp' is not readable" in capsys.readouterr().out


def test_a_tar_of_a_folder_has_what_the_folder_has(tmp_path):
    folder = tmp_path / "in"
    names = ["a/a.png", "a/a.bmp", "a/img.png", "a/img.edited.png", "b/1.PNG", "b/1.png"]
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(shade, "BMP" if name.endswith("bmp") else "PNG"))
    (folder / "README.txt").write_text("words")
    os.link(folder / "a/a.png", folder / "b/linked.png")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(folder, arcname=".")
    dataset = open_dataset(str(tmp_path / "a.tar"), train=True)
    assert sorted(shades(dataset)) == list(range(6))
    assert dataset.left_out["links"] == 1
    assert dataset.classes == ["a", "b"]


def test_splits_in_labelled_tars_are_splits(tmp_path):
    files = labelled({"0": 0, "1": 1, "2": 0}, "train/") | labelled({"3": 1, "4": 0}, "val/")
    path = tar_of(tmp_path / "a.tar", files)
    train, val, classes = open_labelled(str(path))
    assert (len(train), len(val), classes) == (3, 2, 2)
    assert [Path(val.name(i).split(": ")[1]).name for i in range(2)] == ["3.png", "4.png"]
    assert train.groups.tolist() == [3]


CLASSES = ("apple", "bus", "train")  # as CIFAR-100, COCO and VOC have them


def test_a_class_called_train_in_labelled_tars_is_no_split(tmp_path, caplog):
    files = labelled({f"{name}/{i}": n for n, name in enumerate(CLASSES) for i in range(3)}, "voc/")
    path = tar_of(tmp_path / "a.tar", files)
    train, val, _ = open_labelled(str(path), val_fraction=0.3)
    assert (len(train), len(val)) == (6, 3)
    assert f"warning: {path}: all is used: folders named as one split" in caplog.text
    with pytest.raises(NoSplit):
        open_dataset(str(path), train=False)


@pytest.mark.parametrize("root", ["", "test/"])
def test_a_class_called_train_within_splits_is_a_class(root, tmp_path):
    names = {f"{split}/{name}/0": n for split in ("train", "val") for n, name in enumerate(CLASSES)}
    path = tar_of(tmp_path / "a.tar", labelled({"extra/0": 0, **names}, root))
    train, val, _ = open_labelled(str(path))
    for data, split in ((train, "train"), (val, "val")):
        inside = [data.name(i).split(": ")[1] for i in range(len(data))]
        assert inside == [f"{root}{split}/{name}/0.png" for name in CLASSES]
        assert data.left_out["images of no split"] == 1
    path = tar_of(tmp_path / "b.tar", labelled({n: i for n, i in names.items() if "val/" in n}))
    assert len(open_dataset(str(path), train=False)) == 3  # alone, it is one


@pytest.mark.parametrize("root", ["", "test/"])
def test_a_split_in_each_of_several_tars(root, tmp_path):
    """Whose classes may be called as splits are."""
    for number, split in enumerate(("train", "val")):
        names = {f"{split}/{name}/0": n for n, name in enumerate(("train", "val", "bus"))}
        tar_of(tmp_path / f"{number}.tar", labelled(names, root))
    train, val, _ = open_labelled(str(tmp_path))
    for data, split in ((train, "train"), (val, "val")):
        inside = [data.name(i).split(": ")[1] for i in range(len(data))]
        assert inside == [f"{root}{split}/{name}/0.png" for name in ("train", "val", "bus")]


def archive_of(path: Path, files: dict[str, bytes]) -> Path:
    if path.suffix == ".tar":
        return tar_of(path, files)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


BOTH = pytest.mark.parametrize("suffix", [".zip", ".tar"])


@BOTH
def test_what_lies_beside_the_splits_of_an_archive_is_told(suffix, tmp_path, caplog):
    files = {f"{name}/{i}.png": picture(i) for name in CLASSES for i in range(3)}
    path = archive_of(tmp_path / f"a{suffix}", files)
    dataset = open_dataset(str(path), train=True)
    assert (len(dataset), dataset.left_out) == (3, {"images of no split": 6})
    assert f"warning: {path}: train/ is used, not apple, bus" in caplog.text
    path = archive_of(tmp_path / f"b{suffix}", {**files, "val/0.png": picture(0)})
    assert len(open_dataset(str(path), train=False)) == 1
    assert str(path) not in caplog.text
    assert len(open_dataset(str(path), train=True)) == 3
    assert f"warning: {path}: train/ is used, not apple, bus" in caplog.text
    path = archive_of(tmp_path / f"c{suffix}", {n: picture(0) for n in ("bus/0.png", "val/0.png")})
    assert len(open_dataset(str(path), train=False)) == 1
    assert f"warning: {path}: val/ is used, not bus" in caplog.text


@BOTH
@pytest.mark.parametrize("before", ["./", "../", "/", "../../x/./", ""])
def test_images_are_those_of_the_folder_it_was_made_of(before, suffix, tmp_path):
    left = ["@eaDir/3.png", "#recycle/4.png", "A/Thumbs.db", "$RECYCLE.BIN/5.png", ".b/6.png"]
    names = ["A/1.png", "A/__1.png", "B/__2__.png", *left]
    files = {name: picture(shade) for shade, name in enumerate(names)}
    path = archive_of(tmp_path / f"a{suffix}", {f"{before}{n}": c for n, c in files.items()})
    dataset = open_dataset(str(path), train=True)
    assert (shades(dataset), dataset.classes, dataset.left_out) == ([0, 1, 2], ["A", "B"], {})
    assert dataset.name(1) == f"{path}: {before}A/__1.png"
    for name, content in files.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    folder = open_dataset(str(tmp_path / "in"), train=True)
    assert (shades(folder), folder.classes, folder.left_out) == ([0, 1, 2], ["A", "B"], {})


def test_folders_in_zips_of_old_windows_tools_are_folders(tmp_path):
    names = [f"{split}\\{name}\\1.png" for split in ("train", "val") for name in "AB"]
    files = {"train\\": b"", "train\\A\\": b""} | {n: picture(i) for i, n in enumerate(names)}
    path = archive_of(tmp_path / "a.zip", files)
    train, val, _ = open_labelled(str(path))
    assert (shades(train), shades(val), train.classes) == ([0, 1], [2, 3], ["A", "B"])
    assert train.left_out == {}
    assert val.name(1) == f"{path}: val/B/1.png"


@pytest.mark.parametrize("kind", ["USTAR", "GNU", "PAX"])
def test_names_of_images_in_tars_are_whole(kind, tmp_path):
    names = [f"{'long' * 20}/{i}/{'name' * 10}.png" for i in range(2)]  # ustar's has two parts
    names += [f"{'x' * 3000}{i}/\xe9.png" for i in range(2) if kind != "USTAR"]
    with tarfile.open(tmp_path / "a.tar", "w", format=getattr(tarfile, f"{kind}_FORMAT")) as tar:
        for shade, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = len(content := picture(shade))
            tar.addfile(member, io.BytesIO(content))
    dataset = open_dataset(str(tmp_path / "a.tar"), train=True)
    assert shades(dataset) == list(range(len(names)))
    assert [dataset.name(i) for i in range(len(names))] == [f"{tmp_path}/a.tar: {n}" for n in names]


def test_names_of_images_in_zips_are_told_apart(tmp_path):
    """A name without the flag of UTF-8 is in whatever encoding; `zipfile` takes it for cp437."""
    names = ["A/猫.png", "A/犬.png"]
    files = {name: picture(i) for i, name in enumerate(["A/xx.png", "A/yy.png", *names])}
    path = archive_of(tmp_path / "a.zip", files)
    content = path.read_bytes()
    for ascii_name, name in zip((b"A/xx", b"A/yy"), names, strict=True):
        content = content.replace(ascii_name, name[:3].encode("gbk"))
    path.write_bytes(content)
    dataset = open_dataset(str(path), train=True)
    expected = [name.encode("gbk").decode("cp437") for name in names] + names
    assert [dataset.name(i).partition(": ")[2] for i in range(4)] == expected


@pytest.mark.parametrize("pattern", ["p/*/*.tar", "p/{train,val,test}/0.tar", "p", "p/list.txt"])
def test_folders_of_archives_are_splits(pattern, tmp_path, caplog):
    """In a folder whose own name is a split's."""
    root = tmp_path / "test"
    for shade, name in enumerate(("train", "val", "test", "extra")):
        (root / "p" / name).mkdir(parents=True)
        tar_of(root / "p" / name / "0.tar", {"0.png": picture(shade)})
    (root / "p/list.txt").write_text("train/0.tar\nval/0.tar\n")
    if pattern == "p":  # whose splits are not at once in it
        (root / "p").rename(root / "q")
        (root / "p").mkdir()
        (root / "q").rename(root / "p/q")
    assert shades(open_dataset(str(root / pattern), train=True)) == [0]
    assert shades(open_dataset(str(root / pattern), train=False)) == [1]
    assert ("not used, as no split's" in caplog.text) == (pattern != "p/list.txt")


def test_a_folder_of_one_split_tells_nothing(tmp_path):
    (tmp_path / "test").mkdir()
    files = {f"{split}/{i}.png": picture(i) for split in ("train", "val") for i in range(2)}
    tar_of(tmp_path / "test/a.tar", files)
    assert len(open_dataset(f"{tmp_path}/*/*.tar", train=False)) == 2
    assert len(open_dataset(f"{tmp_path}/*/*.tar", train=True)) == 2


def test_archives_that_no_split_names_are_told(tmp_path, caplog):
    for name in ("train-0", "extra-1", "val-0"):
        tar_of(tmp_path / f"{name}.tar", {"0.png": picture(0)})
    assert len(open_dataset(str(tmp_path), train=True)) == 1
    assert f"warning: not used, as no split's: {tmp_path}/extra-1.tar" in caplog.text


def test_labels_that_a_first_json_lacks_are_found(tmp_path):
    files = {"0.png": picture(0), "0.json": b"{}"}
    for i in range(1, 4):
        files |= {f"{i}.png": picture(i), f"{i}.json": b'{"label": %d}' % (i % 2)}
    dataset = open_dataset(str(tar_of(tmp_path / "a.tar", files)), train=True)
    assert dataset.targets.tolist() == [-1, 1, 0, 1]


def test_minus_one_is_no_label(tmp_path):
    path = tar_of(tmp_path / "a.tar", labelled({"0": -1, "1": 10, "2": 2}))
    dataset = open_dataset(str(path), train=True)
    assert (dataset.classes, dataset.targets.tolist()) == (["2", "10"], [-1, 1, 0])


def test_numbers_written_differently_are_in_one_order():
    assert in_order({"1", "001", "01", "2"}) == ["001", "01", "1", "2"]


def test_names_may_be_of_any_bytes(tmp_path):
    """As an old disk has them; of classes, and of the shards in a list."""
    names = [os.fsdecode(name) for name in (b"caf\xe9", "caf\u00e9".encode(), b"tea")]
    for shade, name in enumerate(names):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.png").write_bytes(picture(shade))
    folder = open_dataset(str(tmp_path / "in"), True)
    out = write_shards(tmp_path / "in", tmp_path / "out", "--keep_order")
    (shard,) = out.glob("train/*.tar")
    (shard.parent / names[0]).with_suffix(".tar").write_bytes(shard.read_bytes())
    (shard.parent / "list.txt").write_bytes(b"caf\xe9.tar\n")
    for path in (out, shard.parent / "list.txt"):
        ours = open_dataset(str(path), True)
        assert ours.classes == folder.classes
        assert sorted(ours.classes) == sorted(names)
        assert ours.targets[:3].tolist() == folder.targets.tolist()
        assert shades(ours)[:3] == shades(folder)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("list.txt", b"\xff\xfe", "list.txt: "),
        ("list.txt", "a.tar\n".encode("utf-16"), "list.txt: this is not UTF-8: save it as UTF-8"),
        ("list.txt", b"a.png\n", "not .tar, .zip, .parquet: "),
    ],
)
def test_lists_that_are_none_are_one_line(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "a.png").write_bytes(picture(0))
    with pytest.raises(UserError, match=words):
        open_dataset(str(tmp_path / name), train=True)


def test_archives_named_twice_are_read_once(tmp_path):
    tar_of(tmp_path / "x.tar", {"0.png": picture(0)})
    assert len(open_dataset(f"{tmp_path}/{{x,*}}.tar", train=True)) == 1


def test_sideways_deep_tiffs_are_upright_everywhere(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    values = (np.arange(24, dtype=np.uint16) * 2000).reshape(4, 6)
    tifffile.imwrite(tmp_path / "a.tif", values, extratags=[(274, "H", 1, 6, True)])
    from util.data.images import open_image, to_8_bits

    path = to_8_bits(open_image(str(tmp_path / "a.tif")), "L")
    content = io.BytesIO((tmp_path / "a.tif").read_bytes())
    assert np.array_equal(path, to_8_bits(open_image(content, "a.tif"), "L"))
    assert path.size == (4, 6)
