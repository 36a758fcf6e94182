from __future__ import annotations

import csv
import itertools
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import write_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siamese_deploy.errors import EnvironmentFault, InputDataError, SiameseError, UsageError
from siamese_deploy.image_folder import ImageFolder, scan_image_folder
from siamese_deploy.pair_list import read_pair_list
from siamese_deploy.pairs import Pairs, every_pair, sample_pairs

PLAIN = "left,right,label\napple/0.png,apple/1.png,1\nbolt/0.png,apple/1.png,0\ncog/2.png,door/3.png,0\n"
Named = list[tuple[str, str, bool]]
EXPECTED: Named = [
    ("apple/0.png", "apple/1.png", True),
    ("bolt/0.png", "apple/1.png", False),
    ("cog/2.png", "door/3.png", False),
]


def named(folder: ImageFolder, pairs: Pairs) -> Named:
    return [
        (folder.paths[left], folder.paths[right], same)
        for left, right, same in zip(pairs.left.tolist(), pairs.right.tolist(), pairs.is_same.tolist(), strict=True)
    ]


def listed(tmp_path: Path, text: str | bytes, name: str = "list.csv") -> Path:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path / name


def refusal(file: Path, root: Path, error: type[SiameseError] = InputDataError) -> str:
    with pytest.raises(error) as caught:
        read_pair_list(file, root)
    assert type(caught.value) is error
    assert str(file) in str(caught.value) or str(root) in str(caught.value)
    return str(caught.value)


def test_reads_pairs_in_the_order_of_the_file(pictures: Path, tmp_path: Path) -> None:
    folder, pairs = read_pair_list(listed(tmp_path, PLAIN), pictures)
    assert named(folder, pairs) == EXPECTED
    # the folder holds what is listed, as a scan would
    assert folder.root == pictures
    assert folder.paths == ("apple/0.png", "apple/1.png", "bolt/0.png", "cog/2.png", "door/3.png")
    assert folder.class_names == ("apple", "bolt", "cog", "door")
    assert folder.labels.tolist() == [0, 0, 1, 2, 3]
    assert pairs.fold is None
    assert (pairs.left.dtype, pairs.right.dtype, pairs.is_same.dtype) == (np.int64, np.int64, np.bool_)


