"""Extract the vision features of one image from Qwen3-VL and Qwen2.5-VL, compare them, size the bridge.

With --folder: extract every image below a folder into safetensors shards; a stopped run resumes. Under
`accelerate launch` several processes share the images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qwen_vision_bridge.cli import check_inputs, choose_models, parser, run
from qwen_vision_bridge.features import folder_store, shard_names
from qwen_vision_bridge.io import list_images

if TYPE_CHECKING:
    from qwen_vision_bridge.cache import VisionCache
    from qwen_vision_bridge.specs import Family

PROMPT = "Describe the picture."
ROLES: dict[str, Literal["qwen3", "qwen25"]] = {"source": "qwen3", "target": "qwen25"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run on one image, or on a folder."""
    options = parser(__doc__, PROMPT)
    options.add_argument("--target", help="another Qwen2.5-VL: registered name, hub id or local folder")
    options.add_argument("--folder", type=Path, help="extract every image below this folder into --output")
    options.add_argument(
        "--encoder", choices=[*ROLES, "both"], default="source", help="with --folder: which encoder to run"
    )
    options.add_argument("--compile", action="store_true", help="with --folder: torch.compile the tower")
    arguments = options.parse_args(argv)
    check_inputs(arguments)
    return extract_one(arguments) if arguments.folder is None else extract_all(arguments)


def extract_one(arguments: argparse.Namespace) -> int:
    """Extract one image with both encoders and print how their features compare."""
    from qwen_vision_bridge.bridge import BridgeConfig, VisionBridge, count_parameters
    from qwen_vision_bridge.extractor import VisionCacheExtractor
    from qwen_vision_bridge.io import write_image
    from qwen_vision_bridge.synthetic.cases import sample_image

    family = choose_models(arguments)
    image, prompt = arguments.image, arguments.prompt or PROMPT
    if image is None:
        image = [
            write_image(arguments.output / "test_input.png", sample_image(family.image_size, arguments.seed))
        ]
    print(f"Image: {', '.join(map(str, image))}\n")
    extractor = VisionCacheExtractor(family)

    qwen3_cache = extractor.extract_qwen3_vision(image, prompt)
    print("Qwen3-VL cache extracted successfully" + from_disk(qwen3_cache))
    print(f"  Early features: {qwen3_cache.early_features.shape}")
    print(f"  Mid features: {qwen3_cache.mid_features.shape}")
    print(f"  Late features: {qwen3_cache.late_features.shape}\n")

    qwen25_cache = extractor.extract_qwen25_vision(image, prompt)
    print("Qwen2.5-VL cache extracted successfully" + from_disk(qwen25_cache))
    print(f"  Vision features: {qwen25_cache.vision_features.shape}\n")

    comparison = extractor.compare_caches(qwen3_cache, qwen25_cache)
    print("Cache Comparison:")
    print(f"  Vision token count match: {comparison.token_match}")
    print(f"  Dimension mismatch: {comparison.dimension_mismatch}")
    print(f"  Dimension ratio: {comparison.dimension_ratio:.2f}\n")

    count = count_parameters(VisionBridge(BridgeConfig.for_family(family)))
    print(f"Total bridge parameters: {in_millions(count)}" + released_size(family))
    print("\nLevel        mean   spread  CKA with baseline (shuffled)  outlier channels")
    for name, level in comparison.levels.items():
        cka = f"{level.cka:.3f} ({level.cka_shuffled:.3f})"
        print(f"{name:9} {level.mean:7.3f} {level.spread:8.3f}  {cka:28}  {level.outlier_share:.2%}")
    return 0


def extract_all(arguments: argparse.Namespace) -> int:
    """Extract every image of a folder into shards; print the rate and the files that were skipped."""
    encoders = list(ROLES) if arguments.encoder == "both" else [arguments.encoder]
    shards = shard_names(len(list_images(arguments.folder).names))
    for name in encoders:  # before torch is imported
        folder_store(arguments.folder, arguments.output / name).claim(shards)
    from qwen_vision_bridge.distributed import Processes
    from qwen_vision_bridge.extractor import VisionCacheExtractor
    from qwen_vision_bridge.stream import extract_folder, folder_provenance

    extractor = VisionCacheExtractor(
        choose_models(arguments), device=Processes().device, compiled=arguments.compile, feature_cache=False
    )
    for name in encoders:  # both, before the first takes its hours
        fingerprint = folder_provenance(extractor, ROLES[name])
        folder_store(arguments.folder, arguments.output / name, fingerprint).claim(shards)
    for name in encoders:
        result = extract_folder(extractor, arguments.folder, arguments.output / name, ROLES[name])
        if result is None:  # the first process prints for all
            continue
        for file, reason in result.skipped.items():
            print(f"left out: {file}: {reason}")
        print(
            f"{name}: {result.done} of {result.images} images in {result.seconds:.1f} s, "
            f"{result.images_per_second:.1f} images/s, in {result.folder}/; left out: {len(result.skipped)}"
        )
    return 0


def from_disk(cache: VisionCache) -> str:
    """A note where features came from the feature cache and no model was loaded."""
    return " (from the feature cache, no model was loaded)" if cache.loaded_from else ""


def in_millions(count: int) -> str:
    """Format a count of parameters as `~5.2M`."""
    return f"~{count / 1e6:.1f}M" if count >= 100_000 else f"~{count / 1e6:.2f}M"


def released_size(family: Family) -> str:
    """For models smaller than the released ones, the bridge's size at the released shapes too."""
    if family.editor.transformer_params:
        return ""
    from qwen_vision_bridge.bridge import VisionBridge, count_parameters

    return (
        f" (miniature; {in_millions(count_parameters(VisionBridge()))} at the released shapes, 4096 to 3584)"
    )


if __name__ == "__main__":
    run(main)
