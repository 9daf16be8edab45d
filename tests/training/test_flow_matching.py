"""The edit loss does not depend on batching, and weighs the changed region."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen_vision_bridge.loading.towers import load_processor
from qwen_vision_bridge.training.config import TrainingSettings
from qwen_vision_bridge.training.data import WorldSamples
from qwen_vision_bridge.training.features import FeatureEncoder
from qwen_vision_bridge.training.flow_matching import CHANGED, FlowMatching
from qwen_vision_bridge.training.frozen_lm import FrozenLanguageModel
from qwen_vision_bridge.training.losses import Batch, TrainData
from qwen_vision_bridge.training.packs import build_pack
from qwen_vision_bridge.training.trainable import TrainableBridge
from tests.conftest import SMALL

FAMILY = SMALL
SAMPLES = WorldSamples("edit", "validation", 4)


@pytest.fixture(scope="module")
def train_data(shared_pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> TrainData:
    encoder, flow = FeatureEncoder(FAMILY, "cpu", torch.float32), FlowMatching(shared_pipe, FAMILY.editor)

    def encode(chunk: Any) -> Any:
        return [a | b for a, b in zip(encoder.encode(chunk), flow.encode(chunk), strict=True)]

    pack = build_pack(tmp_path_factory.mktemp("edits"), SAMPLES, lambda: encode, "k")
    encoder.close()
    processor = load_processor(FAMILY.target.repo, FAMILY.target.processor_subfolder, None, False)
    return TrainData(FrozenLanguageModel(shared_pipe.text_encoder, processor, FAMILY), edit=pack, flow=flow)


class Identity:
    """The target's own features."""

    def vision_features(self, pack: Any, samples: torch.Tensor) -> torch.Tensor:
        return pack.rows("vision", samples).float()


@torch.no_grad()
def edit_loss(train_data: TrainData, part: slice, dropout: float = 0.0) -> float:
    batch = Batch(train_data, "edit", 3, 4, TrainingSettings(condition_dropout=dropout))
    return 4 * float(batch.losses(Identity(), part)[0]["edit"])


def test_padding_in_a_batch_changes_no_samples_loss(train_data: TrainData) -> None:
    lengths = train_data.texts["edit"].prompt_lengths
    assert len(set(lengths.tolist())) > 1  # there is padding
    each = [edit_loss(train_data, slice(number, number + 1)) for number in range(4)]
    assert len(set(each)) > 1
    assert sum(each) == pytest.approx(edit_loss(train_data, slice(0, 4)), rel=1e-4)


def test_a_dropped_prompt_is_the_pipelines_empty_one(train_data: TrainData) -> None:
    without = edit_loss(train_data, slice(0, 4), dropout=0.999)
    texts = train_data.texts["edit"]
    train_data.texts["edit"] = train_data.language_model.tokenize([(" ", None)] * 4, edit=True)
    try:
        assert edit_loss(train_data, slice(0, 4)) == pytest.approx(without, rel=1e-4)
    finally:
        train_data.texts["edit"] = texts
    assert edit_loss(train_data, slice(0, 4)) != pytest.approx(without, rel=1e-4)


def test_latents_are_those_of_the_stock_pipeline(train_data: TrainData, pipe: Any) -> None:
    from qwen_vision_bridge.pipeline import EnhancedQwenImageEdit

    seen: dict[str, torch.Tensor] = {}

    def record(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    handle = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        editor = EnhancedQwenImageEdit(SMALL, bridge="fresh", pipe=pipe, dtype=torch.float32)
        sample = SAMPLES[0]
        editor.generate(sample.image, sample.prompt, False, num_inference_steps=2, true_cfg_scale=1.0)
    finally:
        handle.remove()
    mine = train_data.edit.rows("references", torch.tensor([0])).float()
    stock = seen["hidden_states"][:, mine.shape[1] :]  # behind the noise
    assert (mine - stock).abs().max() < 0.02 * stock.abs().max()  # packs are in bf16
    assert seen["img_shapes"][0] == [(1, *train_data.edit.lines[0]["latents"])] * 2


def test_latents_do_not_depend_on_their_batch(train_data: TrainData) -> None:
    samples = [SAMPLES[index] for index in range(3)]
    wide = samples[1]._replace(
        image=samples[1].image.resize((192, 96)), after=samples[1].after.resize((192, 96))
    )
    mixed = train_data.flow.encode([samples[0], wide, samples[2]])
    for fields, sample in zip(mixed, (samples[0], wide, samples[2]), strict=True):
        (alone,) = train_data.flow.encode([sample])
        assert alone["latents"] == fields["latents"]
        for field in ("references", "after"):
            torch.testing.assert_close(fields[field], alone[field], atol=1e-4, rtol=1e-3)
    assert mixed[1]["latents"][1] > mixed[1]["latents"][0]


def test_checkpointing_changes_no_loss_and_no_gradient(train_data: TrainData, pipe: Any) -> None:
    batch = Batch(train_data, "edit", 0, 2, TrainingSettings())
    states = torch.randn(2, 5, 224, generator=torch.Generator().manual_seed(0))

    def gradient(flow: FlowMatching) -> tuple[torch.Tensor, torch.Tensor]:
        asked = states.clone().requires_grad_()
        loss = flow.losses(
            train_data.edit.rows("references", batch.samples),
            train_data.edit.rows("after", batch.samples),
            asked,
            torch.ones(2, 5, dtype=torch.bool),
            batch.latent_grid,
            batch.noise,
            batch.time_noise,
        ).sum()
        return loss.detach(), torch.autograd.grad(loss, asked)[0]

    plain = gradient(train_data.flow)
    try:
        saving = gradient(FlowMatching(pipe, FAMILY.editor, checkpointing=True))
    finally:
        pipe.transformer.disable_gradient_checkpointing()
        pipe.transformer.eval()
    assert plain[1].abs().sum() > 0
    for one, other in zip(plain, saving, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_the_changed_region_counts_more(train_data: TrainData) -> None:
    flow, samples = train_data.flow, torch.tensor([0])
    before, after = (train_data.edit.rows(name, samples).float() for name in ("references", "after"))
    assert not torch.equal(before, after)
    states, real = torch.zeros(1, 3, 224), torch.ones(1, 3, dtype=torch.bool)

    class Perfect(torch.nn.Module):
        """Right but for one token, by one in every channel."""

        dtype = torch.float32

        def __init__(self, wrong: int) -> None:
            super().__init__()
            self.wrong = wrong

        def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
            out = (noise - after).clone()
            out[0, self.wrong] += 1
            return (torch.cat([out, out], 1),)

    noise = torch.randn(after.shape, generator=torch.Generator().manual_seed(0))
    moved = (after - before).abs().mean(-1)[0]
    costs = []
    kept = flow.transformer
    try:
        for token in (int(moved.argmax()), int(moved.argmin())):
            flow.transformer = Perfect(token)
            costs.append(flow.losses(before, after, states, real, (8, 8), noise, torch.zeros(1)))
    finally:
        flow.transformer = kept
    assert costs[0] == pytest.approx(CHANGED * float(costs[1]), rel=1e-4)


def test_a_bridge_gets_bf16_packs_in_float32(train_data: TrainData) -> None:
    from qwen_vision_bridge.bridge import BridgeConfig, VisionBridge

    trainable = TrainableBridge(VisionBridge(BridgeConfig.for_family(FAMILY)))
    features = trainable.vision_features(train_data.edit, torch.tensor([0, 1]))
    assert features.dtype == torch.float32
    assert torch.equal(features, train_data.edit.rows("vision", torch.tensor([0, 1])).float())
