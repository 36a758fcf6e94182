"""`siamese gallery`: enrol pictures under names, and find out whose a picture is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from siamese_deploy.cli.cache import warn_of_network
from siamese_deploy.cli.command import PATH, Command, DecidingCommand
from siamese_deploy.cli.run_log import log, log_at_end, log_skipped, warn
from siamese_deploy.cli.runtime_options import (
    RuntimeOptions,
    describe,
    report_cache,
    runtime_options,
    tell_provider,
    warn_of_cache,
)
from siamese_deploy.cli.verify import NO_MATCH, check_threshold
from siamese_deploy.errors import InputDataError, UsageError, one_line

if TYPE_CHECKING:
    from siamese_deploy.gallery import Enrolment, Identification


@click.group(name="gallery", no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Enrol pictures under names, and find out whose a picture is.

    A gallery is a folder that belongs to one bundle. It holds embeddings, and the paths of the pictures they are of.
    """


@main.command(cls=Command)
@click.argument("gallery", type=PATH)
@click.argument("source", nargs=-1, required=True, type=PATH)
@runtime_options
@click.option("--name", help="Whose pictures they are; without it SOURCE is a folder with one sub-folder per identity.")
@click.option("--add", is_flag=True, help="Add to identities that are enrolled already.")
@click.option("--replace", is_flag=True, help="Replace what identities are enrolled with.")
@click.option("--no_doubles", is_flag=True, help="Do not look for others whom the new pictures match (slow for many).")
def enrol(
    gallery: Path,
    source: tuple[Path, ...],
    runtime: RuntimeOptions,
    name: str | None,
    add: bool,
    replace: bool,
    no_doubles: bool,
) -> None:
    """Enrol the pictures SOURCE in GALLERY, which is made if it is not there.

    Each identity is enrolled whole or not at all, and stays once it is. Started again, a stopped run goes on.
    """
    if add and replace:
        raise UsageError("--add and --replace: expected one of them")
    if name is None and len(source) != 1:
        raise UsageError("several SOURCEs need --name; without it expected one folder with a sub-folder per identity")
    from siamese_deploy.gallery import Gallery, check_name, twins
    from siamese_deploy.image_folder import scan_image_folder

    if name is not None:
        check_name(name)
    folder = None if name is not None else scan_image_folder(source[0])
    log_skipped(source[0], folder.skipped if folder else ())
    cache = runtime.open_cache()
    verifier = runtime.open_verifier(cache, throughput=True)
    click.echo(describe(verifier))
    opened = Gallery(gallery, verifier, create=True)
    warn_of_network(gallery, "let only one process write to it")
    how = {"add": add, "replace": replace, "doubles": not no_doubles}
    if folder is not None:
        enrolment = opened.enrol_folder(folder, **how, show_progress=sys.stderr.isatty())
        log_skipped(None, enrolment.skipped)
        enrolment.skipped += folder.skipped
    else:
        enrolment = opened.enrol(str(name), list(source), **how)
        log_skipped(None, enrolment.skipped)
    for file in enrolment.refused:
        log("refused", file.code, file.reason, name=file.path)
    log_at_end(
        pictures=enrolment.pictures,
        identities=enrolment.identities,
        files_skipped=len(enrolment.skipped),
        identities_refused=len(enrolment.refused),
    )
    click.echo(f"enrolled: {enrolment.pictures} pictures of {enrolment.identities} identities")
    report_cache(cache)
    _warn(enrolment)
    for one, other in twins(sorted({picture.name for picture in opened.store.pictures()})):
        warn("class-twins", f"warning: {one!r} and {other!r} differ only in case or Unicode form")
    if enrolment.refused:
        first = enrolment.refused[0]
        raise InputDataError(
            f"{len(enrolment.refused)} identities were not enrolled (first: {first.path}: {first.reason})",
            code=first.code,
        )


def _warn(enrolment: Enrolment) -> None:
    if enrolment.skipped:
        first = enrolment.skipped[0]
        text = f"skipped {len(enrolment.skipped)} files (first: {first.path}: {first.reason})"
        click.echo(one_line(text), err=True)
    if enrolment.doubles:
        text = f"warning: {len(enrolment.doubles)} pictures match somebody else (first: {enrolment.doubles[0]})"
        warn("gallery-double", text)


@main.command(cls=Command, name="list")
@click.argument("gallery", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="One JSON object with every picture.")
def list_command(gallery: Path, as_json: bool) -> None:
    """List who is enrolled in GALLERY."""
    from siamese_deploy.gallery.store import GalleryStore

    store = GalleryStore(gallery)
    digest, dim = store.model()
    with store.snapshot() as snapshot:
        pictures = snapshot.pictures()
        sound = {int(slot) for row, _ in snapshot.sound_vectors() for slot in snapshot.rows.slots[row]}
    damaged = {picture.slot for picture in pictures if picture.damaged or picture.slot not in sound}
    if as_json:
        rows = [
            {
                "name": picture.name,
                "source": picture.source.encode("utf-8", "backslashreplace").decode(),
                "sha256": picture.sha256.hex(),
                "enrolled_utc": picture.enrolled_utc,
                "damaged": picture.slot in damaged,
            }
            for picture in pictures
        ]
        click.echo(json.dumps({"bundle_digest": digest, "embedding_dim": dim, "pictures": rows}, indent=2))
    else:
        counts: dict[str, int] = {}
        for picture in pictures:
            counts[picture.name] = counts.get(picture.name, 0) + 1
        for name, count in counts.items():
            click.echo(one_line(f"{count:6}  {name}"))
        click.echo(f"{len(counts)} identities, {len(pictures)} pictures, bundle {digest[:12]}")
    if damaged:
        names = sorted({picture.name for picture in pictures if picture.slot in damaged})
        text = f"warning: {len(damaged)} rows are damaged and are never matched (first: {names[0]}); enrol them again"
        warn("gallery-rows-damaged", text)


