"""What both towers see of many images, as an edit pipeline would show them, several at a time."""

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
from .packs import Seen

FINER = 2  # times the grid a side: what a teacher sees


class FeatureEncoder:
    """Both towers over samples: the source's levels and the target's features, on one grid.

    Args:
        teacher: also the target's features of the image seen finer: as large as its own processor takes it,
            where only the pipeline reduces it and the grid stays; else at `FINER` times the grid, averaged
            over the tokens that share a place.
        load_in_8bit: of the towers; needs CUDA.
    """

    def __init__(
        self,
        family: Family,
        device: torch.device | str,
        dtype: torch.dtype,
        teacher: bool = False,
        load_in_8bit: bool = False,
    ) -> None:
        self.family, self.teacher = family, teacher
        self.extractor = VisionCacheExtractor(
            family, load_in_8bit, device=device, dtype=dtype, feature_cache=False, keep_models=True
        )

    def key(self) -> str:
        """Changes whenever the features of an equal image would."""
        extractor = self.extractor
        return digest_of(
            [
                FEATURES_VERSION,
                extractor.revision("qwen3"),
                extractor.revision("qwen25"),
                str(extractor.dtype),
                extractor.load_in_8bit,
                self.family.editor.pipeline_class,
                self.family.editor.condition_area,
                self.family.editor.condition_step,
                self.teacher,
            ]
        )

    def see(self, samples: Sequence[Sample]) -> list[Seen]:
        """The fields `early`, `mid`, `late`, `vision` and perhaps `teacher`, and each sample's `grid`."""
        images = [sample.image for sample in samples]
        target = self.extractor.extract_qwen25_vision([self._shown(image) for image in images])
        source = self.extractor.extract_qwen3_vision(images, grids=target.grids)
        finer = self._finer(images, target.grids) if self.teacher else None
        seen = []
        for number, (one, other) in enumerate(zip(source.split(), target.split(), strict=True)):
            fields = {name: one.features[name][0] for name in LEVEL_NAMES}
            fields["vision"] = other.vision_features[0]
            if finer is not None:
                fields["teacher"] = finer[number]
            seen.append({**fields, "grid": list(other.grid)})
        return seen

    def close(self) -> None:
        """Free both towers."""
        self.extractor.unload()

    def _shown(self, image: Image.Image) -> Image.Image:
        """The image as the pipeline gives it to the target's processor."""
        import diffusers

        editor = self.family.editor
        width, height = condition_size(getattr(diffusers, editor.pipeline_class), editor, image)
        return image.resize((width, height), Image.Resampling.LANCZOS)

    def _finer(self, images: list[Image.Image], grids: Sequence[tuple[int, int]]) -> list[Tensor]:
        whole = [self.extractor.target_grid(one) == grid for one, grid in zip(images, grids, strict=True)]
        seen = [
            (rows, columns) if stays else (FINER * rows, FINER * columns)
            for stays, (rows, columns) in zip(whole, grids, strict=True)
        ]
        parts = self.extractor.extract_qwen25_vision(images, grids=seen).split()
        return [
            part.vision_features[0] if stays else pooled(part.vision_features[0], part.grid)
            for stays, part in zip(whole, parts, strict=True)
        ]


def pooled(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean over FINER × FINER neighbours: (FINER²·N, D) on `grid` to (N, D)."""
    rows, columns = grid
    planes = features.float().T.view(1, -1, rows, columns)
    return F.avg_pool2d(planes, FINER).flatten(2)[0].T.to(features.dtype)
