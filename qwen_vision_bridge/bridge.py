"""`VisionBridge`: source levels and target features in, enhanced features of the target's shape out.

For token n and level l:  z_l = Down_l(Norm_l(x_l)),  a_l = softmax over l of <Query(Norm(b)), Key_l(z_l)>,
u = Σ_l Up_l(a_l · z_l),  out = b + strength · gate · rms(b) · clamp(u).

With `blend="replace"`, u = Σ_l Up_l(a_l · z_l) − b / rms(b), and strength · gate is the share of b that the
levels replace. The attention runs over the levels of one token; each head weighs its own slice of z. `Up`
starts at zero, which makes an untrained bridge exactly the identity.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from .io import read_json, usual_mode
from .loading.checks import broken_weight
from .loading.hub import folder_or_hub_file, is_hub_id
from .loading.locks import exclusive
from .loading.registry import FAMILIES, MODELS
from .specs import BUILTIN, LEVEL_NAMES, Family, check_seed

logger = logging.getLogger(__name__)

MODEL_CARD = Path(__file__).with_name("model_card.md.jinja")
Blend = Literal["add", "replace"]
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class BridgeConfig:
    """Shapes and settings of a bridge; the defaults take Qwen3-VL-8B to Qwen2.5-VL-7B in 5.2 M weights."""

    source_dim: int = 4096
    """Width of a source level."""
    target_dim: int = 3584
    """Width of the target's features."""
    levels: tuple[str, ...] = LEVEL_NAMES
    """Names of the source levels, in order."""
    rank: int | None = 192
    """Width of z; None projects each level directly, source_dim to target_dim."""
    heads: int = 4
    """Attention heads over the levels."""
    query_dim: int = 192
    """Width of queries and keys, all heads together."""
    clamp: float = 4.0
    """Largest size of one channel's update before the gate, in RMS of the baseline token."""
    init: Literal["zero", "random"] = "zero"
    """`zero`: an untrained bridge changes nothing; `random`: its update has about the baseline's RMS."""
    blend: Blend = "add"
    """`add`: the update is added to the baseline; `replace`: it takes its place, from a gate of 0 on."""
    seed: int = 0
    """Seed of the starting weights."""
    source_model: str | None = None
    """Name of the source the bridge was made for; None fits any of the right shape."""
    target_model: str | None = None
    """Name of the target the bridge was made for; None fits any of the right shape."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))  # a list in config.json
        for name in ("source_dim", "target_dim", "heads", "query_dim", "rank"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is a whole number from 1, not {value!r}")
        width = self.source_dim if self.rank is None else self.rank
        for name, value in (("query_dim", self.query_dim), ("rank or source_dim", width)):
            if value % self.heads:
                raise ValueError(f"{name} {value} does not divide into {self.heads} heads")
        check_seed(self.seed)
        if not self.levels or len(set(self.levels)) != len(self.levels):
            raise ValueError(f"levels are at least one name, each once, not {self.levels}")
        if self.init not in ("zero", "random"):
            raise ValueError(f'init is "zero" or "random", not {self.init!r}')
        if self.blend not in ("add", "replace"):
            raise ValueError(f'blend is "add" or "replace", not {self.blend!r}')
        if not (math.isfinite(self.clamp) and self.clamp > 0):
            raise ValueError(f"clamp is a positive number, not {self.clamp!r}")

    @classmethod
    def for_family(cls, family: Family, **changes: object) -> BridgeConfig:
        """The family's default config: its widths, its rank, and the names of its models."""
        settings: dict[str, Any] = {
            "source_dim": family.source.out_dim,
            "target_dim": family.target.out_dim,
            "rank": family.bridge_rank,
            "query_dim": family.bridge_rank,
            "source_model": family.source.name,
            "target_model": family.target.name,
        }
        return cls(**(settings | changes))

    def check_family(self, name: str, family: Family) -> None:
        """Refuse a bridge, called `name`, of other models than a family's (ValueError)."""
        source, target = family.source, family.target
        shapes = (self.source_dim, self.target_dim) == (source.out_dim, target.out_dim)
        models = self.source_model in (None, source.name) and self.target_model in (None, target.name)
        if not (shapes and models):
            raise ValueError(
                f"the bridge {name!r} leads from {self.source_model or 'any source'} ({self.source_dim}) to "
                f"{self.target_model or 'any target'} ({self.target_dim}); this family needs one from "
                f"{source.name} ({source.out_dim}) to {target.name} ({target.out_dim})"
            )


class BridgeOutput(NamedTuple):
    """The result for one batch of tokens."""

    features: torch.Tensor
    """(B, N, target_dim), in the baseline's dtype."""
    level_weights: torch.Tensor
    """(B, N, L): the attention over the levels, heads averaged; sums to 1 over L."""
    updates: list[torch.Tensor]
    """What each level adds at strength 1, L × (B, N, target_dim)."""