@main.command(cls=Command)
@click.argument("gallery", type=PATH)
@click.argument("name", nargs=-1, required=True)
def remove(gallery: Path, name: tuple[str, ...]) -> None:
    """Remove identities from GALLERY: all that are named, or none. Their embeddings are overwritten on the disk."""
    from siamese_deploy.gallery import check_name
    from siamese_deploy.gallery.store import GalleryStore

    for one in name:
        check_name(one)
    count = GalleryStore(gallery).remove(name)
    click.echo(f"removed: {count} pictures of {len(set(name))} identities")


@main.command(cls=DecidingCommand)
@click.argument("gallery", type=PATH)
@click.argument("picture", type=PATH)
@runtime_options
@click.option("--top", type=click.IntRange(1), default=5, help="Candidates to show.")
@click.option(
    "--per_identity", type=click.Choice(("max", "mean")), default="max", help="Over the pictures of an identity."
)
@click.option("--threshold", type=float, help="Accept from this score on, 0 to 1.  [default: the bundle's]")
@click.option("--margin", type=float, default=0.0, help="The best must be ahead of the second by more than this.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def identify(
    gallery: Path,
    picture: Path,
    runtime: RuntimeOptions,
    threshold: float | None,
    margin: float,
    as_json: bool,
    **how: Any,
) -> None:
    """Whose is PICTURE? Exit code 0 means a match, 10 none: also if the gallery is empty or two are as like it."""
    check_threshold(threshold)
    from siamese_deploy.gallery import Gallery

    cache = runtime.open_cache()
    verifier = runtime.open_verifier(cache)
    found = Gallery(gallery, verifier).identify(picture, threshold=threshold, min_margin=margin, **how)
    tell_provider(verifier)
    warn_of_cache(cache)
    if found.damaged:
        text = f"warning: {found.damaged} rows of {gallery} are damaged and were not compared; see siamese gallery list"
        warn("gallery-rows-damaged", text)
    best = found.candidates[0] if found.candidates else None
    log(
        "decision",
        code=_code_of(found) or "",
        decision=found.decision,
        gallery=str(gallery),
        picture=str(picture),
        name=found.name,
        score=best and round(best.score, 4),
        threshold=round(found.threshold, 4),
    )
    if as_json:
        click.echo(json.dumps(_as_json(found, verifier.model_digest, verifier.provider), indent=2))
    else:
        for candidate in found.candidates:
            click.echo(one_line(f"{candidate.score:.4f}  {candidate.name}  ({candidate.pictures} pictures)"))
        ahead = "" if found.margin is None else f", margin {found.margin:.4f}"
        name = "" if found.name is None else f" {found.name}"
        empty = "" if found.candidates or found.damaged else " (the gallery is empty)"
        click.echo(one_line(f"{found.decision}{name}{empty}: threshold {found.threshold:.4f}{ahead}"))
    if found.name is None:
        sys.exit(NO_MATCH)


def _code_of(found: Identification) -> str | None:
    """Why there is no match."""
    if found.name is not None:
        return None
    if not found.candidates:
        return "gallery-rows-damaged" if found.damaged else "gallery-empty"
    return "ambiguous" if found.decision == "ambiguous" else "below-threshold"


def _as_json(found: Identification, bundle_digest: str, provider: str) -> dict[str, Any]:
    return {
        "decision": found.decision,
        "code": _code_of(found),
        "name": found.name,
        "candidates": [vars(candidate) for candidate in found.candidates],
        "threshold": found.threshold,
        "margin": found.margin,
        "damaged_rows": found.damaged,
        "bundle_digest": bundle_digest,
        "provider": provider,
    }


@main.command(cls=Command)
@click.argument("gallery", type=PATH)
@click.argument("target", type=PATH)
def export(gallery: Path, target: Path) -> None:
    """Write GALLERY as gallery.csv and embeddings.npy into the new folder TARGET."""
    from siamese_deploy.gallery.copies import export_gallery

    count = export_gallery(gallery, target)
    click.echo(one_line(f"written: {target}/gallery.csv and embeddings.npy, {count} rows"))


@main.command(cls=Command)
@click.argument("gallery", type=PATH)
@runtime_options
def reembed(gallery: Path, runtime: RuntimeOptions) -> None:
    """Bind GALLERY to another bundle: embed its pictures again from where they were enrolled, all of them or none."""
    from siamese_deploy.gallery.copies import reembed as embed_again

    cache = runtime.open_cache()
    verifier = runtime.open_verifier(cache, throughput=True)
    click.echo(describe(verifier))
    count = embed_again(gallery, verifier, show_progress=sys.stderr.isatty())
    click.echo(f"embedded again: {count} pictures, bundle {verifier.model_digest[:12]}")
    report_cache(cache)
