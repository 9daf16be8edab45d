"""A folder's features are those of its images one by one, however often the run stops and who shares it."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import example_extraction
from qwen_vision_bridge import features, stream
from qwen_vision_bridge.distributed import Processes
from qwen_vision_bridge.extractor import VisionCacheExtractor
from qwen_vision_bridge.loading.memory import GpuMemoryError
from qwen_vision_bridge.loading.towers import compile_blocks, load_tower
from qwen_vision_bridge.stream import FeatureFolder, extract_folder, read_ahead

SIZES = [(128, 128), (96, 160), (128, 128), (160, 96), (128, 128), (96, 160), (64, 64)]


@pytest.fixture(scope="module")
def extractor() -> VisionCacheExtractor:
    return VisionCacheExtractor("miniature", feature_cache=False, device="cpu")


@pytest.fixture
def images(tmp_path: Path, photo: Image.Image) -> Path:
    """Seven images of four shapes, one in a folder below, and one that is cut short."""
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    for number, size in enumerate(SIZES):
        photo.rotate(7 * number).resize(size).save(
            folder / ("below" if number == 3 else "") / f"{number}.png"
        )
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:400])
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize("role", ["qwen3", "qwen25"])
def test_folder_features_equal_each_image_alone(
    role: Any, extractor: VisionCacheExtractor, images: Path, tmp_path: Path
) -> None:
    done = extract_folder(extractor, images, tmp_path / "out", role, shard_images=3, batch_tokens=150)
    folder = FeatureFolder(tmp_path / "out")
    assert done.done == done.images == len(folder) == len(SIZES)
    assert "below/3.png" in folder.names
    assert list(done.skipped) == ["notes.txt", "cut.png"]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
    extract = extractor.extract_qwen3_vision if role == "qwen3" else extractor.extract_qwen25_vision
    for name in folder.names:
        alone = extract(images / name)
        assert folder[name].grid == alone.grid
        for key, rows in folder[name].features.items():
            torch.testing.assert_close(rows, alone.features[key], atol=1e-4, rtol=1e-4)


def test_every_file_is_done_or_named(
    extractor: VisionCacheExtractor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another format, damaged content, metadata of no use, and a file that vanishes while the run reads."""
    photo = Image.open(images / "0.png")
    photo.save(images / "also.jfif", "JPEG")
    photo.save(images / "photo.avif")
    data = (images / "photo.avif").read_bytes()
    (images / "other.jpg").write_bytes(data[: len(data) // 2])
    (images / "vanishes.png").write_bytes((images / "0.png").read_bytes())
    stock = stream.load_images

    def vanishing(path: Path, side: int) -> list[Image.Image]:
        if path.name == "vanishes.png":
            path.unlink()
        return stock(path, side)

    monkeypatch.setattr(stream, "load_images", vanishing)
    result = extract_folder(extractor, images, tmp_path / "out")
    assert (result.images, result.done) == (len(SIZES) + 2, len(SIZES) + 2)
    assert set(result.skipped) == {"cut.png", "notes.txt", "other.jpg", "vanishes.png"}
    assert "no such image" in result.skipped["vanishes.png"]


def test_images_of_one_grid_share_a_batch(
    extractor: VisionCacheExtractor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    stock = extractor.extract_batch
    monkeypatch.setattr(
        extractor,
        "extract_batch",
        lambda role, batch, grids: batches.append(grids) or stock(role, batch, grids),
    )
    extract_folder(extractor, images, tmp_path / "out")
    assert all(len(set(grids)) == 1 for grids in batches)
    assert max(map(len, batches)) >= 3


def test_a_stopped_run_resumes_without_repeating_a_shard(
    extractor: VisionCacheExtractor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = extract_folder(extractor, images, tmp_path / "whole", shard_images=2)
    stock, calls = features.write_shard, []

    def stops(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        stock(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(features, "write_shard", stops)
        with pytest.raises(KeyboardInterrupt):
            extract_folder(extractor, images, tmp_path / "parts", shard_images=2)
    with pytest.raises(FileNotFoundError, match="parts"):
        FeatureFolder(tmp_path / "parts")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*.safetensors")}
    assert kept
    again = extract_folder(extractor, images, tmp_path / "parts", shard_images=2)
    assert 0 < again.done < whole.done
    for name, time in kept.items():
        assert (tmp_path / "parts" / name).stat().st_mtime_ns == time
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_changed_image_and_a_damaged_shard_are_redone(
    extractor: VisionCacheExtractor, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    extract_folder(extractor, images, out, shard_images=2)
    before = FeatureFolder(out)["0.png"].late_features
    Image.open(images / "0.png").rotate(90).save(images / "0.png")
    last = sorted(out.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:100])
    done = extract_folder(extractor, images, out, shard_images=2)
    assert done.done == 3  # two beside the changed one's shard, and one beside the cut image
    assert not torch.equal(FeatureFolder(out)["0.png"].late_features, before)
    assert extract_folder(extractor, images, out, shard_images=2).done == 0


def test_features_of_other_models_are_not_mixed(
    extractor: VisionCacheExtractor, images: Path, tmp_path: Path
) -> None:
    extract_folder(extractor, images, tmp_path / "out")
    with pytest.raises(ValueError, match="model"):
        extract_folder(extractor, images, tmp_path / "out", "qwen25")


@pytest.fixture
def used(extractor: VisionCacheExtractor, images: Path, tmp_path: Path) -> Path:
    """An output with the features of the seven images, two a shard."""
    extract_folder(extractor, images, tmp_path / "used", shard_images=2)
    return tmp_path / "used"


def test_files_that_no_run_wrote_stay(extractor: VisionCacheExtractor, images: Path, tmp_path: Path) -> None:
    """Beside the shards they are left alone; where a shard would go they are refused before a model loads."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("features-mine.safetensors", "features-00007.safetensors"):
        (out / name).write_bytes(b"mine")
    extract_folder(extractor, images, out, shard_images=2)
    for number in (5, 6):
        (images / f"{number}.png").unlink()
    extract_folder(extractor, images, out, shard_images=2)
    assert (out / "features-mine.safetensors").read_bytes() == b"mine"
    assert (out / "features-00007.safetensors").read_bytes() == b"mine"
    assert len(list(out.glob("*.safetensors"))) == 2 + 3
    clash = tmp_path / "clash"
    clash.mkdir()
    (clash / "features-00002.safetensors").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="features-00002"):
        extract_folder(cold(), images, clash, shard_images=2)
    assert contents(clash) == {"features-00002.safetensors": b"mine"}


def cold() -> VisionCacheExtractor:
    """An extractor that fails where a model would be loaded."""
    extractor = VisionCacheExtractor("miniature", feature_cache=False, device="cpu")
    extractor.warm = lambda role: pytest.fail("a model was loaded")  # type: ignore[method-assign]
    return extractor


def test_another_folders_features_are_not_overwritten(
    images: Path, used: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (64, 64), "red").save(other / "0.png")
    before = contents(used)
    with pytest.raises(ValueError, match=re.escape(str(images))):
        extract_folder(cold(), other, used, shard_images=2)
    (tmp_path / "out").mkdir()
    used.rename(tmp_path / "out" / "target")
    monkeypatch.setattr(stream, "extract_folder", lambda *_: pytest.fail("the first one was begun"))
    with pytest.raises(ValueError, match="target"):  # the second encoder's, before the first
        example_extraction.main(
            [
                "--models",
                "miniature",
                "--folder",
                str(other),
                "--output",
                str(tmp_path / "out"),
                "--encoder",
                "both",
            ]
        )
    assert contents(tmp_path / "out" / "target") == before


@pytest.mark.parametrize("content", ['{"format": "qwen-vision-bridge/features/0"}', '{"mine": 1}', "no"])
def test_an_index_of_another_kind_or_version_is_refused(content: str, images: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json"):
        extract_folder(cold(), images, tmp_path / "out")
    with pytest.raises(ValueError, match=r"index\.json"):
        FeatureFolder(tmp_path / "out")
    assert contents(tmp_path / "out") == {"index.json": content.encode()}


def test_a_tampered_index_removes_nothing(used: Path, images: Path, tmp_path: Path) -> None:
    """What an index that was tampered with names is not removed."""
    index = json.loads((used / "index.json").read_text())
    (tmp_path / "precious").write_text("mine")
    (used / "index.json").write_text(json.dumps({**index, "shards": ["../precious"]}))
    with pytest.raises(ValueError, match=r"index\.json"):
        extract_folder(cold(), images, used, shard_images=2)
    assert (tmp_path / "precious").exists()


@pytest.mark.parametrize("kept", range(0, 12, 2))
def test_a_run_killed_after_any_file_resumes(
    kept: int,
    extractor: VisionCacheExtractor,
    images: Path,
    used: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run over fewer images dies before its `kept`-th change to the disk, and is started again."""

    class Killed(BaseException):
        pass

    for number in (4, 5, 6):
        (images / f"{number}.png").unlink()
    Image.new("RGB", (64, 64)).save(images / "0.png")
    left = [kept]

    def until_killed(change: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            if not left[0]:
                raise Killed
            left[0] -= 1
            return change(*arguments, **options)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(features, "write_shard", until_killed(features.write_shard))
        patch.setattr(features, "write_json", until_killed(features.write_json))
        patch.setattr(Path, "unlink", until_killed(Path.unlink))
        with suppress(Killed):
            extract_folder(extractor, images, used, shard_images=2)
    extract_folder(extractor, images, used, shard_images=2)
    extract_folder(extractor, images, tmp_path / "fresh", shard_images=2)
    for left_by_this_process in used.glob(".working-*.json"):  # a later process takes it for a dead one's
        left_by_this_process.unlink()
    assert contents(used) == contents(tmp_path / "fresh")


def test_added_and_removed_images_are_followed(
    extractor: VisionCacheExtractor, images: Path, used: Path
) -> None:
    Image.new("RGB", (64, 64)).save(images / "8.png")
    (images / "0.png").unlink()
    extract_folder(extractor, images, used, shard_images=2)
    names = set(FeatureFolder(used).names)
    assert "8.png" in names
    assert "0.png" not in names
    for path in images.rglob("[2-8].png"):
        path.unlink()
    extract_folder(extractor, images, used, shard_images=2)
    assert FeatureFolder(used).names == ["1.png"]
    assert len(list(used.glob("*.safetensors"))) == 1


def test_read_ahead_is_limited_to_its_depth() -> None:
    taken, most = 0, 0
    begun = []
    with ThreadPoolExecutor(4) as pool:
        for result in read_ahead(pool, lambda item: begun.append(item) or item, range(50), depth=5):
            assert result == taken
            taken += 1
            most = max(most, len(begun) - taken)
    assert taken == 50
    assert most <= 5


@pytest.mark.slow
def test_a_batch_too_large_for_the_gpu_is_halved(
    extractor: VisionCacheExtractor,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    extract_folder(extractor, images, tmp_path / "whole")
    stock = extractor.extract_batch

    def small(role: Any, batch: Any, grids: Any) -> Any:
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock(role, batch, grids)

    with monkeypatch.context() as patch:
        patch.setattr(extractor, "extract_batch", small)
        extract_folder(extractor, images, tmp_path / "halved")
    assert "too large for the GPU: halved" in caplog.text
    whole, halved = FeatureFolder(tmp_path / "whole"), FeatureFolder(tmp_path / "halved")
    for name in whole.names:
        torch.testing.assert_close(
            whole[name].late_features, halved[name].late_features, atol=1e-4, rtol=1e-4
        )

    def never(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(extractor, "extract_batch", never)
    with pytest.raises(GpuMemoryError, match=r"\.png"):
        extract_folder(extractor, images, tmp_path / "none")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_processes_write_what_one_writes(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second runs while the first waits for it; test_distributed.py starts real ones."""

    class Rank(Processes):
        def __init__(self, index: int) -> None:
            self.rank, self.waits = index, 0

        index, count, device = (
            property(lambda self: self.rank),
            property(lambda _: 2),
            property(lambda _: "cpu"),
        )

        def wait(self) -> None:
            self.waits += 1
            if self.rank == 0 and self.waits == 2:  # the index lists the shards that are to come
                monkeypatch.setattr(stream, "Processes", lambda: Rank(1))
                example_extraction.main([*arguments, str(tmp_path / "two")])
                outputs.append(capsys.readouterr().out)
                shards.append(len(list((tmp_path / "two" / "source").glob("*.safetensors"))))

    arguments = ["--models", "miniature", "--folder", str(images), "--output"]
    outputs: list[str] = []
    shards: list[int] = []
    monkeypatch.setattr(extract_folder, "__defaults__", ("qwen3", 2, 8192, None))  # two images a shard
    example_extraction.main([*arguments, str(tmp_path / "one")])
    assert capsys.readouterr().out.count("images/s") == 1
    monkeypatch.setattr(stream, "Processes", lambda: Rank(0))
    example_extraction.main([*arguments, str(tmp_path / "two")])
    outputs.append(capsys.readouterr().out)
    assert [*shards, len(list((tmp_path / "two" / "source").glob("*.safetensors")))] == [2, 4]
    assert [("images/s" in out, "left out: cut.png" in out) for out in outputs] == [(False,) * 2, (True,) * 2]
    one, two = (contents(tmp_path / name / "source") for name in ("one", "two"))
    assert len(one) == 5
    assert one == two


def test_the_command_refuses_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        example_extraction.main(["--models", "miniature", "--folder", str(tmp_path / "absent")])
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        example_extraction.main(
            ["--models", "miniature", "--folder", str(tmp_path), "--output", str(tmp_path)]
        )


@pytest.mark.slow
def test_compiled_blocks_compute_the_same() -> None:
    from qwen_vision_bridge.loading.registry import MODELS
    from qwen_vision_bridge.loading.tower_attention import tower_attention

    tower = load_tower(MODELS["miniature-source"]).model
    pixels, grid = (
        torch.randn(48, 384, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[1, 4, 6]] * 2),
    )
    with torch.inference_mode(), tower_attention(tower):
        plain = tower(pixels, grid)
        compile_blocks(tower, "eager")
        compiled = tower(pixels, grid)
    torch.testing.assert_close(compiled.pooler_output, plain.pooler_output)


def test_the_index_records_models_and_skipped_files(
    extractor: VisionCacheExtractor, images: Path, tmp_path: Path
) -> None:
    extract_folder(extractor, images, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["fingerprint"]["model"] == "miniature-source"
    assert index["fingerprint"]["target_grid"] == "miniature-target"
    assert list(FeatureFolder(tmp_path / "out")["0.png"].features) == ["early", "late", "mid"]
    assert set(index["skipped"]) == {"cut.png", "notes.txt"}
