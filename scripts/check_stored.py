"""Memory of a whole run whose network stays in its files: `python run.py model=pipeline runtime.weights=stored until=images`.

    python scripts/check_stored.py FOLDER [--width 384 --blocks 114 --kill-after 40 --iterations 2 --rest-mib 300]

Takes a pipeline of tests/goldens, gives it a PixArt transformer with random weights (1 GiB by default), and runs everything: trajectory,
weights, activations, the file of the quantized network, and one image. A second run is killed once so many units are learned, and
started again. The status is 1 unless both end with the same files, and no process has taken more than two blocks, two streams
and --rest-mib beyond the same run of the pipeline's own tiny transformer, which shows what programs and conditions take.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench_blocks import sizes_of, write

ROOT = Path(__file__).parents[1]
PIPELINE = ROOT / "tests/goldens/transformers/pipelines/pixart"
CALL = {"height": 16, "width": 16, "use_resolution_binning": False, "max_sequence_length": 8, "clean_caption": False}
STEPS, IMAGES = 2, 4  # of sampling; trajectories, in one batch
TOKENS = 16  # of a sample: latents of 8 x 8 in patches of 2 x 2


def make_pipeline(folder: Path, width: int, blocks: int) -> None:
    """Copy the pipeline, with a transformer of this size."""
    shutil.copytree(PIPELINE, folder)
    config = json.loads((folder / "transformer/config.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder / "transformer")
    write(folder / "transformer", config | sizes_of(width, blocks))


def command(pipeline: Path, folder: Path, iterations: int) -> list[str]:
    """The run, whose results lie in the folder."""
    call = [f"+model.call.{key}={json.dumps(value)}" for key, value in CALL.items()]
    sizes = {
        **{"sampling.num_inference_steps": STEPS, "sampling.images": 1, "calibration.images": IMAGES},
        **{"calibration.step_stride": 1, "reconstruction.iterations": iterations, "reconstruction.batch_size": IMAGES},
    }
    places = {
        "paths.store": folder / "store",
        "paths.outputs": folder / "outputs",
        "captions": folder.parent / "captions.txt",
    }
    settings = {
        **places,
        "path": pipeline,
        "runtime.weights": "stored",
        "runtime.batch_size": IMAGES,
        "until": "images",
    }
    given = [f"{key}={value}" for key, value in settings.items()]
    return [
        *(sys.executable, str(ROOT / "run.py"), "model=pipeline", "device=cpu", *call, *given),
        *(f"protocol.{key}={value}" for key, value in sizes.items()),
    ]


def run(pipeline: Path, folder: Path, iterations: int, kill_after: int | None = None) -> dict[str, Any]:
    """Run it, or until so many units are learned; status, bytes of memory at the peak, seconds, and hashes of the results."""
    folder.mkdir(parents=True, exist_ok=True)
    # tensors in pages of their own: glibc's lists of what was freed would be counted, too
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": f"{2**20}"}
    began = time.perf_counter()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command(pipeline, folder, iterations), env=environment, stdout=log, stderr=log)
        while (
            kill_after
            and process.poll() is None
            and len(list(folder.glob("store/weights/*/units/*.safetensors"))) < kill_after
        ):
            time.sleep(0.05)
        if kill_after:
            process.send_signal(signal.SIGKILL)
        _, status, usage = os.wait4(process.pid, 0)
    files = [file for file in (folder / "store").rglob("*.safetensors") if file.parent.name != "units"]
    return {
        "status": os.waitstatus_to_exitcode(status),
        "peak": 1024 * usage.ru_maxrss,
        "seconds": round(time.perf_counter() - began, 1),
        "sha256": {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)},
    }


def check(args: argparse.Namespace) -> list[str]:
    """Everything that is not as it must be."""
    pipeline, given = args.folder / "pipeline", (args.iterations,)
    make_pipeline(pipeline, args.width, args.blocks)
    (args.folder / "captions.txt").write_text("a red cat\n", encoding="utf-8")
    tiny = run(PIPELINE, args.folder / "tiny", *given)
    whole = run(pipeline, args.folder / "whole", *given)
    killed = run(pipeline, args.folder / "killed", *given, args.kill_after)
    resumed = run(pipeline, args.folder / "killed", *given)
    found = {"tiny": tiny, "whole": whole, "killed": killed, "resumed": resumed}
    block, streams = 4 * 16 * args.width**2, 2 * 4 * IMAGES * STEPS * TOKENS * args.width
    bound = tiny["peak"] + 2 * block + streams + args.rest_mib * 2**20
    shown = {name: {key: value for key, value in one.items() if key != "sha256"} for name, one in found.items()}
    print(json.dumps({**shown, "block": block, "streams": streams, "bound": bound}, indent=2))
    ended = {"tiny": 0, "whole": 0, "killed": -signal.SIGKILL, "resumed": 0}
    wrong = [
        f"{name} ended with {found[name]['status']}"
        for name, status in ended.items()
        if found[name]["status"] != status
    ]
    wrong += [
        f"{name} took {one['peak']} bytes, allowed are {bound}" for name, one in found.items() if one["peak"] > bound
    ]
    kinds = {"trajectory", "weights", "activations", "images"}
    if {name.split("/")[1] for name in whole["sha256"]} != kinds or whole["sha256"] != resumed["sha256"]:
        wrong.append("the killed run ends with other files")
    return wrong


def main() -> int:
    """Check, and print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=384, help="a multiple of 64")
    parser.add_argument("--blocks", type=int, default=114)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--kill-after", type=int, default=40, help="units")
    parser.add_argument("--rest-mib", type=int, default=300)
    for line in (wrong := check(parser.parse_args())):
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
