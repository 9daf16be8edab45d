"""`VisionCache`: vision features with their grids and provenance, and how two of them compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from .features import Shard, read_shard, write_shard
from .specs import LEVEL_NAMES

OUTLIER_FACTOR = 6.0  # a channel counts as an outlier when its RMS is this many times the median channel's


@dataclass(frozen=True)
class VisionCache:
    """The features of one image, or of several packed one after the other, from one encoder.

    Every tensor is (1, N, D) in image order (row by row), N the sum of gh·gw over the images.
    """

    features: Mapping[str, torch.Tensor]
    """`early`, `mid`, `late` and `merged` of a source; `vision` of a target."""
    grids: tuple[tuple[int, int], ...]
    """(gh, gw) of each image."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Model, revision, scope, dtype, images: everything that decides the features."""
    loaded_from: Path | None = None
    """The file they were read from; None for a fresh extraction."""

    def __post_init__(self) -> None:
        tokens = sum(rows * columns for rows, columns in self.grids)
        for name, tensor in self.features.items():
            if tensor.ndim != 3 or tensor.shape[:2] != (1, tokens):
                raise ValueError(
                    f"features {name!r} are {tuple(tensor.shape)}, {self.grids} need (1, {tokens}, D)"
                )

    @property
    def grid(self) -> tuple[int, int]:
        """(gh, gw) of the only image; a ValueError where there are several."""
        if len(self.grids) != 1:
            raise ValueError(f"this cache holds {len(self.grids)} images: use `.grids`, or `.split()` it")
        return self.grids[0]

    @property
    def early_features(self) -> torch.Tensor:
        """DeepStack's first tap, (1, N, D)."""
        return self._named("early")

    @property
    def mid_features(self) -> torch.Tensor:
        """DeepStack's second tap, (1, N, D)."""
        return self._named("mid")

    @property
    def late_features(self) -> torch.Tensor:
        """DeepStack's third tap, (1, N, D)."""
        return self._named("late")

    @property
    def merged_features(self) -> torch.Tensor:
        """The source tower's merged output, (1, N, D)."""
        return self._named("merged")

    @property
    def vision_features(self) -> torch.Tensor:
        """The target tower's merged output, the baseline, (1, N, D)."""
        return self._named("vision")

    @property
    def levels(self) -> list[torch.Tensor]:
        """The three DeepStack levels, early first, each (1, N, D)."""
        return [self._named(name) for name in LEVEL_NAMES]

    def split(self) -> list[VisionCache]:
        """Split into one cache an image."""
        sizes = [rows * columns for rows, columns in self.grids]
        parts = {name: tensor.split(sizes, dim=1) for name, tensor in self.features.items()}
        return [
            replace(self, features={name: tensors[i] for name, tensors in parts.items()}, grids=(grid,))
            for i, grid in enumerate(self.grids)
        ]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> VisionCache:
        """Copy the features to another device or dtype."""
        return replace(self, features={k: v.to(device=device, dtype=dtype) for k, v in self.features.items()})

    @property
    def header(self) -> dict[str, object]:
        """Grids and provenance, as a file of features stores them."""
        return {"grids": [list(grid) for grid in self.grids], "provenance": dict(self.provenance)}

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all; return its path."""
        return write_shard(Path(path), self.features, self.header)

    @classmethod
    def load(cls, path: str | Path) -> VisionCache:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            OSError: cut short, or its content differs from its checksum.
            ValueError: a file of another kind or version.
        """
        return cls.from_shard(read_shard(Path(path), verify=True))

    @classmethod
    def from_shard(cls, shard: Shard) -> VisionCache:
        """Take the features of one file, memory-mapped until they are used."""
        if "grids" not in shard.header:
            raise ValueError(
                f"{shard.path} holds features of many images: read its folder with `FeatureFolder`"
            )
        grids = tuple((rows, columns) for rows, columns in shard.header["grids"])
        return cls(shard.tensors, grids, shard.header["provenance"], shard.path)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.features.items())
        grids = ", ".join(f"{rows}×{columns}" for rows, columns in self.grids)
        return f"VisionCache({shapes}; grids {grids}; of {self.provenance.get('model', 'an unnamed model')})"

    def _named(self, name: str) -> torch.Tensor:
        if name not in self.features:
            held = ", ".join(f"{key}_features" for key in self.features)
            raise AttributeError(
                f"this cache of {self.provenance.get('model', 'a model')} has {held}, not {name}_features"
            )
        return self.features[name]


