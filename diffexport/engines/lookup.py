"""Which of a bundle's engines can run here, and what to say where none can."""

from __future__ import annotations

from dataclasses import dataclass

from diffexport.bundle import Bundle
from diffexport.engines.products import Product
from diffexport.engines.profiles import choose
from diffexport.engines.record import Engine, engines_of, stale
from diffexport.errors import BackendError, ShapeError

STEPS = ("step", "step_plain")


@dataclass(frozen=True)
class Choice:
    """An engine, the profile of it to use, and the batch to run it at, which may be larger than what was asked for."""

    engine: Engine
    profile: int
    batch: int


class Lookup:
    """The engines of a bundle that fit a product, its version and a GPU.

    Args:
        version: of the product that is installed.
        capability: of the GPU, sm89.
    """

    def __init__(self, bundle: Bundle, product: Product, version: str, capability: str) -> None:
        self._bundle, self._product = bundle, product
        self._target = f" --target {capability}" if product.targets else ""
        engines, problems = engines_of(bundle)
        self._fitting: dict[str, list[Engine]] = {}
        self._refused: dict[str, list[str]] = {}
        for engine in engines:
            key = engine.record.key
            if key.product != product.module:
                continue
            reason = stale(bundle, engine) or _misfit(engine, product, version, capability)
            if reason is None:
                self._fitting.setdefault(key.graph, []).append(engine)
            else:
                self._refused.setdefault(key.graph, []).append(f"{engine.path}: {reason}")
        if not self._fitting:
            reasons = [reason for refused in self._refused.values() for reason in refused] + problems
            what = reasons[0] if reasons else f"{bundle.path}: has no engine for {product.backend}"
            raise BackendError(f"{what}; run `{self.command()}`")

    @property
    def max_batch(self) -> int:
        """The largest batch that a step takes."""
        largest = [
            max(profile.most for engine in self._fitting[graph] for profile in engine.record.key.profiles)
            for graph in STEPS
            if graph in self._fitting
        ]
        return min(largest, default=1)

    def choose(self, graph: str, batch: int) -> Choice:
        """The engine of a graph for a batch: the one that wastes least.

        Raises:
            BackendError: there is none of this graph.
            ShapeError: there is none for so large a batch.
        """
        engines = self._fitting.get(graph)
        if not engines:
            reasons = self._refused.get(graph) or [f"{self._bundle.path}: has no engine of {graph}"]
            raise BackendError(f"{reasons[0]}; run `{self.command(graph=graph)}`")
        choices = []
        for engine in engines:
            found = choose(engine.record.key.profiles, batch)
            if found is not None:
                choices.append(Choice(engine, *found))
        if not choices:
            most = max(profile.most for engine in engines for profile in engine.record.key.profiles)
            raise ShapeError(
                f"batch {batch}: the engine of {graph} takes up to {most}; sample with --batch {most}, or run "
                f"`{self.command(batch=batch)}`"
            )
        return min(choices, key=lambda choice: choice.batch)

    def room(self, batch: int) -> int:
        """The batch that buffers must hold for either step graph to run; see ``choose``."""
        return max(self.choose(graph, batch).batch for graph in STEPS if graph in self._fitting)

    def command(self, graph: str | None = None, batch: int | None = None) -> str:
        """What to type for an engine that fits."""
        words = f"diffx build {self._bundle.path} --backend {self._product.backend}{self._target}"
        return words + (f" --batch 1-{batch}" if batch else "") + (f" --graph {graph}" if graph else "")


def _misfit(engine: Engine, product: Product, version: str, capability: str) -> str | None:
    """Why an engine cannot run with what is installed here, or None."""
    key = engine.record.key
    if key.version != version:
        return f"built for {product.module} {key.version}, found {version}"
    if capability not in key.targets:
        return f"built for {', '.join(key.targets)}, found {capability}"
    return None
