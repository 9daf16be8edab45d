"""Batch feature extraction with both towers, on images as the edit pipeline shows them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..extractor import FEATURES_VERSION, VisionCacheExtractor
from ..io import digest_of
from ..patches import condition_size
from ..specs import LEVEL_NAMES, Family
from .data import Sample
from .packs import Fields

HIGHRES = 2  # times the grid a side


class FeatureEncoder:
    """Both towers over samples: the source's levels and the target's features, on one grid.

    Args:
        highres_target: add the target's features of the image at a higher resolution: at the size that its
            own processor allows where that keeps the grid, since only the pipeline reduces the image; else
            at `HIGHRES` times the grid, averaged over the tokens that share a place.
    """

    def __init__(
        self, family: Family, device: torch.device | str, dtype: torch.dtype, highres_target: bool = False
    ) -> None:
        self.family, self.highres_target = family, highres_target
        self.extractor = VisionCacheExtractor(
            family, device=device, dtype=dtype, feature_cache=False, keep_models=True
        )

    def key(self) -> str:
        """Key of everything that decides an image's features."""
        extractor, editor = self.extractor, self.family.editor
        revisions = extractor.revision("qwen3"), extractor.revision("qwen25")
        towers = *revisions, str(extractor.dtype), extractor.load_in_8bit
        shown = editor.pipeline_class, editor.condition_area, editor.condition_step
        return digest_of([FEATURES_VERSION, *towers, *shown, self.highres_target])

    def encode(self, samples: Sequence[Sample]) -> list[Fields]:
        """The fields `early`, `mid`, `late`, `vision` and perhaps `highres`, and each sample's `grid`."""
        images = [sample.image for sample in samples]
        target = self.extractor.extract_qwen25_vision([self._as_shown(image) for image in images])
        source = self.extractor.extract_qwen3_vision(images, grids=target.grids)
        encoded = [
            {name: one.features[name][0] for name in LEVEL_NAMES}
            | {"vision": other.vision_features[0], "grid": list(other.grid)}
            for one, other in zip(source.split(), target.split(), strict=True)
        ]
        if self.highres_target:
            for fields, highres in zip(encoded, self._highres(images, target.grids), strict=True):
                fields["highres"] = highres
        return encoded

    def close(self) -> None:
        """Free both towers."""
        self.extractor.unload()

    def _as_shown(self, image: Image.Image) -> Image.Image:
        """The image as the pipeline gives it to the target's processor."""
        import diffusers

        editor = self.family.editor
        width, height = condition_size(getattr(diffusers, editor.pipeline_class), editor, image)
        return image.resize((width, height), Image.Resampling.LANCZOS)

    def _highres(self, images: list[Image.Image], grids: Sequence[tuple[int, int]]) -> list[Tensor]:
        own = map(self.extractor.target_grid, images)
        factors = [1 if grid == shown else HIGHRES for grid, shown in zip(own, grids, strict=True)]
        highres_grids = [(n * rows, n * columns) for n, (rows, columns) in zip(factors, grids, strict=True)]
        caches = self.extractor.extract_qwen25_vision(images, grids=highres_grids).split()
        return [
            pooled(cache.vision_features[0], cache.grid) if factor > 1 else cache.vision_features[0]
            for factor, cache in zip(factors, caches, strict=True)
        ]


def pooled(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean over HIGHRES × HIGHRES neighbours: (HIGHRES²·N, D) on `grid` to (N, D)."""
    rows, columns = grid
    planes = features.float().T.view(1, -1, rows, columns)
    return F.avg_pool2d(planes, HIGHRES).flatten(2)[0].T.to(features.dtype)
