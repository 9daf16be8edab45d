"""A bridge in closed form: reduced-rank ridge regression from source levels to target features.

Second moments are summed over a stream of tokens, so memory does not grow with their number, and separately
for each fold, so that cross-validation needs no second pass. Levels and features are first projected onto
their principal components (Halko, Martinsson and Tropp 2011, arXiv 0909.4061): at the released shapes the
moments of 12 288 channels over 10⁶ tokens would cost 3·10¹⁴ operations, those of 3 × 512 cost 5·10¹². The
energy outside the bases is measured along the stream and reported. Reduced rank: Izenman 1975.

The regression target decides what the update means. The target's own features: the update is what the levels
confirm of them, and the rest is averaged out. Features of the same image at a higher resolution, pooled to
the same grid: the update is what the target would see with better vision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..bridge import Blend, BridgeConfig, VisionBridge
from .packs import Pack
from .trainable import TrainableBridge

COMPONENTS = 512  # of each level's basis and of the features'
BASIS_TOKENS = 16_384  # tokens that the bases are computed from
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # times the mean diagonal of the levels' moments
FOLDS = 5
CHUNK = 4096  # tokens
MEASURE_EVERY = 8  # chunks, for the levels' energy inside their bases
SWEEPS = 3  # over the levels, each refitted to the residual of the others


class Tokens(NamedTuple):
    """One chunk of a stream of tokens, in any dtype; the tokens of an image stay together."""

    levels: Sequence[Tensor]
    """L × (n, source_dim)."""
    baseline: Tensor
    """(n, target_dim): the target's features."""
    highres: Tensor | None = None
    """(n, target_dim): the target's features of the image at a higher resolution."""


class Calibration(NamedTuple):
    """A fitted bridge and how well it fits held-out tokens."""

    bridge: VisionBridge
    explained: float
    """Share of the regression target's energy that is explained on held-out folds; all channels have equal
    weight."""
    ridge: float
    rank: int
    by_rank: dict[int, float]
    """Rank → explained, at the chosen ridge."""
    kept: dict[str, float]
    """Share of the energy inside the basis of each level and of `features`."""
    tokens: int


