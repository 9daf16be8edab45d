"""From the hub only the tower's bytes are fetched, once; every failure of the network is one line.

The client runs in one process of its own, since huggingface_hub reads its address when it is imported.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qwen_vision_bridge.loading.towers import TOWER_PREFIX
from tests.conftest import shard_checkpoint

from .loopback_hub import LoopbackHub

CLIENT = """
import hashlib, json, logging, os, resource, signal, sys, time
from dataclasses import replace
from pathlib import Path
from qwen_vision_bridge.loading.checkpoints import HubCheckpoint, open_checkpoint
from qwen_vision_bridge.loading.families import resolve_family
from qwen_vision_bridge.loading.lora_files import find_lora
from qwen_vision_bridge.loading.registry import MODELS
from qwen_vision_bridge.loading.towers import load_tower

signal.alarm(280)  # ends the process, whatever it waits for
home = Path(os.environ["QWEN_VISION_BRIDGE_HOME"])

def load(repo, **changes):
    report = load_tower(replace(MODELS["miniature-source"], repo=repo, **changes))
    digest = hashlib.sha256()
    for name, tensor in sorted(report.model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return {"digest": digest.hexdigest(), "read": report.bytes_read, "total": report.total_bytes,
            "revision": report.revision}

def caught(call):
    started = time.perf_counter()
    try:
        call()
    except (OSError, ValueError) as error:
        return {"kind": type(error).__name__, "says": str(error), "seconds": time.perf_counter() - started}

load_tower(MODELS["miniature-source"])  # whatever is imported on the way, for both processes
reader, writer = os.pipe()
if os.fork() == 0:  # a second process, which wants the same tower at the same time
    signal.alarm(120)  # a child has none of its parent's
    os.write(writer, json.dumps(load("Org/Twice")).encode())
    os._exit(0)
twice = load("Org/Twice")
os.wait()
both = [twice, json.loads(os.read(reader, 65536))]

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # as a full disk: writes fail
full = load("Org/Full")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
full["left"] = sorted(path.name for path in home.rglob("*Org--Full*/*/*") if not path.name.endswith(".lock"))

lost = caught(lambda: load("Org/Lost"))
seen = {"both": both, "full": full, "lost": lost}
seen |= {"sharded": load("Org/Sharded"), "again": load("Org/Sharded"), "single": load("Org/Single")}
kept = next(home.glob("towers/Org--Sharded/*/*.safetensors"))
kept.write_bytes(kept.read_bytes()[:1000])
seen["damaged"] = load("Org/Sharded")
seen["left"] = sorted(path.name for path in kept.parent.iterdir() if not path.name.endswith(".lock"))
seen["cut"] = caught(lambda: load("Org/Cut"))
seen["whole"] = caught(lambda: load("Org/Whole"))
seen["missing"] = caught(lambda: load("Org/Absent"))
seen["unregistered"] = resolve_family("miniature", source="Org/Single").source.name
seen["unregistered_missing"] = caught(lambda: resolve_family("miniature", source="Org/Absent"))
loras = {"only": ("Org/Style",), "named": ("Org/Angles", "b.safetensors")}
loras |= {"path": ("Org/Angles/sub/a.safetensors",)}
found = {name: find_lora(*where).read_text() for name, where in loras.items()}
seen["loras"] = found | {"several": caught(lambda: find_lora("Org/Angles"))}
seen["loras"] |= {"absent": caught(lambda: find_lora("Org/Angles", "c.safetensors"))}
seen["loras"] |= {"nothing": caught(lambda: find_lora("Org/Absent"))}
print(json.dumps(seen))
sys.stdout.flush()
sys.stdin.readline()  # the hub goes away
gone = {"offline": load("Org/Sharded"), "lost": caught(lambda: load("Org/Faulty"))}
gone |= {"lora": find_lora("Org/Style").read_text(), "no lora": caught(lambda: find_lora("Org/Other"))}
print(json.dumps(gone))
"""


class Visit(NamedTuple):
    """What the client saw, with the hub there and then gone, and the hub's own count."""

    seen: dict[str, Any]
    gone: dict[str, Any]
    hub: LoopbackHub
    folders: dict[str, Path]
    weight_map: dict[str, str]
    errors: str


pytestmark = pytest.mark.slow  # they share two processes, which take seconds to start


@pytest.fixture(scope="module")
def visit(source_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Visit:
    root = tmp_path_factory.mktemp("hub")
    broken = ("Cut", "Whole", "Faulty", "Twice", "Full", "Lost")
    folders = {f"Org/{name}": root / name for name in ("Sharded", "Single", *broken)}
    weight_map = shard_checkpoint(source_folder, folders["Org/Sharded"], 4)
    shutil.copytree(source_folder, folders["Org/Single"])
    for name in broken:
        shutil.copytree(source_folder, folders[f"Org/{name}"])
        (folders[f"Org/{name}"] / "model.safetensors").rename(folders[f"Org/{name}"] / f"{name}.safetensors")
        index = {"weight_map": dict.fromkeys(weight_map, f"{name}.safetensors")}
        (folders[f"Org/{name}"] / "model.safetensors.index.json").write_text(json.dumps(index))
    (folders["Org/Lost"] / "Lost.safetensors").unlink()
    for file in ("Style/style.safetensors", "Angles/b.safetensors", "Angles/sub/a.safetensors"):
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file)
        folders |= {f"Org/{name}": root / name for name in ("Style", "Angles")}
    with LoopbackHub(folders) as hub:
        hub.truncate["Cut.safetensors"] = 5000
        hub.ignore_ranges.add("Whole.safetensors")
        environment = hub.environ(root / "home") | {"QWEN_VISION_BRIDGE_HOME": str(root / "kept")}
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        watchdog = threading.Timer(300, os.killpg, (client.pid, signal.SIGKILL))
        watchdog.daemon = True
        watchdog.start()
        first = client.stdout.readline()
    last, errors = client.communicate("\n", timeout=120)
    watchdog.cancel()
    assert client.returncode == 0, errors
    return Visit(json.loads(first), json.loads(last.strip()), hub, folders, weight_map, errors)


def test_only_the_towers_bytes_and_the_headers_cross_the_wire(visit: Visit) -> None:
    shards = {shard for name, shard in visit.weight_map.items() if TOWER_PREFIX.match(name)}
    served = sum(visit.hub.bytes_served[shard] for shard in set(visit.weight_map.values()))
    tower = visit.seen["sharded"]["read"]
    whole = sum((visit.folders["Org/Sharded"] / shard).stat().st_size for shard in shards)
    assert served == tower + visit.seen["damaged"]["read"]  # fetched once, and once more after the damage
    assert tower < 0.75 * visit.seen["sharded"]["total"]
    assert tower < whole
    for shard in set(visit.weight_map.values()) - shards:
        assert visit.hub.bytes_served[shard] == 0


def test_the_fetched_tower_is_the_local_one_bit_for_bit(visit: Visit, source_folder: Path) -> None:
    import hashlib

    from qwen_vision_bridge.loading.registry import MODELS
    from qwen_vision_bridge.loading.towers import load_tower

    digest = hashlib.sha256()
    for name, tensor in sorted(load_tower(MODELS["miniature-source"]).model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    for key in ("sharded", "again", "single", "damaged", "full"):
        assert visit.seen[key]["digest"] == digest.hexdigest(), key
    assert visit.gone["offline"]["digest"] == digest.hexdigest()


def test_two_processes_that_want_one_tower_fetch_it_once(visit: Visit) -> None:
    first, second = visit.seen["both"]
    assert first["digest"] == second["digest"] == visit.seen["sharded"]["digest"]
    assert min(first["read"], second["read"]) == 0
    assert visit.hub.bytes_served["Twice.safetensors"] == max(first["read"], second["read"])


def test_a_full_disk_costs_the_kept_copy_and_not_the_tower(visit: Visit) -> None:
    assert visit.seen["full"]["read"] > 0
    assert visit.seen["full"]["left"] == []  # no half file, no leftover beside it
    assert "this tower is not kept for the next time" in visit.errors


def test_a_second_load_reads_the_tower_cache_alone(visit: Visit) -> None:
    assert visit.seen["again"]["read"] == 0
    assert visit.seen["sharded"]["revision"] == visit.hub.commit("Org/Sharded")


def test_a_damaged_tower_cache_is_fetched_again(visit: Visit) -> None:
    assert visit.seen["damaged"]["read"] == visit.seen["sharded"]["read"]
    assert len(visit.seen["left"]) == 1


def test_a_cached_tower_loads_without_the_hub(visit: Visit) -> None:
    assert visit.gone["offline"]["read"] == 0


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("cut", "Org/Cut: Cut.safetensors: the hub did not deliver"),
        ("whole", "answered 200 to a byte range"),
        ("lost", "Org/Lost: Lost.safetensors is not on the hub, although the model's index names it"),
        ("missing", "Org/Absent: config.json: the hub has no such model"),
        ("unregistered_missing", "Org/Absent: config.json: the hub has no such model"),
    ],
)
def test_failures_of_the_hub_are_one_line_that_names_the_file(visit: Visit, case: str, says: str) -> None:
    assert says in visit.seen[case]["says"]
    assert "\n" not in visit.seen[case]["says"]


