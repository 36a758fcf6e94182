"""Options of every command that runs a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from siamese_deploy.cli.command import PATH
from siamese_deploy.cli.run_log import log_at_end, warn
from siamese_deploy.errors import UsageError, one_line
from siamese_deploy.providers import CHOICES

if TYPE_CHECKING:
    from siamese_deploy.embedding_cache import EmbeddingCache
    from siamese_deploy.runtime import OnnxVerifier


@dataclass(frozen=True)
class RuntimeOptions:
    bundle: Path
    provider: str
    threads: int | None
    max_batch: int | None
    gpu_memory_mb: int | None
    cache: Path | None
    no_cache: bool
    expect_digest: str | None
    verify_key: Path | None

    def open_cache(self) -> EmbeddingCache | None:
        if self.no_cache:
            if self.cache is not None:
                raise UsageError("--cache and --no_cache: expected one of them")
            return None
        from siamese_deploy.embedding_cache import open_cache

        cache, note = open_cache(self.cache)
        if note:
            warn("cache-unusable", note)
        return cache

    def open_verifier(self, cache: EmbeddingCache | None, *, throughput: bool = False) -> OnnxVerifier:
        from siamese_deploy.bundle import read_bundle
        from siamese_deploy.runtime import OnnxVerifier

        verifier = OnnxVerifier(
            read_bundle(self.bundle, expect_digest=self.expect_digest, verify_key=self.verify_key),
            provider=self.provider,
            threads=self.threads,
            throughput=throughput,
            max_batch=self.max_batch,
            gpu_memory_mb=self.gpu_memory_mb,
            cache=cache,
            say=lambda text: warn("engine-cache", text),
        )
        log_at_end(provider=verifier.provider, bundle_digest=verifier.model_digest)
        if verifier.provider_note:
            log_at_end(provider_note=verifier.provider_note)
        return verifier


EXPECT_DIGEST = click.option(
    "--expect_digest", metavar="HEX", help="Refuse any other bundle than the one with this manifest_sha256."
)
VERIFY_KEY = click.option(
    "--verify_key", type=PATH, help="Public key (PEM): refuse a bundle that its owner has not signed."
)
_OPTIONS = (
    click.option("-c", "--checkpoint", "bundle", required=True, type=PATH, help="Bundle folder."),
    click.option(
        "--provider",
        type=click.Choice(CHOICES),
        default="auto",
        help="Where to run. A named one runs there or fails; auto takes the best that truly starts.",
    ),
    click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: the cores it may use]"),
    click.option("--max_batch", type=click.IntRange(1), help="Pictures in one run.  [default: the bundle's largest]"),
    click.option("--gpu_memory_mb", type=click.IntRange(1), help="Most that each graph may take on the GPU, in MiB."),
    click.option("--cache", type=PATH, help="Folder for embeddings of pictures seen before.  [default: the user's]"),
    click.option("--no_cache", is_flag=True, help="Neither read nor keep embeddings."),
    EXPECT_DIGEST,
    VERIFY_KEY,
)


def runtime_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options; the command gets them as the keyword `runtime`."""

    @wraps(command)
    def with_runtime(**options: Any) -> None:
        names = RuntimeOptions.__dataclass_fields__
        runtime = RuntimeOptions(**{name: options.pop(name) for name in names})
        command(runtime=runtime, **options)

    for option in reversed(_OPTIONS):
        with_runtime = option(with_runtime)
    return with_runtime


def describe(verifier: OnnxVerifier) -> str:
    """Where a verifier runs, and what is worth knowing about it, in one line."""
    notes = ["onnxruntime"]
    if verifier.provider != "cpu":
        totals: dict[str, int] = {}
        for counts in verifier.nodes.values():
            for provider, count in counts.items():
                totals[provider] = totals.get(provider, 0) + count
        notes += [f"{count} nodes on {provider}" for provider, count in sorted(totals.items())]
    if verifier.provider_note:
        notes.append(verifier.provider_note)
    return one_line(f"provider: {verifier.provider} ({'; '.join(notes)})")


def tell_provider(verifier: OnnxVerifier) -> None:
    """On stderr, for commands whose stdout is an answer; nothing where the CPU was asked for by name."""
    if verifier.provider_note or verifier.provider != "cpu":
        click.echo(describe(verifier), err=True)


def report_cache(cache: EmbeddingCache | None) -> None:
    """What the cache has saved, on stdout, and why it gave up, on stderr."""
    if cache is not None and cache.hits:
        click.echo(f"from the cache: {cache.hits} of {cache.hits + cache.misses} embeddings")
    warn_of_cache(cache)


def warn_of_cache(cache: EmbeddingCache | None) -> None:
    if cache is not None and cache.warning:
        warn("cache-unusable", cache.warning)