class VisionBridge(  # type: ignore[call-arg]  # the mixin takes them, which mypy does not read
    nn.Module,
    PyTorchModelHubMixin,
    library_name="qwen-vision-bridge",
    license="apache-2.0",
    model_card_template=MODEL_CARD.read_text(encoding="utf-8"),
):
    """Adds what the source's levels say to the target's features; see the module's formula.

    Method: attention over levels after DeepStack (Meng et al. 2024, arXiv 2406.04334) with low-rank
    projections and a zero-initialised output as in ControlNet (Zhang et al. 2023, arXiv 2302.05543).
    """

    @exclusive  # loading a model in another thread patches `nn.Module`
    def __init__(self, config: BridgeConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or BridgeConfig()
        width = config.source_dim if config.rank is None else config.rank
        levels, linear = range(len(config.levels)), partial(nn.Linear, bias=False)
        self.source_norms = nn.ModuleList(nn.RMSNorm(config.source_dim, eps=1e-6) for _ in levels)
        self.target_norm = nn.RMSNorm(config.target_dim, eps=1e-6)
        down = nn.Identity if config.rank is None else partial(linear, config.source_dim, width)
        self.downs = nn.ModuleList(down() for _ in levels)
        self.query = linear(config.target_dim, config.query_dim)
        self.keys = nn.ModuleList(linear(width, config.query_dim) for _ in levels)
        self.ups = nn.ModuleList(linear(width, config.target_dim) for _ in levels)
        self.gate = nn.Parameter(torch.ones(()))
        self._initialise()

    def forward(
        self, levels: Sequence[torch.Tensor], baseline: torch.Tensor, strength: float = 1.0
    ) -> BridgeOutput:
        """Bridge one batch of tokens.

        Args:
            levels: one (B, N, source_dim) tensor a level, in the config's order.
            baseline: (B, N, target_dim), the target's features of the same tokens in the same order.
            strength: scales the update; 0 returns the baseline itself.

        Raises:
            ValueError: shapes that do not fit the config, or a strength that is not finite.
        """
        check_strength(strength)
        parts, weights = self.contributions(levels, baseline)
        if strength == 0:
            return BridgeOutput(baseline, weights, parts)  # no arithmetic: the bits stay as they are
        out = baseline.to(parts[0].dtype) + strength * torch.stack(parts).sum(0)
        return BridgeOutput(out.to(baseline.dtype), weights, parts)

    def contributions(
        self, levels: Sequence[torch.Tensor], baseline: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The update at strength 1, level by level.

        Returns:
            One (B, N, target_dim) tensor a level, whose sum is the update, in the bridge's dtype; and the
            level weights (B, N, L), heads averaged.

        Raises:
            ValueError: shapes that do not fit the config.
        """
        self._check_shapes(levels, baseline)
        dtype, heads = self.gate.dtype, self.config.heads
        baseline = baseline.to(dtype)
        latents = [
            down(norm(level.to(dtype)))
            for down, norm, level in zip(self.downs, self.source_norms, levels, strict=True)
        ]  # L × (B, N, R)
        query = self.query(self.target_norm(baseline)).unflatten(-1, (heads, -1))  # (B, N, H, K)
        keys = torch.stack(
            [key(z).unflatten(-1, (heads, -1)) for key, z in zip(self.keys, latents, strict=True)]
        )
        scores = (query * keys).sum(-1) / math.sqrt(query.shape[-1])  # (L, B, N, H)
        attention = scores.softmax(0)
        updates = [
            up((weight[..., None] * z.unflatten(-1, (heads, -1))).flatten(-2))
            for up, weight, z in zip(self.ups, attention, latents, strict=True)
        ]  # L × (B, N, Dt), in RMS of the baseline
        rms = baseline.square().mean(-1, keepdim=True).sqrt()
        if self.config.blend == "replace":  # every level takes its share of the baseline away
            own = baseline / rms.clamp_min(torch.finfo(dtype).tiny) / len(updates)
            updates = [update - own for update in updates]
        scale = self.gate * rms
        total, limit = torch.stack(updates).sum(0), self.config.clamp
        share = limit / total.abs().clamp_min(limit)  # of each channel; the same for all levels
        return [scale * (share * update) for update in updates], attention.mean(-1).permute(1, 2, 0)

    def save_pretrained(self, save_directory: str | Path, **options: object) -> str | None:
        """Write `config.json` and `model.safetensors`; options such as `push_to_hub=True` as in the mixin."""
        options["config"] = options.get("config") or asdict(self.config)
        url = super().save_pretrained(save_directory, **options)
        usual_mode(Path(save_directory) / WEIGHTS_FILE)
        return url

    def generate_model_card(self, *args: object, **details: object) -> ModelCard:
        """The card of a saved bridge, from its config; `details` may add `training` and `results` as text."""
        models = (self.config.source_model, self.config.target_model)
        named = [one.name for one in FAMILIES.values() if models == (one.source.name, one.target.name)]
        card = super().generate_model_card(*args, models=models, family="".join(named[:1]), **details)
        repos = [MODELS[model].repo for model in models if model in MODELS]
        card.data.base_model = [repo for repo in repos if not repo.startswith(BUILTIN)] or None
        return card

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, map_location: str = "cpu", **hub: str | bool | None
    ) -> VisionBridge:
        """Load a bridge from a folder or the hub, strictly, and never from a pickle, as the mixin would.

        Args:
            hub: `revision`, `token` and the like, as `hf_hub_download` takes them.

        Raises:
            FileNotFoundError, OSError: no such bridge, no connection, or damaged weights.
            ValueError: a config of another kind, or pickled weights.
        """
        location = str(pretrained_model_name_or_path)
        bridge = cls(_read_config(folder_or_hub_file(location, CONFIG_FILE, hub)))
        weights = folder_or_hub_file(location, WEIGHTS_FILE, hub)
        try:
            load_model(bridge, str(weights), strict=True, device=map_location)
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise OSError(f"{weights} does not load as this bridge's weights: {reason}") from error
        if broken := broken_weight({"bridge": bridge}):
            raise OSError(f"{weights}: the weight {broken} is NaN or infinite: copy or download it again")
        return bridge.eval()

    def extra_repr(self) -> str:
        """Parameters, levels and shapes, first in the printed module."""
        levels, source, target = "/".join(self.config.levels), self.config.source_dim, self.config.target_dim
        return f"{count_parameters(self) / 1e6:.2f} M parameters, levels {levels}, {source} to {target}"

    def _initialise(self) -> None:
        generator = torch.Generator().manual_seed(self.config.seed)
        zero = self.config.init == "zero"
        if zero and self.config.blend == "replace":
            nn.init.zeros_(self.gate)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
                zeroed = zero and name.startswith("ups.")
                parameter.data.copy_(torch.zeros_like(noise) if zeroed else noise)

    def _check_shapes(self, levels: Sequence[torch.Tensor], baseline: torch.Tensor) -> None:
        config = self.config
        if len(levels) != len(config.levels):
            raise ValueError(
                f"this bridge takes {len(config.levels)} levels {config.levels}, got {len(levels)}"
            )
        wanted = (*baseline.shape[:-1], config.source_dim)
        if baseline.ndim != 3 or baseline.shape[-1] != config.target_dim:
            raise ValueError(f"the baseline is (B, N, {config.target_dim}), got {tuple(baseline.shape)}")
        for name, level in zip(config.levels, levels, strict=True):
            if tuple(level.shape) != wanted:
                raise ValueError(f"level {name!r} is {wanted}, got {tuple(level.shape)}")


def check_strength(strength: float) -> float:
    """Return the strength as a float.

    Raises:
        TypeError: not a number. ValueError: NaN or infinite.
    """
    if isinstance(strength, bool) or not isinstance(strength, Real):  # NumPy's numbers are of this kind too
        raise TypeError(f"strength is a number such as 1.0, not {strength!r}")
    if not math.isfinite(strength):
        raise ValueError(f"strength is a finite number such as 1.0, not {strength}")
    return float(strength)


def resolve_bridge(choice: VisionBridge | str | Path | None, family: Family) -> tuple[VisionBridge, str]:
    """The bridge that a user means, frozen, and its name.

    Args:
        choice: a bridge, a folder, a hub id, `"fresh"` or `"random"`; None is the family's shipped bridge,
            else a fresh one with a warning.

    Raises:
        FileNotFoundError, OSError, ValueError: as `from_pretrained`, or a bridge of other models.
    """
    shipped = WEIGHTS / f"bridge-{family.name}"
    if choice is None and shipped.is_dir():
        bridge, name = VisionBridge.from_pretrained(shipped), f"{shipped.name}, as shipped"
    elif isinstance(choice, VisionBridge):
        bridge, name = choice, "given"
    elif choice in (None, "fresh", "random"):
        if choice is None:
            logger.warning("no trained bridge for %s: a fresh one changes nothing", family.name)
        init = "random" if choice == "random" else "zero"
        bridge, name = VisionBridge(BridgeConfig.for_family(family, init=init)), str(choice or "fresh")
    elif Path(choice).expanduser().exists() or is_hub_id(str(choice)):
        bridge, name = VisionBridge.from_pretrained(choice), str(choice)
    else:
        raise ValueError(f"bridge {str(choice)!r} is no folder, no hub id, and not `fresh` or `random`")
    bridge.config.check_family(name, family)
    return bridge.eval().requires_grad_(False), name


def count_parameters(module: nn.Module) -> int:
    """Number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def bridge_digest(bridge: VisionBridge) -> str:
    """Short digest of a bridge's weights and of the settings that decide what it makes of them."""
    config = bridge.config
    settings = [config.levels, config.heads, config.clamp, config.blend]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in bridge.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def _read_config(path: Path) -> BridgeConfig:
    try:
        return BridgeConfig(**read_json(path))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no bridge config: {error}") from error