LAYOUTS = {
    "crlf": PLAIN.replace("\n", "\r\n"),
    "cr": PLAIN.replace("\n", "\r"),
    "bom": "\ufeff" + PLAIN,
    "bom, crlf and quotes": '\ufeff"left","right","label"\r\n' + PLAIN.partition("\n")[2].replace("\n", "\r\n"),
    "no end of the last line": PLAIN.rstrip("\n"),
    "empty lines": "\n" + PLAIN.replace("\n", "\n\n") + "\n",
    "words": PLAIN.replace(",1\n", ",SAME\n").replace("right,label", "right,LABEL ").replace(",0\n", ", Different\n"),
    "yes and no": PLAIN.replace(",1\n", ",Yes\n").replace(",0\n", ",no\n"),
    "true and false": PLAIN.replace(",1\n", ",True\n").replace(",0\n", ",FALSE\n"),
    "a report's pairs.csv": "left,right,is_same,score,decision\n"
    + "./apple/0.png,apple/1.png,1,0.9,same\nbolt/0.png,apple/1.png,0,0.2,different\ncog/2.png,door/3.png,0,1e-07,x\n",
    "other order": "score,is_same,right,left\n0.1,1,apple/1.png,apple/0.png\n,0,apple/1.png,bolt/0.png\n"
    + '"a\nb,c",0,door/3.png,cog/2.png\n',
    "roundabout paths": PLAIN.replace("bolt/", "././/bolt/./"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_list_however_it_is_written(pictures: Path, tmp_path: Path, layout: str) -> None:
    folder, pairs = read_pair_list(listed(tmp_path, LAYOUTS[layout], "List.CSV"), pictures)
    assert named(folder, pairs) == EXPECTED


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(data=st.data())
def test_gives_back_any_list_that_was_written(pictures: Path, tmp_path: Path, data: st.DataObject) -> None:
    scanned = scan_image_folder(pictures)
    every = every_pair(scanned).listed()
    chosen = data.draw(st.lists(st.integers(0, len(every) - 1), min_size=1, unique=True))
    flip = data.draw(st.lists(st.booleans(), min_size=len(chosen), max_size=len(chosen)))
    rows = [
        (scanned.paths[right], scanned.paths[left], same) if f else (scanned.paths[left], scanned.paths[right], same)
        for f, left, right, same in zip(
            flip, every.left[chosen].tolist(), every.right[chosen].tolist(), every.is_same[chosen].tolist(), strict=True
        )
    ]
    file = tmp_path / "list.csv"
    with file.open("w", newline="", encoding=data.draw(st.sampled_from(["utf-8", "utf-8-sig"]))) as text:
        quoting = data.draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
        writer = csv.writer(text, quoting=quoting, lineterminator=data.draw(st.sampled_from(["\n", "\r\n"])))
        writer.writerow(("left", "right", "label"))
        writer.writerows((left, right, int(same)) for left, right, same in rows)
    folder, pairs = read_pair_list(file, pictures)
    assert named(folder, pairs) == rows
    assert folder.paths == tuple(sorted({path for row in rows for path in row[:2]}))
    assert [folder.class_name(k) for k in range(len(folder))] == [path.partition("/")[0] for path in folder.paths]


def test_the_pairs_csv_of_an_evaluation_can_be_given_back(pictures: Path, tmp_path: Path) -> None:
    scanned = scan_image_folder(pictures)
    pairs = sample_pairs(scanned)
    rows = named(scanned, pairs)
    mirrored = [(right, left) for left, right, _ in rows]
    assert any(row[:2] in mirrored for row in rows)
    text = "left,right,is_same,score\n" + "".join(f"{left},{right},{int(same)},0.5\n" for left, right, same in rows)
    folder, again = read_pair_list(listed(tmp_path, text), pictures)
    assert again.digest(folder) == pairs.digest(scanned)
    assert "is on line" in refusal(listed(tmp_path, text.replace("score", "remark")), pictures)
    left, right, same = next(row for row in rows if row[:2] in mirrored)
    odd = f"left,right,is_same,score\n{left},{right},{int(same)},0.5\n{right},{left},{int(not same)},0.5\n"
    assert "line 3: " in (told := refusal(listed(tmp_path, odd), pictures))
    assert "have the other label on line 2" in told
    twice = f"{text}{rows[3][0]},{rows[3][1]},1,0.5\n"
    assert "line 18: the pair of apple/3.png and" in refusal(listed(tmp_path, twice), pictures)
    assert "is on line 5 already" in refusal(listed(tmp_path, twice), pictures)


def test_strange_names_come_back_as_they_are_on_the_disk(tmp_path: Path) -> None:
    root = tmp_path / "root"
    names = [
        "=1+1/@a.png",
        "a,b/c;d.png",
        "a\"b/'.png",
        "new\nline/cr\r.png",
        "é/日本.png",
        " sp /  .png",
        "b\\c/d.png",
    ]
    names.append(os.fsdecode(b"caf\xe9/\xff.png"))
    write_files(root, dict.fromkeys(names, b""))
    rows: Named = [(left, right, False) for left, right in itertools.combinations(names, 2)]
    text = "left,right,label\n" + "".join(
        '"./{}","{}",0\n'.format(*(name.replace('"', '""') for name in row[:2])) for row in rows
    )
    folder, pairs = read_pair_list(listed(tmp_path, os.fsencode(text)), root)
    assert named(folder, pairs) == rows
    assert folder.paths == scan_image_folder(root).paths
    assert folder.class_names == scan_image_folder(root).class_names


def test_the_class_is_the_folder_at_any_depth(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_files(root, dict.fromkeys(["0.png", "a/0.png", "a/b/0.png", "a/b/1.png", "a/c.png"], b""))
    text = "left,right,label\n0.png,a/0.png,0\na/b/0.png,a/b/1.png,1\na/c.png,a/0.png,1\n"
    folder, _ = read_pair_list(listed(tmp_path, text), root)
    assert folder.class_names == (".", "a", "a/b")
    assert [folder.class_name(k) for k in range(5)] == [".", "a", "a/b", "a/b", "a"]


BAD_ROWS = {
    "missing picture": ("apple/9.png,apple/1.png,1", ["line 3", "no picture 'apple/9.png' in"]),
    "missing on the right": ("apple/2.png,apple/9.png,1", ["line 3", "no picture 'apple/9.png'"]),
    "a folder": ("apple,apple/1.png,1", ["line 3", "no picture 'apple'"]),
    "a file as a folder": ("apple/1.png/x.png,apple/1.png,1", ["line 3", "no picture"]),
    "a name that is too long": ("a" * 300 + ",apple/1.png,1", ["line 3", "no picture", "aaa..."]),
    "no name": (",apple/1.png,1", ["line 3", "no path of a picture, got ''"]),
    "the root": ("./.,apple/1.png,1", ["line 3", "no path of a picture"]),
    "absolute": ("/apple/2.png,apple/1.png,1", ["line 3", "an absolute path; expected one relative to"]),
    "above the root": ("../pictures/apple/2.png,apple/1.png,1", ["line 3", "leads out of a folder", "without .."]),
    "bad label": ("apple/2.png,apple/1.png,maybe", ["line 3", "label 'maybe': expected 1 or 0, true or false"]),
    "label 2": ("apple/2.png,apple/1.png,2", ["line 3", "label '2'"]),
    "empty label": ("apple/2.png,apple/1.png,", ["line 3", "label ''"]),
    "too few columns": ("apple/2.png,apple/1.png", ["line 3", "expected 3 columns, as in the header, got 2"]),
    "too many columns": ("apple/2.png,apple/1.png,1,", ["line 3", "got 4"]),
    "itself": ("apple/2.png,apple/2.png,1", ["line 3", "apple/2.png is paired with itself"]),
    "itself in other words": ("apple/2.png,./apple//2.png,1", ["line 3", "paired with itself"]),
    "duplicate": ("apple/0.png,apple/1.png,1", ["line 3", "apple/0.png and apple/1.png is on line 2 already"]),
    "mirrored duplicate": ("apple/1.png,./apple/0.png,0", ["line 3", "is on line 2 already"]),
    "backslashes": (r"apple\2.png,apple/1.png,1", ["line 3", "write paths with slashes"]),
    "spaces": ("apple/2.png, apple/1.png,1", ["line 3", "without the spaces"]),
    "unclosed quote": ('"apple/2.png,apple/1.png,1', ["line 3", "not CSV (unexpected end of data)"]),
    "text behind a quote": ('"apple/2.png"x,apple/1.png,1', ["line 3", "not CSV"]),
    "NUL": ("apple/2.png,apple/1.png\0,1", ["line 3", "a NUL byte; expected text in UTF-8"]),
    "an endless line": ("a" * 70_000, ["line 3", "longer than 65,536 characters"]),
    "an endless field": ('"' + "a\n" * 70_000, ["line 3", "field larger than field limit"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_bad_row_is_refused_with_its_line(pictures: Path, tmp_path: Path, case: str, end: str) -> None:
    row, words = BAD_ROWS[case]
    message = refusal(listed(tmp_path, end.join(["left,right,label", "apple/0.png,apple/1.png,1", row])), pictures)
    for word in words:
        assert word in message
    assert len(message) < 1000


def test_lines_are_counted_where_records_start(pictures: Path, tmp_path: Path) -> None:
    rows = [
        "left,note,right,label",
        "",
        'apple/0.png,"three\nlines\r\nlong",apple/1.png,1',
        "",
        'bolt/0.png,"a\nb",x,0',
    ]
    assert "line 7: no picture 'x'" in refusal(listed(tmp_path, "\n".join(rows)), pictures)
    rows[-1] = rows[2]
    assert "line 7: the pair" in refusal(listed(tmp_path, "\n".join(rows)), pictures)
    assert "is on line 3 already" in refusal(listed(tmp_path, "\n".join(rows)), pictures)
    rows += [rows[2]]  # the first that comes again, not the last
    assert "line 7: the pair" in refusal(listed(tmp_path, "\n".join(rows)), pictures)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("left;right;label\n", ["line 1", "separated by semicolons", "separated by commas"]),
        ("left\tright\tlabel\n", ["line 1", "separated by tabs"]),
        ("a.png,b.png,1\n", ["line 1", "no column left, found 'a.png', 'b.png', '1'; expected a header row"]),
        ("left,label\n", ["line 1", "no column right, found 'left', 'label'"]),
        ("left,right,same\n", ["line 1", "no column label, found 'left', 'right', 'same'"]),
        ("left,right,left,label\n", ["line 1", "2 columns left"]),
        ("left,right,label,is_same\n", ["line 1", "2 columns label"]),
        ("\n\nleft,right\n", ["line 3", "no column label"]),
        ("", ["is empty; expected a header row"]),
        ("\ufeff", ["is empty"]),
        ("left,right,label\n\n", ["no pairs, only a header row"]),
        (PLAIN.encode("utf-16"), ["line 1", "a NUL byte; expected text in UTF-8"]),
        (b"PK\3\4\0\0", ["line 1", "a NUL byte"]),
    ],
)
def test_a_file_without_our_columns_or_rows_is_refused(
    pictures: Path, tmp_path: Path, text: str | bytes, words: list[str]
) -> None:
    message = refusal(listed(tmp_path, text), pictures)
    assert message.startswith(str(tmp_path / "list.csv"))
    for word in words:
        assert word in message


def test_what_is_no_list_or_no_root_is_refused(pictures: Path, tmp_path: Path) -> None:
    good = listed(tmp_path, PLAIN)
    assert "nowhere.csv: No such file" in refusal(tmp_path / "nowhere.csv", pictures)
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    for name in ("folder.csv", "pipe.txt"):
        assert "not a regular file" in refusal(tmp_path / name, pictures)
    for name in ("list.tsv", "list", "al"):
        message = refusal(tmp_path / name, pictures, UsageError)
        assert "ends in .csv, or .txt" in message
    assert "no such folder" in refusal(good, tmp_path / "nowhere")
    assert "is a file; expected the folder" in refusal(good, good)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_the_environments_fault(pictures: Path, tmp_path: Path) -> None:
    file = listed(tmp_path, PLAIN)
    (pictures / "cog").chmod(0)
    assert "line 4: no permission" in refusal(file, pictures, EnvironmentFault)
    (pictures / "cog").chmod(0o700)
    file.chmod(0)
    assert "no permission to read this file" in refusal(file, pictures, EnvironmentFault)


def test_a_pair_costs_a_few_dozen_bytes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_files(root, dict.fromkeys([f"{k:03}.png" for k in range(250)], b""))
    rows = [f"{a:03}.png,{b:03}.png,{(a + b) % 2}" for a, b in itertools.combinations(range(250), 2)]
    file = listed(tmp_path, "\n".join(["left,right,label", *rows]))
    tracemalloc.start()
    try:
        _, pairs = read_pair_list(file, root)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(pairs) == 31_125
    assert peak / len(pairs) < 80


LFW = {
    "Ann_B": ["0001.jpg", "0002.jpg", "0010.JPG", "0011.png"],
    "Cy_D": ["0001.jpg", "0001.png", "0002.jpeg"],
    "Eve": ["0003.jpg", "0004.jpg"],
}
FOLDS = (
    "2\t2\nAnn_B\t1\t2\nAnn_B\t1\t10\nAnn_B\t2\tCy_D\t1\nEve\t3\tCy_D\t2\n"
    "Cy_D\t1\t2\nEve\t3\t4\nAnn_B\t11\tEve\t4\nCy_D\t1\tEve\t3\n"
)


@pytest.fixture
def lfw(tmp_path: Path) -> Path:
    write_files(tmp_path / "lfw", {f"{name}/{name}_{end}": b"" for name, ends in LFW.items() for end in ends})
    return tmp_path / "lfw"


@pytest.mark.parametrize(
    "text",
    [FOLDS, FOLDS.replace("\t", "  "), FOLDS.replace("\n", "\t\n"), "\ufeff" + FOLDS.replace("\n", " \r\n") + "\r\n"],
)
def test_reads_the_folds_of_labeled_faces_in_the_wild(lfw: Path, tmp_path: Path, text: str) -> None:
    folder, pairs = read_pair_list(listed(tmp_path, text, "pairs.txt"), lfw)
    assert named(folder, pairs) == [
        ("Ann_B/Ann_B_0001.jpg", "Ann_B/Ann_B_0002.jpg", True),
        ("Ann_B/Ann_B_0001.jpg", "Ann_B/Ann_B_0010.JPG", True),
        ("Ann_B/Ann_B_0002.jpg", "Cy_D/Cy_D_0001.jpg", False),  # .jpg before .png
        ("Eve/Eve_0003.jpg", "Cy_D/Cy_D_0002.jpeg", False),
        ("Cy_D/Cy_D_0001.jpg", "Cy_D/Cy_D_0002.jpeg", True),
        ("Eve/Eve_0003.jpg", "Eve/Eve_0004.jpg", True),
        ("Ann_B/Ann_B_0011.png", "Eve/Eve_0004.jpg", False),
        ("Cy_D/Cy_D_0001.jpg", "Eve/Eve_0003.jpg", False),
    ]
    assert pairs.fold is not None
    assert pairs.fold.dtype == np.int64
    assert pairs.fold.tolist() == [0] * 4 + [1] * 4
    assert folder.class_names == ("Ann_B", "Cy_D", "Eve")


def test_one_number_is_one_fold_and_tabs_allow_spaces_in_names(lfw: Path, tmp_path: Path) -> None:
    write_files(lfw, {"Zoe X/Zoe X_0001.bmp": b""})
    text = "1\nAnn_B\t1\t2\nAnn_B\t1\tZoe X\t1\n"
    folder, pairs = read_pair_list(listed(tmp_path, text, "pairsDevTest.TXT"), lfw)
    assert named(folder, pairs)[1] == ("Ann_B/Ann_B_0001.jpg", "Zoe X/Zoe X_0001.bmp", False)
    assert pairs.fold is not None
    assert pairs.fold.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "2\t2\n",
            "4\n",
            ["line 4", "expected a pair of the same name here (name, number, number), got 'Ann_B 2 Cy_D 1'"],
        ),
        ("2\t2\n", "4 1\n", ["line 3", "expected a pair of different names here (name, number, name, number)"]),
        ("2\t2\n", "3 2\n", ["line 9", "ends after 8 pairs; the first line announces 12"]),
        ("2\t2\n", "1 2\n", ["line 6", "more pairs than there should be; the first line announces 4"]),
        ("2\t2\n", "2 0\n", ["line 1", "expected the number of folds"]),
        ("2\t2\n", "", ["line 1", "expected the number of folds"]),
        ("2\t2\n", "2\t2\t2\n", ["line 1", "expected the number of folds"]),
        ("2\t2\n", "left,right,label\n", ["line 1", "needs a name that ends in .csv"]),
        (FOLDS, "", ["is empty"]),
        (FOLDS, "10 300\n", ["line 1", "ends after 0 pairs; the first line announces 6,000"]),
        ("Eve\t3\t4", "Eve\t3\t5", ["line 7", "no picture Eve/Eve_0005 with one of .jpg"]),
        ("Eve\t3\t4", "Eve\t3\t3", ["line 7", "Eve/Eve_0003.jpg is paired with itself"]),
        ("Eve\t3\t4", "Eve\t3\tx", ["line 7", "expected a pair of the same name", "'Eve 3 x'"]),
        ("Eve\t3\t4", "Ann_B\t2\t1", ["line 7", "is on line 2 already"]),
        ("Cy_D\t1\tEve\t3", "Eve\t4\tEve\t3", ["line 9", "both pictures are of Eve"]),
        ("Cy_D\t1\tEve\t3", "../lfw/Cy_D\t1\tEve\t3", ["line 9", "'../lfw/Cy_D' is no name of a folder"]),
        ("Cy_D\t1\tEve\t3", "..\t1\tEve\t3", ["line 9", "'..' is no name of a folder"]),
        ("Cy_D\t1\tEve\t3", "Cy_D\t1\tEve", ["line 9", "expected a pair of different names"]),
        ("Cy_D\t1\tEve\t3", "Cy_D\t1\tEve\t3\0", ["line 9", "a NUL byte"]),
    ],
)
def test_a_bad_line_of_pairs_txt_is_refused(lfw: Path, tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in FOLDS
    message = refusal(listed(tmp_path, FOLDS.replace(old, new), "pairs.txt"), lfw)
    for word in words:
        assert word in message
