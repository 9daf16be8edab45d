"""A bridge in closed form: reduced-rank ridge regression from source levels to target features, no gradients.

Second moments are summed over a stream of tokens, so memory does not grow with their number, and kept apart
by fold, so that cross-validation costs no second pass. Levels and features are first taken to a basis of
their principal components (Halko, Martinsson and Tropp 2011, arXiv 0909.4061): at the released shapes the
moments of 12 288 channels over 10⁶ tokens would cost 3·10¹⁴ operations, those of 3 × 512 cost 5·10¹². What
the bases leave out is measured along the stream and reported. Reduced rank: Izenman 1975.

What is regressed on decides what the update means. `target`: the levels' account of the target's own
features, so what the source cannot confirm is averaged out. `teacher`: features of the same image seen
finer, pooled to the same grid, so the update is what the target would see with better vision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..bridge import BridgeConfig, VisionBridge

COMPONENTS = 512  # of each level's basis and of the features'
SUBSET = 16_384  # tokens that the bases are found from
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # times the mean diagonal of the levels' moments
FOLDS = 5
NOTED = 8  # of so many chunks one is looked at for what the levels' bases leave out
SWEEPS = 3  # over the levels, each refitted to what the others leave


class Tokens(NamedTuple):
    """One chunk of a stream of cached tokens, in any dtype; the tokens of an image stay together."""

    levels: Sequence[Tensor]
    """L × (n, source_dim)."""
    baseline: Tensor
    """(n, target_dim): the target's features."""
    teacher: Tensor | None = None
    """(n, target_dim): what the target should have seen."""


class Calibration(NamedTuple):
    """A fitted bridge and how well it fits tokens that it was not fitted to."""

    bridge: VisionBridge
    explained: float
    """Share of the wanted update's energy that is explained, held out; of the features themselves for
    `target`. Channels weigh alike."""
    ridge: float
    rank: int
    by_rank: dict[int, float]
    """Rank → explained, at the chosen ridge."""
    kept: dict[str, float]
    """Share of the energy inside each basis: one a level, and `features`."""
    tokens: int