class LevelStatistics(NamedTuple):
    """One level beside the baseline."""

    mean: float
    spread: float
    """Standard deviation over all tokens and channels."""
    cka: float
    """Linear CKA with the baseline, 0 to 1."""
    cka_shuffled: float
    """The same with the tokens of one side shuffled: the level of chance."""
    outlier_share: float
    """Share of channels whose RMS is more than `OUTLIER_FACTOR` times the median channel's."""


class CacheComparison(NamedTuple):
    """A source cache beside a target cache."""

    token_match: bool
    dimension_mismatch: bool
    dimension_ratio: float
    levels: dict[str, LevelStatistics]
    """By level name, and `baseline` for the target itself."""

    def __repr__(self) -> str:
        tokens = "match" if self.token_match else "differ"
        lines = [f"CacheComparison: tokens {tokens}, dimension ratio {self.dimension_ratio:.2f}"]
        lines += [
            f"  {name:9} mean {level.mean:7.3f}  spread {level.spread:7.3f}  "
            f"CKA {level.cka:.3f} (shuffled {level.cka_shuffled:.3f})  outliers {level.outlier_share:.2%}"
            for name, level in self.levels.items()
        ]
        return "\n".join(lines)


def compare(source: VisionCache, target: VisionCache) -> CacheComparison:
    """Compare a source's levels with a target's features.

    Raises:
        ValueError: features of different images or on different grids, whose tokens have no common places.
    """
    if source.grids != target.grids:
        raise ValueError(
            f"the grids differ ({source.grids} and {target.grids}): compare features of one image"
        )
    images = [cache.provenance.get("images") for cache in (source, target)]
    if None not in images and images[0] != images[1]:
        raise ValueError("the features are of different images: take one image")
    baseline = target.vision_features[0].float()  # (N, Dt)
    names = [name for name in (*LEVEL_NAMES, "merged") if name in source.features]
    levels = {name: _statistics(source.features[name][0].float(), baseline) for name in names}
    levels["baseline"] = _statistics(baseline, baseline)
    width = source.late_features.shape[-1]
    return CacheComparison(True, width != baseline.shape[-1], width / baseline.shape[-1], levels)


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear centred kernel alignment of two (N, D) feature sets of the same N tokens, 0 to 1.

    Source: Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", section 3. With N
    far below D even unrelated features score well above 0: compare with a shuffled pair.

    Raises:
        ValueError: different token counts.
    """
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"linear CKA needs the same tokens on both sides, got {x.shape[0]} and {y.shape[0]}")
    x, y = (features.double() - features.double().mean(0) for features in (x, y))
    gram_x, gram_y = x @ x.T, y @ y.T  # (N, N): the tokens are fewer than the channels
    norm = gram_x.norm() * gram_y.norm()
    return float((gram_x * gram_y).sum() / norm) if norm > 0 else float("nan")


def _statistics(features: torch.Tensor, baseline: torch.Tensor) -> LevelStatistics:
    rms = features.square().mean(0).sqrt()  # (D,)
    outliers = (rms > OUTLIER_FACTOR * rms.median()).float().mean()
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    cka, shuffled = linear_cka(features, baseline), linear_cka(features[order], baseline)
    return LevelStatistics(float(features.mean()), float(features.std()), cka, shuffled, float(outliers))
