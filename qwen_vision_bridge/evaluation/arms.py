"""What an arm of an evaluation is: the baseline, a bridge at some strength and site, or a control."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast, get_args

from ..bridge import VisionBridge, bridge_digest, check_strength, resolve_bridge
from ..case import Case
from ..controls import Features
from ..injection import SITES, Site
from ..io import digest_of
from ..loading.lora_files import find_lora, lora_revision, parse_lora
from ..pipeline import EnhancedQwenImageEdit
from ..specs import Family
from .statistics import BASELINE

FORM = "NAME=BRIDGE|none[,strength=S][,site=SITE][,features=own|shuffled|target][,lora=FILE[:WEIGHT]]"
Patch = Callable[[EnhancedQwenImageEdit, Case], AbstractContextManager[None]]


@dataclass(frozen=True)
class Arm:
    """One way to run every case.

    Raises:
        ValueError: a name that is no part of a file name, an unknown site or kind of features, a strength out
            of range, a patch without a name.
    """

    name: str
    bridge: VisionBridge | None = None
    """None is the baseline, unless there is a patch."""
    bridge_name: str = ""
    strength: float = 1.0
    site: Site = "tower"
    features: Features = "own"
    """What the bridge sees; `shuffled` and `target` are the controls."""
    patch: Patch | None = None
    """Changes the pipeline for one edit or question of a case, such as to another text encoder."""
    patch_name: str = ""
    """Tells one patch, weights and all, from another: images of equal names are taken to be equal."""
    loras: tuple[tuple[str, float], ...] = ()
    """LoRAs of this arm alone, each a file, folder or hub id with its weight."""

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if not self.name or not self.name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise ValueError(f"an arm's name is letters, digits, '-', '_' and '.', not {self.name!r}")
        if self.site not in SITES:
            raise ValueError(f"site is one of {', '.join(SITES)}, not {self.site!r}")
        if self.features not in get_args(Features):
            raise ValueError(f"features is one of {', '.join(get_args(Features))}, not {self.features!r}")
        if len({file for file, _ in self.loras}) != len(self.loras):
            raise ValueError(f"the arm {self.name!r} has one LoRA twice: give it once")
        if (self.patch is None) != (not self.patch_name):
            raise ValueError(f"a patch needs a name, and a name a patch; got {self.patch_name!r}")

    @property
    def is_baseline(self) -> bool:
        """Whether it is the stock pipeline."""
        return self.bridge is None and self.patch is None and not self.loras

    def fingerprint(self) -> dict[str, Any]:
        """Everything about the arm that decides an image, but the features themselves."""
        parts: dict[str, Any] = {"patch": self.patch_name} if self.patch_name or self.bridge else {}
        if self.loras:
            parts["loras"] = [[lora_revision(file), weight] for file, weight in self.loras]
        if self.bridge is None:
            return parts
        settings = {"strength": self.strength, "site": self.site, "features": self.features}
        return {"bridge": bridge_digest(self.bridge), **settings, **parts}

    @contextmanager
    def applied(self, pipeline: EnhancedQwenImageEdit, case: Case) -> Iterator[None]:
        """The pipeline with this arm's patch and LoRAs; the LoRAs are loaded, see `loading_loras`."""
        patch = nullcontext() if self.patch is None else self.patch(pipeline, case)
        with patch, self.with_loras(pipeline):
            yield

    def with_loras(self, pipeline: EnhancedQwenImageEdit) -> AbstractContextManager[None]:
        """The pipeline with this arm's LoRAs alone."""
        weights = {lora_name(file): weight for file, weight in self.loras}
        return pipeline.weighted_loras(weights) if weights else nullcontext()

    def describe(self) -> dict[str, Any]:
        """The arm as plain data for a results file."""
        return {"name": self.name, "bridge_name": self.bridge_name, **self.fingerprint()}


def default_arms(bridge: VisionBridge, name: str, strength: float = 1.0, site: Site = "tower") -> list[Arm]:
    """The arms that every claim needs: baseline, bridge, and its two controls."""
    kinds: dict[str, Features] = {"bridge": "own", "shuffled": "shuffled", "target-only": "target"}
    arms = [Arm(label, bridge, name, strength, site, features) for label, features in kinds.items()]
    return [Arm(BASELINE), *arms]


def parse_arm(text: str, family: Family) -> Arm:
    """An arm as a command line gives it, `FORM`; the bridge is a folder, hub id, `fresh` or `random`.

    A bridge for `features=target` may be as wide as the target, whatever the source.

    Raises:
        ValueError, FileNotFoundError, OSError: what is wrong with it.
    """
    name, equals, rest = text.partition("=")
    bridge, *options = rest.split(",")
    loras = [parse_lora(each.removeprefix("lora=")) for each in options if each.startswith("lora=")]
    for file, _ in loras:
        find_lora(file)
    settings = dict(each.partition("=")[::2] for each in options if not each.startswith("lora="))
    if not equals or not bridge or set(settings) - {"strength", "site", "features"}:
        raise ValueError(f"an arm is {FORM}, not {text!r}")
    try:
        strength = float(settings.get("strength", 1.0))
    except ValueError as error:
        raise ValueError(f"strength is a number such as 1.0, not {settings['strength']!r}") from error
    if bridge == "none":
        if settings or not loras:
            raise ValueError(f"an arm without a bridge is NAME=none,lora=FILE[:WEIGHT], not {text!r}")
        return Arm(name, loras=tuple(loras))
    if settings.get("features") == "target" and bridge not in ("fresh", "random"):
        loaded = VisionBridge.from_pretrained(bridge).requires_grad_(False)
        if loaded.config.target_dim != family.target.out_dim:
            raise ValueError(
                f"the bridge {bridge!r} makes features of width {loaded.config.target_dim}, "
                f"{family.target.name} has {family.target.out_dim}"
            )
    else:
        loaded, _ = resolve_bridge(bridge, family)
    site = cast("Site", settings.get("site", "tower"))  # Arm checks both
    features = cast("Features", settings.get("features", "own"))
    return Arm(name, loaded, bridge, strength, site, features, loras=tuple(loras))


def lora_name(file: str) -> str:
    """The name under which an arm's LoRA is loaded: one file, one adapter, in any number of arms."""
    return f"arm-{digest_of(str(find_lora(file)))[:8]}"


@contextmanager
def loading_loras(pipeline: EnhancedQwenImageEdit, arms: Sequence[Arm]) -> Iterator[None]:
    """The arms' LoRAs on the pipeline, without effect until an arm is applied; unloaded afterwards."""
    files = {lora_name(file): file for arm in arms for file, _ in arm.loras}
    loaded: list[str] = []
    try:
        for name, file in files.items():
            loaded.append(pipeline.load_lora(file, 0.0, name))
        yield
    finally:
        for name in loaded:
            pipeline.unload_lora(name)


def check_arms(arms: Sequence[Arm]) -> None:
    """Refuse arms that cannot be compared.

    Raises:
        ValueError: no baseline, or two arms of one name.
    """
    names = [arm.name for arm in arms]
    if len(set(names)) != len(names):
        raise ValueError(f"every arm has a name of its own, got {', '.join(names)}")
    if [arm.name for arm in arms if arm.is_baseline] != [BASELINE]:
        raise ValueError(f"one arm is the baseline and named {BASELINE!r}; got {', '.join(names)}")
