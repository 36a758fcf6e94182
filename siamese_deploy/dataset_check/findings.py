"""What can be wrong with a data set: a code for each, how serious it is, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Severity: TypeAlias = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Kind:
    severity: Severity
    title: str
    """What the findings of this kind are; their number follows in brackets."""
    advice: str


KINDS = {
    "same-folder": Kind("error", "one folder given twice", "give two folders"),
    "leakage": Kind("error", "pictures in both folders", "take them out of one: they make the evaluation too good"),
    "label-conflict": Kind("error", "pictures in more than one class", "keep each in the class it belongs to"),
    "unreadable": Kind("error", "pictures that cannot be used", "replace or remove them; they are skipped"),
    "unread-folder": Kind("error", "class folders that cannot be read", "give yourself permission to read them"),
    "one-class": Kind("error", "no different pairs can be made", "add a second class"),
    "no-class-of-two": Kind("error", "no same pairs can be made", "add a second picture to some classes"),
    "near-leakage": Kind("warning", "near duplicates in both folders", "look at them in the contact sheet"),
    "near-conflict": Kind("warning", "near duplicates across classes", "look at them in the contact sheet"),
    "shared-class": Kind("warning", "classes in both folders", "an open-set test needs classes not trained on"),
    "class-twins": Kind("warning", "classes with almost the same name", "join them if they are one class"),
    "empty-class": Kind("warning", "class folders without a usable picture", "they are left out"),
    "one-picture": Kind("warning", "classes with one picture", "they never make a same pair; add pictures"),
    "imbalance": Kind("warning", "very unequal classes", "large classes decide training and figures"),
    "duplicate": Kind("warning", "pictures more than once in a class", "keep one: equal pictures teach nothing"),
    "in-root": Kind("warning", "pictures outside of any class", "move them into a class folder"),
    "too-deep": Kind("warning", "pictures too deep to be used", "pictures are read from <class>/<picture> only"),
    "unknown-extension": Kind("warning", "pictures without a known extension", "they are ignored; rename them"),
    "unsupported-format": Kind("warning", "pictures of a format that is not read", "convert them to PNG or JPEG"),
    "broken-link": Kind("warning", "broken links", "they are left out; remove or repair them"),
    "link-loop": Kind("warning", "links to a folder that they lie in", "remove them"),
    "link-outside": Kind("warning", "links out of the data set", "they are followed; copy the files instead"),
    "not-a-file": Kind("warning", "pipes, devices or folders named like pictures", "never opened; remove them"),
    "flat": Kind("warning", "pictures of almost one colour", "they show nothing that could be learnt"),
    "exif": Kind("warning", "pictures whose EXIF data is damaged", "look whether they are upright"),
    "wrong-extension": Kind("note", "pictures named like another format", "they are read by their content"),
    "multi-frame": Kind("note", "animations or files with several pages", "only the first frame is used"),
    "tiny": Kind("note", "very small pictures", "they are enlarged; details are missing"),
    "near-duplicate": Kind("note", "near duplicates within classes", "they are same pairs that say little"),
    "odd-name": Kind("note", "names that are not plain UTF-8 text", "they work here, perhaps not in other programs"),
    "hidden": Kind("note", "hidden files", "they are ignored"),
    "not-run": Kind("note", "checks that were not made", "see the reason"),
}
"""By code, in the order of a report: errors first."""


@dataclass(frozen=True)
class Finding:
    code: str
    """One of KINDS."""
    paths: tuple[str, ...]
    """The files or folders concerned, as the folder was given plus the path in it; names that are not UTF-8 keep
    their bytes as Python's surrogate escapes."""
    message: str
    """What is wrong with them, without their paths; never empty, and begins with text of ours."""

    @property
    def severity(self) -> Severity:
        return KINDS[self.code].severity


def in_report_order(findings: Iterable[Finding]) -> list[Finding]:
    """By kind as in KINDS; findings of one kind stay in the order they came in."""
    order = {code: place for place, code in enumerate(KINDS)}
    return sorted(findings, key=lambda finding: order[finding.code])