def test_a_server_without_ranges_is_asked_once_and_not_again(visit: Visit) -> None:
    """The answer's status is looked at before its body is read."""
    asked = [
        path for method, path, _ in visit.hub.requests if method == "GET" and "Whole.safetensors" in path
    ]
    assert len(asked) == 1


def test_a_lora_is_found_in_its_repository(visit: Visit) -> None:
    """The only file, a named one, one in a folder; later from the cache without the hub."""
    loras = visit.seen["loras"]
    assert loras["only"] == "Style/style.safetensors"
    assert (loras["named"], loras["path"]) == ("Angles/b.safetensors", "Angles/sub/a.safetensors")
    assert "2 LoRAs (b.safetensors, sub/a.safetensors)" in loras["several"]["says"]
    assert loras["absent"]["kind"] == "FileNotFoundError"
    assert "the hub has no such model" in loras["nothing"]["says"]
    assert visit.gone["lora"] == "Style/style.safetensors"
    assert "not in the local cache" in visit.gone["no lora"]["says"]


def test_without_network_and_cache_the_error_is_quick(visit: Visit) -> None:
    lost = visit.gone["lost"]
    assert "not in the local cache" in lost["says"]
    assert lost["seconds"] < 10  # huggingface_hub's own retries would take 23 s


def test_an_unregistered_hub_model_is_known_by_its_config(visit: Visit) -> None:
    assert visit.seen["unregistered"] == "miniature-source"