def calibrate(
    config: BridgeConfig,
    stream: Callable[[], Iterable[Tokens]],
    ranks: Sequence[int] | None = None,
    components: int = COMPONENTS,
) -> Calibration:
    """Fit a bridge to the high-resolution features of a token stream, or to the target's where it has none.

    The bridge's gate is 1, the whole regression; `validation.choose_gate` finds how much of it helps.

    Args:
        config: shapes and names; `rank` is the largest to try, and the better of both `blend`s is taken.
        stream: returns a new stream at each call; chunks go to the folds in turn.
        ranks: None is a quarter, a half and all of the config's rank.

    Raises:
        ValueError: no tokens, fewer chunks than folds, a bridge without rank, or wrong widths.
    """
    if config.rank is None:
        raise ValueError("calibration gives a bridge of low rank: give the config a rank")
    moments = Moments(basis_chunks(config, stream()), components)
    for number, chunk in enumerate(stream()):
        moments.add(chunk, number % FOLDS)
    if not all(moments.counts):
        tokens = sum(moments.counts)
        raise ValueError(f"cross-validation needs at least {FOLDS} chunks of tokens, got {tokens} tokens")
    blends: tuple[Blend, ...] = ("add", "replace") if moments.has_highres else ("replace",)
    ranks = ranks or sorted({max(config.rank // part, config.heads) for part in (4, 2, 1)})
    ranks = [rank for rank in ranks if rank % config.heads == 0]
    fits = {blend: _search(replace(config, blend=blend), moments, ranks) for blend in blends}

    def error(blend: Blend) -> float:  # in the same unit for both blends
        return (1 - fits[blend].explained) * float(moments.regression_target(blend)[1].sum())

    return fits[min(fits, key=error)]


def token_stream(pack: Pack, trainable: TrainableBridge) -> Iterator[Tokens]:
    """All tokens of a pack, in chunks of whole images, with the levels that a bridge sees."""
    for members in pack.layouts.values():
        rows, columns = pack.grid_of(members)
        images = min(CHUNK // (rows * columns), len(members) // (2 * FOLDS))
        for samples in members.split(max(images, 1)):
            baseline = pack.rows("vision", samples)
            levels = [level.flatten(0, 1).cpu() for level in trainable.levels(pack, samples, baseline)]
            highres = pack.rows("highres", samples).flatten(0, 1).cpu() if "highres" in pack.fields else None
            yield Tokens(levels, baseline.flatten(0, 1).cpu(), highres)


class Basis(NamedTuple):
    """Orthonormal directions of channels that are scaled to an RMS of 1."""

    scale: Tensor  # (D,), RMS of each channel
    directions: Tensor  # (D, K)


def basis_chunks(config: BridgeConfig, stream: Iterable[Tokens]) -> list[Tokens]:
    """The first chunks, up to `BASIS_TOKENS` tokens.

    Raises:
        ValueError: no tokens, or widths that are not the config's.
    """
    expected = [config.source_dim] * len(config.levels) + [config.target_dim]
    chunks, count = [], 0
    for chunk in stream:
        widths = [tensor.shape[-1] for tensor in (*chunk.levels, chunk.baseline)]
        if widths != expected:
            raise ValueError(f"the bridge takes features of widths {expected}, the tokens have {widths}")
        chunks.append(chunk)
        count += len(chunk.baseline)
        if count >= BASIS_TOKENS:
            break
    if not count:
        raise ValueError("there are no tokens to calibrate on")
    return chunks


class Moments:
    """Second moments of levels and regression targets in their bases, fold by fold, in float64.

    Args:
        first: chunks whose tokens the bases are computed from.
    """

    def __init__(self, first: Sequence[Tokens], components: int) -> None:
        self.level_bases = [
            _principal(torch.cat([normalised(chunk.levels[number]) for chunk in first]), components)
            for number in range(len(first[0].levels))
        ]
        rows = torch.cat([chunk.baseline.float() / _rms(chunk.baseline) for chunk in first])
        self.basis = _principal(rows, components)
        self.sizes = [basis.directions.shape[1] for basis in self.level_bases]
        width, outputs = sum(self.sizes), self.basis.directions.shape[1]
        self.levels = torch.zeros(FOLDS, width, width, dtype=torch.float64)
        self.with_baseline = torch.zeros(FOLDS, width, outputs, dtype=torch.float64)
        self.with_highres = torch.zeros(FOLDS, width, outputs, dtype=torch.float64)
        self.energy = torch.zeros(FOLDS, 3, dtype=torch.float64)  # baseline, high resolution, difference
        self.basis_energy = torch.zeros(len(self.sizes) + 1, 2, dtype=torch.float64)  # inside, total
        self.counts = [0] * FOLDS
        self.has_highres = False
        self._chunks = 0

    def add(self, chunk: Tokens, fold: int) -> None:
        """Add a chunk's moments to a fold's."""
        x = torch.cat([self._project(n, level) for n, level in enumerate(chunk.levels)], dim=1)  # (n, L·K)
        basis, rms = self.basis, _rms(chunk.baseline)
        baseline = (chunk.baseline.float() / rms).div_(basis.scale)
        projected = baseline @ basis.directions
        self.levels[fold] += (x.T @ x).double()
        self.with_baseline[fold] += (x.T @ projected).double()
        self.energy[fold, 0] += baseline.square().sum().double()
        self._measure_basis(-1, projected, baseline)
        if chunk.highres is not None:
            self.has_highres = True
            highres = (chunk.highres.float() / rms).div_(basis.scale)
            self.with_highres[fold] += (x.T @ (highres @ basis.directions)).double()
            self.energy[fold, 1] += highres.square().sum().double()
            self.energy[fold, 2] += (highres - baseline).square().sum().double()
        self.counts[fold] += len(x)
        self._chunks += 1

    def _project(self, number: int, level: Tensor) -> Tensor:
        """A level in its basis; norm and scale are applied on whichever side has fewer numbers."""
        basis = self.level_bases[number]
        if self._chunks % MEASURE_EVERY == 0:
            rows = normalised(level).div_(basis.scale)
            projected = rows @ basis.directions
            self._measure_basis(number, projected, rows)
            return projected
        return (level.float() @ (basis.directions / basis.scale[:, None])) / _norm_of(level)

    def _measure_basis(self, number: int, projected: Tensor, rows: Tensor) -> None:
        self.basis_energy[number, 0] += projected.square().sum().double()
        self.basis_energy[number, 1] += rows.square().sum().double()

    def regression_target(self, blend: str) -> tuple[Tensor, Tensor]:
        """Moments of levels and regression target (F, L·K, K), and the target's energy (F,)."""
        if not self.has_highres:
            return self.with_baseline, self.energy[:, 0]
        if blend == "replace":
            return self.with_highres, self.energy[:, 1]
        return self.with_highres - self.with_baseline, self.energy[:, 2]


def fit(
    moments: Tensor, cross: Tensor, sizes: Sequence[int], rank: int, ridge: float
) -> list[tuple[Tensor, Tensor]]:
    """Reduced-rank ridge regression with the same rank for each block of inputs.

    Args:
        moments: (W, W) of all inputs. cross: (W, K) of inputs and outputs. sizes: widths of the blocks.
        ridge: times the mean diagonal of `moments`.

    Returns:
        (down (size, rank), up (rank, K)) of each block; outputs are the sum of x_l @ down @ up.
    """
    moments = _with_ridge(moments, ridge)
    blocks = [slice(sum(sizes[:number]), sum(sizes[: number + 1])) for number in range(len(sizes))]
    factors = [torch.linalg.cholesky(moments[block, block]) for block in blocks]
    solution = torch.linalg.solve(moments, cross)
    pairs = [_reduced(c, c.T @ solution[block], rank) for c, block in zip(factors, blocks, strict=True)]
    for _ in range(SWEEPS):
        for number, (block, factor) in enumerate(zip(blocks, factors, strict=True)):
            residual = cross[block].clone()
            for other, (down, up) in enumerate(pairs):
                if other != number:
                    residual -= moments[block, blocks[other]] @ down @ up
            whitened = torch.linalg.solve_triangular(factor, residual, upper=False)
            pairs[number] = _reduced(factor, whitened, rank)
    return pairs


def normalised(level: Tensor) -> Tensor:
    """A level after the bridge's norm, (n, D) in float32."""
    return level.float() / _norm_of(level)


def _norm_of(level: Tensor) -> Tensor:
    return (level.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _search(config: BridgeConfig, moments: Moments, ranks: Sequence[int]) -> Calibration:
    """Choose the ridge by cross-validation at full rank, then the rank at that ridge."""
    cross, energy = moments.regression_target(config.blend)

    def held_out(solve: Callable[[Tensor, Tensor], Tensor]) -> float:
        """Explained share of the energy of each fold by the weights of the others."""
        error = 0.0
        for fold in range(FOLDS):
            weights = solve(moments.levels.sum(0) - moments.levels[fold], cross.sum(0) - cross[fold])
            gained = 2 * (weights * cross[fold]).sum() - (weights * (moments.levels[fold] @ weights)).sum()
            error += float(energy[fold] - gained)
        return 1 - error / float(energy.sum())

    def explained_at_full_rank(ridge: float) -> float:
        return held_out(lambda inputs, outputs: torch.linalg.solve(_with_ridge(inputs, ridge), outputs))

    def explained(rank: int) -> float:
        def solve(inputs: Tensor, outputs: Tensor) -> Tensor:
            return torch.cat([down @ up for down, up in fit(inputs, outputs, moments.sizes, rank, ridge)])

        return held_out(solve)

    ridge = max(RIDGES, key=explained_at_full_rank)
    by_rank = {rank: explained(rank) for rank in ranks}
    rank = max(by_rank, key=by_rank.__getitem__)
    pairs = fit(moments.levels.sum(0), cross.sum(0), moments.sizes, rank, ridge)
    kept = (moments.basis_energy[:, 0] / moments.basis_energy[:, 1]).tolist()
    return Calibration(
        _bridge_of(replace(config, rank=rank), moments, pairs),
        by_rank[rank],
        ridge,
        rank,
        by_rank,
        dict(zip((*config.levels, "features"), kept, strict=True)),
        sum(moments.counts),
    )


def _bridge_of(
    config: BridgeConfig, moments: Moments, pairs: Sequence[tuple[Tensor, Tensor]]
) -> VisionBridge:
    """The bridge that computes the regression: keys of zero weigh all levels alike.

    The squares of `fit`'s latents sum to 1 over all tokens; here they get the size of a new bridge's, about 1
    a token, so that training can continue from it.
    """
    bridge = VisionBridge(replace(config, init="zero"))
    features, size = moments.basis, sum(moments.counts) ** 0.5
    with torch.no_grad():
        bridge.gate.fill_(1.0)
        for number, (basis, (down, up)) in enumerate(zip(moments.level_bases, pairs, strict=True)):
            bridge.keys[number].weight.zero_()
            down = basis.directions @ (size * down).float() / basis.scale[:, None]  # (source_dim, rank)
            bridge.downs[number].weight.copy_(down.T)
            up = ((up / size).float() @ features.directions.T) * features.scale  # (rank, target_dim)
            bridge.ups[number].weight.copy_(len(pairs) * up.T)
    return bridge.eval()


def _reduced(factor: Tensor, whitened: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best (down, up) of a rank for outputs whose cross moments were whitened by the Cholesky factor."""
    left, values, right = torch.linalg.svd(whitened, full_matrices=False)
    kept = min(rank, len(values))
    down = torch.linalg.solve_triangular(factor.T, left[:, :kept], upper=True)
    up = values[:kept, None] * right[:kept]
    pad = torch.nn.functional.pad
    return pad(down, (0, rank - kept)), pad(up, (0, 0, 0, rank - kept))


def _with_ridge(moments: Tensor, ridge: float) -> Tensor:
    return moments + ridge * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)


def _principal(rows: Tensor, components: int) -> Basis:
    """Channels at an RMS of 1, and their leading directions, without centring."""
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