def calibrate(
    config: BridgeConfig,
    stream: Callable[[], Iterable[Tokens]],
    ranks: Sequence[int] | None = None,
    ridges: Sequence[float] = RIDGES,
    components: int = COMPONENTS,
) -> Calibration:
    """Fit a bridge to a stream of tokens; with a teacher in it to the teacher, else to the target itself.

    The bridge's gate is 1, the whole regression; how much of it the language model can use is another
    question, see `examining.choose_gate`.

    Args:
        config: shapes and names; `rank` is the largest tried, and `blend` follows from what fits better.
        stream: starts the stream anew each time; chunks go to the folds in turn.
        ranks: None is a quarter, a half and all of the config's rank.

    Raises:
        ValueError: no tokens, fewer chunks than folds, a bridge without rank, or shapes that do not fit.
    """
    if config.rank is None:
        raise ValueError("calibration gives a bridge of low rank: give the config a rank")
    bases = find_bases(config, stream(), components)
    sums = Sums(bases)
    for number, chunk in enumerate(stream()):
        sums.add(chunk, number % FOLDS)
    if not all(sums.counts):
        raise ValueError(f"cross-validation needs at least {FOLDS} chunks of tokens, got {sum(sums.counts)}")
    wanted = ("add", "replace") if sums.taught else ("replace",)
    ranks = ranks or sorted({max(config.rank // part, config.heads) for part in (4, 2, 1)})
    ranks = [rank for rank in ranks if rank % config.heads == 0]
    found = {blend: _search(replace(config, blend=blend), sums, ranks, ridges) for blend in wanted}

    def error(blend: str) -> float:  # the same distance, to the teacher or the target, for both
        return (1 - found[blend].explained) * float(sums.wanted(blend)[1].sum())

    return found[min(found, key=error)]


@dataclass(frozen=True)
class Basis:
    """Orthonormal directions of channels that are scaled to equal size."""

    scale: Tensor
    """(D,): RMS of each channel."""
    directions: Tensor
    """(D, K)."""

    def __call__(self, features: Tensor) -> Tensor:
        """(n, D) to (n, K)."""
        return (features / self.scale) @ self.directions


@dataclass(frozen=True)
class Bases:
    """The bases of all levels and of the target's features."""

    levels: tuple[Basis, ...]
    features: Basis


def find_bases(config: BridgeConfig, stream: Iterable[Tokens], components: int = COMPONENTS) -> Bases:
    """Principal components of the first `SUBSET` tokens; all directions where there are not more.

    Raises:
        ValueError: no tokens, or shapes that do not fit the config.
    """
    chunks, count = [], 0
    for chunk in stream:
        _check(config, chunk)
        chunks.append(chunk)
        count += len(chunk.baseline)
        if count >= SUBSET:
            break
    if not count:
        raise ValueError("there are no tokens to calibrate on")
    levels = []
    for number in range(len(config.levels)):
        rows = torch.cat([normalised(chunk.levels[number]) for chunk in chunks])
        levels.append(_principal(rows, components))
    rows = torch.cat([_over(chunk.baseline, _rms(chunk.baseline)) for chunk in chunks])
    return Bases(tuple(levels), _principal(rows, components))


class Sums:
    """Second moments of levels and wanted features in their bases, fold by fold, in float64."""

    def __init__(self, bases: Bases) -> None:
        self.bases = bases
        width = sum(basis.directions.shape[1] for basis in bases.levels)
        wide = bases.features.directions.shape[1]
        self.levels = torch.zeros(FOLDS, width, width, dtype=torch.float64)
        self.own = torch.zeros(FOLDS, width, wide, dtype=torch.float64)  # levels with the baseline
        self.seen = torch.zeros(FOLDS, width, wide, dtype=torch.float64)  # levels with the teacher
        self.energy = torch.zeros(FOLDS, 3, dtype=torch.float64)  # of baseline, teacher, their difference
        self.inside = torch.zeros(len(bases.levels) + 1, 2, dtype=torch.float64)  # in the basis, in all
        self.counts = [0] * FOLDS
        self._chunks = 0
        self.taught = False

    def add(self, chunk: Tokens, fold: int) -> None:
        """Add a chunk's moments to a fold's."""
        x = torch.cat(
            [self._project(number, level) for number, level in enumerate(chunk.levels)], dim=1
        )  # (n, L·K)
        basis, rms = self.bases.features, _rms(chunk.baseline)
        rows = _over(chunk.baseline, rms).div_(basis.scale)
        own = rows @ basis.directions
        self.levels[fold] += (x.T @ x).double()
        self.own[fold] += (x.T @ own).double()
        self.energy[fold, 0] += rows.square().sum().double()
        self._note(-1, own, rows)
        if chunk.teacher is not None:
            self.taught = True
            finer = _over(chunk.teacher, rms).div_(basis.scale)
            self.seen[fold] += (x.T @ (finer @ basis.directions)).double()
            self.energy[fold, 1] += finer.square().sum().double()
            self.energy[fold, 2] += (finer - rows).square().sum().double()
        self.counts[fold] += len(x)
        self._chunks += 1

    def _project(self, number: int, level: Tensor) -> Tensor:
        """A level in its basis; its norm and scale are applied where that touches the fewest numbers."""
        basis = self.bases.levels[number]
        if self._chunks % NOTED == 0:
            rows = normalised(level).div_(basis.scale)
            projected = rows @ basis.directions
            self._note(number, projected, rows)
            return projected
        rows = level.float()
        rms = (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return (rows @ (basis.directions / basis.scale[:, None])) / rms

    def _note(self, number: int, projected: Tensor, rows: Tensor) -> None:
        self.inside[number, 0] += projected.square().sum().double()
        self.inside[number, 1] += rows.square().sum().double()

    def wanted(self, blend: str) -> tuple[Tensor, Tensor]:
        """Levels with what is wanted, (F, L·K, K), and its energy (F,)."""
        if not self.taught:
            return self.own, self.energy[:, 0]
        return (
            (self.seen, self.energy[:, 1])
            if blend == "replace"
            else (self.seen - self.own, self.energy[:, 2])
        )


def fit(
    moments: Tensor, cross: Tensor, sizes: Sequence[int], rank: int, ridge: float
) -> list[tuple[Tensor, Tensor]]:
    """Reduced-rank ridge regression with a rank for each block of inputs.

    Args:
        moments: (W, W) of all inputs. cross: (W, K) of inputs and outputs. sizes: widths of the blocks.
        ridge: times the mean diagonal of `moments`.

    Returns:
        (down (size, rank), up (rank, K)) of each block; outputs are the sum of x_l @ down @ up.
    """
    moments = _with_ridge(moments, ridge)
    blocks = torch.linalg.solve(moments, cross).split(list(sizes))
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    factors = [
        torch.linalg.cholesky(moments[a : a + n, a : a + n]) for a, n in zip(starts, sizes, strict=True)
    ]
    pairs = [_reduced(factor, factor.T @ block, rank) for factor, block in zip(factors, blocks, strict=True)]
    for _ in range(SWEEPS):
        for number, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            left = cross[start : start + size].clone()
            for other, (at, wide) in enumerate(zip(starts, sizes, strict=True)):
                if other != number:
                    down, up = pairs[other]
                    left -= moments[start : start + size, at : at + wide] @ down @ up
            factor = factors[number]
            pairs[number] = _reduced(factor, torch.linalg.solve_triangular(factor, left, upper=False), rank)
    return pairs


def normalised(levels: Tensor) -> Tensor:
    """A level as the bridge's norm leaves it, (n, D) in float32."""
    rows = levels.float()
    return rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def chunks_of(tokens: Tokens, size: int) -> Iterator[Tokens]:
    """A stream of chunks from tokens that are all in memory or mapped from disk."""
    for start in range(0, len(tokens.baseline), size):
        part = slice(start, start + size)
        teacher = None if tokens.teacher is None else tokens.teacher[part]
        yield Tokens([level[part] for level in tokens.levels], tokens.baseline[part], teacher)


def _search(config: BridgeConfig, sums: Sums, ranks: Sequence[int], ridges: Sequence[float]) -> Calibration:
    """Ridge by cross-validation at full rank, then rank at that ridge."""
    cross, energy = sums.wanted(config.blend)
    sizes = [basis.directions.shape[1] for basis in sums.bases.levels]

    def held_out(solve: Callable[[Tensor, Tensor], Tensor]) -> float:
        errors = 0.0
        for fold in range(FOLDS):
            moments = sums.levels.sum(0) - sums.levels[fold]
            weights = solve(moments, cross.sum(0) - cross[fold])
            gained = 2 * (weights * cross[fold]).sum() - (weights * (sums.levels[fold] @ weights)).sum()
            errors += float(energy[fold] - gained)
        return 1 - errors / float(energy.sum())

    def full(ridge: float) -> float:
        return held_out(lambda moments, wanted: torch.linalg.solve(_with_ridge(moments, ridge), wanted))

    def reduced(rank: int) -> float:
        return held_out(
            lambda moments, wanted: torch.cat(
                [down @ up for down, up in fit(moments, wanted, sizes, rank, ridge)]
            )
        )

    ridge = max(ridges, key=full)
    by_rank = {rank: reduced(rank) for rank in ranks}
    rank = max(by_rank, key=lambda rank: by_rank[rank])
    pairs = fit(sums.levels.sum(0), cross.sum(0), sizes, rank, ridge)
    shares = (sums.inside[:, 0] / sums.inside[:, 1]).tolist()
    return Calibration(
        _bridge_of(replace(config, rank=rank), sums, pairs),
        by_rank[rank],
        ridge,
        rank,
        by_rank,
        dict(zip((*config.levels, "features"), shares, strict=True)),
        sum(sums.counts),
    )


def _bridge_of(config: BridgeConfig, sums: Sums, pairs: Sequence[tuple[Tensor, Tensor]]) -> VisionBridge:
    """The bridge that computes the regression: keys of zero weigh all levels alike.

    `fit` makes latents whose squares sum to one over all tokens; here they get the size that those of a new
    bridge have, about one a token, so that training can go on from it.
    """
    bridge = VisionBridge(replace(config, init="zero"))
    bases, size = sums.bases, sum(sums.counts) ** 0.5
    features = bases.features
    with torch.no_grad():
        bridge.gate.fill_(1.0)
        for number, (basis, (down, up)) in enumerate(zip(bases.levels, pairs, strict=True)):
            bridge.keys[number].weight.zero_()
            narrow = basis.directions @ (size * down).float() / basis.scale[:, None]  # (source_dim, rank)
            bridge.downs[number].weight.copy_(narrow.T)
            wide = ((up / size).float() @ features.directions.T) * features.scale  # (rank, target_dim)
            bridge.ups[number].weight.copy_(len(pairs) * wide.T)
    return bridge.eval()


def _reduced(factor: Tensor, whitened: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best (down, up) of a rank for outputs whose cross moments, whitened by Cholesky, are given."""
    left, values, right = torch.linalg.svd(whitened, full_matrices=False)
    rank_there = min(rank, len(values))
    down = torch.linalg.solve_triangular(factor.T, left[:, :rank_there], upper=True)
    up = values[:rank_there, None] * right[:rank_there]
    missing = rank - rank_there
    down = torch.nn.functional.pad(down, (0, missing))
    return down, torch.nn.functional.pad(up, (0, 0, 0, missing))


def _with_ridge(moments: Tensor, ridge: float) -> Tensor:
    return moments + ridge * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)


def _principal(rows: Tensor, components: int) -> Basis:
    """Channels at equal size, and their leading directions, uncentred."""
    scale = rows.square().mean(0).sqrt().clamp_min(1e-6)
    rows = rows / scale
    width = rows.shape[1]
    if width <= components:
        return Basis(scale, torch.eye(width))
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(width, components + 32, generator=generator)
    for _ in range(2):  # subspace iteration
        probe = torch.linalg.qr(rows.T @ (rows @ probe))[0]
    _, vectors = torch.linalg.eigh((rows @ probe).T @ (rows @ probe))
    return Basis(scale, probe @ vectors.flip(1)[:, :components])


def _rms(features: Tensor) -> Tensor:
    return features.float().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)


def _over(features: Tensor, rms: Tensor) -> Tensor:
    return features.float() / rms


def _check(config: BridgeConfig, chunk: Tokens) -> None:
    wanted = [config.source_dim] * len(config.levels) + [config.target_dim]
    given = [tensor.shape[-1] for tensor in (*chunk.levels, chunk.baseline)]
    if given != wanted:
        raise ValueError(f"the bridge takes features of widths {wanted}, the tokens have {given}")
