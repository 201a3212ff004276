"""Sampling: a plan, noise and a session make samples. Nothing here knows which backend runs, or which sampler."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffexport.backends.session import Session
from diffexport.bundle import Defaults
from diffexport.decoding import OnTile, decode, tile_of
from diffexport.errors import BackendError, BundleError, PlanError, ShapeError
from diffexport.noise import normal
from diffexport.plan import NOISE, Plan, default_sampler, denoising
from diffexport.spec import DecoderSpec, ModelSpec

Array = NDArray[np.float32]
Labels = NDArray[np.int64]
OnStep = Callable[[int, int], None]
"""Called after each row with (evaluations of a row done so far, those of the whole call)."""

OnImages = Callable[[Array], None]
"""Called after each batch with its images, (B, channels, H, W)."""

OnState = Callable[[int, Array, Array], None]
"""Called before each row with its index, the state x and the denoised estimate D, each (B, *shape)."""

_NOISE_CHUNK = 1 << 18
"""How many normals are drawn at once: large enough that their cost is the arithmetic, small beside any model."""


class Sampler:
    """Draws samples of one model on one session. A sample is decided by its seed, its index and the plan alone.

    Threads may share a sampler: their batches take turns. To run at the same time, each takes a sampler of its own from
    the same bundle.
    """

    def __init__(
        self,
        spec: ModelSpec,
        session: Session,
        defaults: Defaults | None = None,
        decoder: DecoderSpec | None = None,
    ) -> None:
        self.spec = spec
        self.session = session
        self.decoder = decoder
        self.defaults = defaults or Defaults(sampler=default_sampler(spec))
        self._turn = threading.Lock()  # a session holds the state of one batch

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the session."""
        self.session.close()

    def sample(
        self,
        labels: Sequence[int | str] | int | str | None = None,
        *,
        num: int | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        first: int = 0,
        batch: int | None = None,
        plan: Plan | None = None,
        x_init: Array | None = None,
        noise: Array | None = None,
        on_step: OnStep | None = None,
        on_state: OnState | None = None,
        one_call: bool = False,
        on_images: OnImages | None = None,
        **options: Any,
    ) -> Array:
        """Draw samples.

        Args:
            labels: one label, index or name, for each sample; for models without labels give ``num``.
            num: number of samples; for models with labels, labels 0, 1, 2, ... in turn.
            sampler, steps, guidance_scale, options: see ``diffexport.plan.make_plan``; the bundle's defaults if None.
            seed: 0 .. 2^64 - 1.
            first: index of the first sample; sample k of seed s is the same in every call that draws it.
            batch: how many are drawn at once, of no influence on the samples; the bundle's default, or as many as the
                session takes, if None.
            plan: a ready plan in place of sampler, steps, guidance_scale and options.
            x_init: (num, *shape) unit normal start in place of the seed's.
            noise: (rows, num, *shape) unit normal noise in place of the seed's.
            on_step: called after each step; after each batch with ``one_call``.
            on_state: called before each row; costs one more evaluation a row. Not with ``one_call``.
            one_call: run the whole loop inside the graph, one call a batch, in place of one call a row.
            on_images: called with the images of each batch, which the graph decodes too; with ``one_call`` only.

        Returns:
            (num, *shape) float32.

        Raises:
            ShapeError: labels or arrays that do not fit the model.
            PlanError: see ``make_plan``.
            BackendError: the backend returned numbers that are not finite.
        """
        label = self.labels(labels, num)
        count = len(label) if label is not None else num or 1
        if plan is None:
            plan = self.plan(sampler, steps, guidance_scale, **options)
        elif not (sampler is None and steps is None and guidance_scale is None and not options):
            raise PlanError("plan: give either a ready plan or sampler, steps and guidance_scale, not both")
        if one_call and on_state is not None:
            raise PlanError("on_state: the loop inside the graph shows no states; leave one_call out")
        if on_images is not None:
            self._needed_decoder()
        if on_images is not None and not one_call:
            raise PlanError("on_images: a loop in steps makes no images; give one_call=True, or decode() the samples")
        size = min(self.defaults.batch, self.session.max_batch or self.defaults.batch) if batch is None else batch
        check_run(seed, first, size)
        _check_given("x_init", x_init, (count, *self.spec.shape))
        _check_given("noise", noise, (len(plan), count, *self.spec.shape))

        out = np.empty((count, *self.spec.shape), np.float32)
        rows = plan.rows.astype(np.float32)
        run: Callable[..., Array] = functools.partial(self._stepped, on_state=on_state)
        if one_call:
            run = functools.partial(self._in_one_call, on_images=on_images)
        starts = range(0, count, size)
        for number, start in enumerate(starts):
            part = slice(start, min(start + size, count))
            indices = range(first + part.start, first + part.stop)
            begin = normal(seed, indices, [0], self.spec.shape)[0] if x_init is None else x_init[part]
            drawn = self._drawn(seed, indices, rows) if noise is None else (z[part] for z in noise)
            with self._turn:
                out[part] = run(
                    np.float32(plan.x_scale) * begin,
                    None if label is None else label[part],
                    rows,
                    drawn,
                    _counting(on_step, number * len(rows), len(starts) * len(rows)),
                )
        return self._finite(out, "sample", first)

    def decode(self, x: Array, tile: int | None = None, on_tile: OnTile | None = None) -> Array:
        """Images of samples that are latents, (B, channels, H, W); see ``diffexport.decoding.decode``.

        Raises:
            BundleError: the bundle has no decoder.
            ShapeError: a tile that cannot be.
            BackendError: the backend returned numbers that are not finite.
        """
        decoder = self._needed_decoder()
        with self._turn:
            return self._finite(decode(self.session, decoder, x, tile, on_tile), "image")

    def images(
        self,
        labels: Sequence[int | str] | int | str | None = None,
        *,
        tile: int | None = None,
        one_call: bool = False,
        on_tile: OnTile | None = None,
        **settings: Any,
    ) -> tuple[Array, Array]:
        """Draw samples and decode them: the latents and their images; arguments are those of ``sample`` and ``decode``.

        With ``one_call`` the graph decodes too, a batch at once, unless the images are to be decoded in tiles.
        """
        side = tile_of(self._needed_decoder(), tile)
        if one_call and not 0 < side < max(self.spec.shape[1:]):
            batches: list[Array] = []
            x = self.sample(labels, one_call=True, on_images=batches.append, **settings)
            return x, self._finite(np.concatenate(batches), "image")
        x = self.sample(labels, one_call=one_call, **settings)
        return x, self.decode(x, tile, on_tile)

    def _finite(self, out: Array, what: str, first: int = 0) -> Array:
        if not np.isfinite(out).all():
            bad = int(np.argwhere(~np.isfinite(out.reshape(len(out), -1)).all(1))[0, 0])
            raise BackendError(
                f"{what} {first + bad}: {self.session.backend} returned numbers that are not finite; "
                "check the bundle with `diffx verify`"
            )
        return out

    def _needed_decoder(self) -> DecoderSpec:
        if self.decoder is None:
            raise BundleError("this bundle has no decoder; export the model with --vae FOLDER")
        return self.decoder

    def plan(
        self, sampler: str | None = None, steps: int | None = None, guidance_scale: float | None = None, **options: Any
    ) -> Plan:
        """The plan that ``sample`` would use; what is None is the bundle's default."""
        return self.defaults.plan(self.spec, sampler, steps, guidance_scale, **options)

    def labels(self, labels: Sequence[int | str] | int | str | None, num: int | None) -> Labels | None:
        """Labels as indices, (num,) int64, or None for a model without labels; see ``sample``."""
        if num is not None and num < 1:
            raise ShapeError(f"num {num}: expected at least 1")
        if labels is None:
            if not self.spec.conditional:
                return None
            return np.arange(num or self.spec.num_classes, dtype=np.int64) % self.spec.num_classes
        if isinstance(labels, int | str | np.integer):
            labels = [labels] * (num or 1)
        if num is not None and num != len(labels):
            raise ShapeError(f"num {num}: got {len(labels)} labels; give one of the two")
        if len(labels) == 0:
            raise ShapeError("labels: got none, expected at least one")
        return np.array([self.spec.label_index(label) for label in labels], np.int64)

    def _stepped(
        self,
        x: Array,
        label: Labels | None,
        rows: Array,
        drawn: Iterable[Array | None],
        done: Callable[[int], None],
        on_state: OnState | None,
    ) -> Array:
        """One call of the session for each row."""
        self.session.begin(x, label, rows=rows)
        for index, (row, z) in enumerate(zip(rows, drawn, strict=True)):
            if on_state is not None:
                now = self.session.state()[0]
                on_state(index, now, self.session.run(now, label, denoising(row)[None], self._no_noise()))
            self.session.step(row, z)
            done(index + 1)
        return self.session.state()[0]

    def _in_one_call(
        self,
        x: Array,
        label: Labels | None,
        rows: Array,
        drawn: Iterable[Array | None],
        done: Callable[[int], None],
        on_images: OnImages | None,
    ) -> Array:
        """One call for all rows, whose noise is held at once; a plan without noise needs none."""
        if np.any(rows[:, NOISE]):
            noise = np.stack([np.zeros_like(x) if z is None else z for z in drawn])
        else:
            noise = self._no_noise()
        if on_images is None:
            x = self.session.run(x, label, rows, noise)
        else:
            x, images = self.session.run_decoded(x, label, rows, noise)
            on_images(images)
        done(len(rows))
        return x

    def _no_noise(self) -> Array:
        return np.zeros((1, 1, *self.spec.shape), np.float32)

    def _drawn(self, seed: int, indices: range, rows: Array) -> Iterator[Array | None]:
        """The noise of each row, None where it adds none, drawn some rows at a time."""
        noisy = [k for k, row in enumerate(rows) if row[NOISE] != 0]
        at_once = max(1, _NOISE_CHUNK // (len(indices) * math.prod(self.spec.shape)))
        ready: dict[int, Array] = {}
        for k in range(len(rows)):
            if rows[k][NOISE] == 0:
                yield None
                continue
            if k not in ready:
                ahead = [j for j in noisy if j >= k][:at_once]
                ready = dict(zip(ahead, normal(seed, indices, [1 + j for j in ahead], self.spec.shape), strict=True))
            yield ready[k]


def check_run(seed: int, first: int, batch: int) -> None:
    """Raise ShapeError for a seed, a first index or a batch that cannot be."""
    if batch < 1:
        raise ShapeError(f"batch {batch}: expected at least 1")
    if not 0 <= seed < 2**64:
        raise ShapeError(f"seed {seed}: expected 0 .. 2^64 - 1")
    if first < 0:
        raise ShapeError(f"first {first}: expected 0 or more")


def _counting(on_step: OnStep | None, before: int, total: int) -> Callable[[int], None]:
    return (lambda rows: on_step(before + rows, total)) if on_step is not None else (lambda _rows: None)


def _check_given(name: str, array: Array | None, expected: tuple[int, ...]) -> None:
    if array is not None and array.shape != expected:
        raise ShapeError(f"{name}: got shape {array.shape}, expected {expected}")
