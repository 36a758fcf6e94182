"""A bundle on each provider, as contenders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from siamese_deploy.bench.run import Contender, Settings
from siamese_deploy.bundle import Bundle
from siamese_deploy.providers import usable_cores
from siamese_deploy.runtime import OnnxVerifier


def bundle_contenders(
    name: str, bundle: Bundle, settings: Settings, *, say: Callable[[str], None] = lambda _: None
) -> list[Contender]:
    """One for each of `settings.providers`.

    Args:
        name: to show.
        say: is told in one line what takes long while TensorRT's engines are built.
    """

    def opened(provider: str, batch: int | None) -> OnnxVerifier:
        open_verifier = partial(OnnxVerifier, bundle, provider=provider, threads=settings.threads, say=say)
        return open_verifier() if batch is None else open_verifier(throughput=True, max_batch=batch)

    told = bundle.manifest.about.get("checkpoint")
    checkpoint = str(told.get("sha256", "")) if isinstance(told, dict) else ""
    return [
        Contender(
            name,
            bundle.digest,
            bundle.manifest.precision,
            provider,
            best_batch=bundle.manifest.batch[1],
            tolerance=tolerance(bundle, provider),
            open=partial(opened, provider),
            runs_at_once=(settings.threads or usable_cores()) if provider == "cpu" else 1,
            checkpoint=checkpoint,
        )
        for provider in settings.providers
    ]


def tolerance(bundle: Bundle, provider: str) -> float:
    """Largest difference of a score between a timed run and the evaluation, which runs other batch sizes."""
    # Elsewhere another batch size may mean another kernel, and in 8 and 16 bits rounding that falls to the other side.
    return 1e-6 if (provider, bundle.manifest.precision) == ("cpu", "fp32") else 1e-2
