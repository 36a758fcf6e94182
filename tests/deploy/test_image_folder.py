from __future__ import annotations

import os
from pathlib import Path

import pytest

from siamese_deploy.errors import EnvironmentFault, InputDataError
from siamese_deploy.image_folder import scan_image_folder


def test_lists_pictures_sorted_as_bytes_with_their_classes(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.JPEG", "a-x/1.webp", "a/1.tiff", "Z/1.gif", "é/1.bmp", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folder = scan_image_folder(tmp_path)
    # '-' sorts before '/', upper case before lower case, ASCII before the rest; 10 before 2
    assert folder.paths == ("Z/1.gif", "a-x/1.webp", "a/1.tiff", "b/10.JPEG", "b/2.png", "é/1.bmp")
    assert folder.class_names == ("Z", "a", "a-x", "b", "é")
    assert [folder.class_name(i) for i in range(6)] == ["Z", "a-x", "a", "b", "b", "é"]
    assert folder.absolute_path(4) == tmp_path / "b/2.png"


def test_ignores_what_file_managers_leave_behind(pictures: Path) -> None:
    for name in (".DS_Store", ".hidden/1.png", "apple/._0.png", "@eaDir/1.png", "__MACOSX/1.png"):
        (pictures / name).parent.mkdir(exist_ok=True)
        (pictures / name).touch()
    assert len(scan_image_folder(pictures)) == 16


def test_follows_links_and_lists_what_it_left_out(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/1.png").touch()
    (pictures / "linked").symlink_to(tmp_path / "elsewhere")
    (pictures / "gone").symlink_to(tmp_path / "nowhere")
    (pictures / "apple/gone.png").symlink_to(tmp_path / "nowhere.png")
    (pictures / "empty").mkdir()
    (pictures / "loop").symlink_to(pictures / "loop")
    (pictures / "apple/loop.png").symlink_to(pictures / "apple/loop.png")
    os.mkfifo(pictures / "bolt/pipe.png")
    (pictures / "cog/folder.png").mkdir()
    folder = scan_image_folder(pictures)
    assert "linked/1.png" in folder.paths
    assert {(file.path, file.reason) for file in folder.skipped} == {
        ("gone", "broken link"),
        ("loop", "broken link"),
        ("apple/loop.png", "broken link"),
        ("apple/gone.png", "broken link"),
        ("bolt/pipe.png", "not a regular file"),
        ("cog/folder.png", "not a regular file"),
        ("empty", "class folder without a picture"),
    }
    assert "empty" not in folder.class_names


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    os.makedirs(os.fsencode(tmp_path) + b"/caf\xe9")
    open(os.fsencode(tmp_path) + b"/caf\xe9/1.png", "wb").close()
    folder = scan_image_folder(tmp_path)
    assert os.fsencode(folder.paths[0]) == b"caf\xe9/1.png"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((), "no pictures in 0 sub-folders"),
        (("a/readme.txt",), "no pictures in 1 sub-folders"),
        (("1.png", "2.jpg"), "2 pictures lie directly in the folder"),
        (("set/a/1.png", "set/b/1.png"), "did you mean"),
    ],
)
def test_says_why_a_folder_holds_nothing(tmp_path: Path, files: tuple[str, ...], words: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(InputDataError, match=words) as error:
        scan_image_folder(tmp_path)
    assert "<class>/<image>" in str(error.value)


def test_missing_root_and_file_as_root(tmp_path: Path) -> None:
    with pytest.raises(InputDataError, match="no such folder"):
        scan_image_folder(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(InputDataError, match="is a file"):
        scan_image_folder(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_without_permission(pictures: Path) -> None:
    (pictures / "apple").chmod(0)
    folder = scan_image_folder(pictures)
    assert [file.path for file in folder.skipped] == ["apple"]
    pictures.chmod(0)
    try:
        with pytest.raises(EnvironmentFault, match="no permission"):
            scan_image_folder(pictures)
    finally:
        pictures.chmod(0o700)
