"""Numbers that a change of structure must leave as they are, of eleven small runs: tensors, images, scores, random streams.

    python scripts/frozen_numbers.py numbers.json                       # compute and write them
    python scripts/frozen_numbers.py numbers.json --against before.json # and compare them with those of before
    python scripts/frozen_numbers.py tests/goldens/frozen_numbers.json --only nearest tfmq lsq_tdq    # those of the test

Tensors are compared by content: names, files and formats may change. Floating-point sums depend on the processor, so both files
must come from one machine. Runs are those of `SETTINGS`, shortened by `debug=smoke`, in a store of their own.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

DIGITS = ("model=digits", "quant=w4a8", "debug=smoke", "until=scores")
# name of a run: its overrides
SETTINGS: dict[str, tuple[str, ...]] = {
    "nearest": (*DIGITS, "method=nearest"),
    "brecq": (*DIGITS, "method=brecq"),
    "qdrop": (*DIGITS, "method=qdrop"),
    "qdiff": (*DIGITS, "method=qdiff"),
    "ptqd": (*DIGITS, "method=ptqd", "sampler.eta=1.0"),
    "tdq": (*DIGITS, "method=tdq"),
    "tfmq": (*DIGITS, "method=tfmq"),
    "tfmq_cache": (*DIGITS, "method=tfmq_cache"),
    "dynamic": (*DIGITS, "method=dynamic"),
    "lsq_tdq": (*DIGITS, "method=lsq_tdq"),
    "guided": (
        *("model=ldm_imagenet", "method=tfmq", "quant=w4a8", "debug=smoke", "until=images"),
        *("model.sampling.conditioning.count=10", "protocol.sampling.images=4"),
    ),
}


def digest(value: bytes) -> str:
    """The first 16 hex digits of a sha256."""
    return hashlib.sha256(value).hexdigest()[:16]


def tensor_digests(path: Path) -> list[str]:
    """Shape, type and content of every tensor of a file, sorted, without names."""
    found: list[str] = []
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            value = file.get_tensor(name).contiguous()
            content = value.reshape(-1).view(torch.uint8).numpy().tobytes()
            found.append(f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} {digest(content)}")
    return sorted(found)


def recorded_seeds(into: dict[str, int]) -> None:
    """Have every seed that is derived from now on noted with the strings that name its stream."""
    from tfmq_exp.core import seeds

    derive = seeds.derive_seed

    def noted(*parts: int | str) -> int:
        into["/".join(map(str, parts))] = seed = derive(*parts)
        return seed

    for module in [m for name, m in sys.modules.items() if name.startswith("tfmq_exp")]:
        if getattr(module, "derive_seed", None) is derive:
            setattr(module, "derive_seed", noted)  # noqa: B010


def streams_digest(seeds: dict[str, int]) -> dict[str, Any]:
    """Number of random streams of a run, and a digest of their names and first numbers."""
    first = [
        [name, seed, float(torch.rand((), generator=torch.Generator().manual_seed(seed)))]
        for name, seed in sorted(seeds.items())
    ]
    return {"count": len(first), "digest": digest(json.dumps(first).encode())}


def class_conditional_checkpoint(folder: Path) -> tuple[str, ...]:
    """A tiny class-conditional latent diffusion model in its original format; overrides that choose it."""
    from tests.e2e.test_models import checkpoint

    checkpoint("ldm_cin256_v2", folder)
    config = ROOT / "tests/goldens/compvis/ldm_cin256_v2.config.yaml"
    return (f"model.denoiser.path={folder}/model.ckpt", f"model.denoiser.config={config}")


def numbers(run: Callable[..., Path], name: str, folder: Path) -> dict[str, Any]:
    """All numbers of one run."""
    overrides, seeds = SETTINGS[name], {}
    if "model=ldm_imagenet" in overrides:
        overrides = (*overrides, *class_conditional_checkpoint(folder))
    recorded_seeds(seeds)
    results = run(folder / name, f"paths.store={folder / 'store'}", *overrides)
    stages = json.loads((results / "artifacts.json").read_text(encoding="utf-8"))
    images = [
        path for stage in ("images", "float images") for path in Path(stages[stage]["path"]).glob("*.safetensors")
    ]
    found: dict[str, Any] = {
        "model": tensor_digests(Path(stages["activations"]["path"]) / "quantized.safetensors"),
        "images": sorted(line for path in images for line in tensor_digests(path)),
        "streams": streams_digest(seeds),
    }
    if (results / "results.json").is_file():
        rows = json.loads((results / "results.json").read_text(encoding="utf-8"))["rows"]
        found["scores"] = [row["scores"] for row in rows]
        found["errors"] = [row["errors"] for row in rows]
    return found


def machine() -> list[str]:
    """Version of torch and instructions of the processor, on which floating-point sums depend."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return [torch.__version__, torch.backends.cpu.get_cpu_capability(), digest(features.encode())]


def main() -> int:
    """Compute, write, compare; 1 where a number differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", type=Path, help="file to write")
    parser.add_argument("--against", type=Path, help="file of another version to compare with")
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), default=list(SETTINGS), help="some of the runs")
    given = parser.parse_args()
    torch.set_num_threads(1)

    from tests.e2e.jobs import job

    found: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            found[name] = numbers(job, name, Path(folder))
            given.numbers.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if given.against is None:
        return 0
    before = json.loads(given.against.read_text(encoding="utf-8"))
    differ = [
        f"{name}: {what}" for name in given.only for what in before[name] if found[name].get(what) != before[name][what]
    ]
    sys.stdout.write("\n".join(differ or [f"{len(given.only)} runs: all numbers are those of {given.against}"]) + "\n")
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
