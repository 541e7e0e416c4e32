"""Compare our arithmetic and our networks with numbers that the original programs made.

    python scripts/check_goldens.py quantizers DIR
    python scripts/check_goldens.py compvis DIR
    python scripts/check_goldens.py transformers DIR

quantizers: DIR holds `meta.json`, `timestep_maps.json` and the safetensors files that `meta.json` describes;
`tests/goldens/README.md` says what is in them. compvis: DIR holds `index.json` and the files that its own README
describes: networks of LDM, Stable Diffusion and DDIM, their samplers, and the keys of the published models. transformers:
DIR holds folders, each of one part: `flow/`, schedulers of flow matching and of real timesteps; `edm/`, EDM's samplers;
`temporal/`, networks of diffusers: what depends on the timestep, and their blocks; `dit/`, original DiT networks;
`quantizers/`, the arithmetic of Q-DiT, PTQ4DiT, SVDQuant and ViDiT-Q.

Shapes, seeds and settings are read from the files, so any set of the same layout can be checked. Every tensor has to be
read by some comparison. Differences are relative to the largest magnitude of the golden tensor, but where the table says
abs.

Exit status: 0 all within tolerance, 1 some comparison is not, 2 the folder is missing or damaged.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # as it is for a script, for tests that import this file

from goldens.comparing import DamagedError, print_groups
from goldens.compvis import check_compvis
from goldens.quantizers import check_quantizers
from goldens.transformers import check_transformers

from tfmq_exp.cli.terminal import standard_streams


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one kind of check on a folder; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name, check, content in (
        ("quantizers", check_quantizers, "ranges, rounding, losses, reconstructions, timesteps"),
        ("compvis", check_compvis, "converted networks, samplers, trajectories, full-size keys"),
        (
            "transformers",
            check_transformers,
            "schedulers of flow matching, EDM's samplers, networks of diffusers, original DiT, quantizers",
        ),
    ):
        kind = kinds.add_parser(name, help=content)
        kind.add_argument("folder", type=Path)
        kind.set_defaults(check=check)
    options = parser.parse_args(arguments)
    try:
        groups = options.check(options.folder)
    except DamagedError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print_groups(groups)
    return int(not all(group.ok for group in groups))


if __name__ == "__main__":
    with standard_streams():
        sys.exit(main())
