"""What may be wrong with an artefact: changes of its manifest and its tensors, none of which leaves a model."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Content(NamedTuple):
    """What is in an artefact."""

    manifest: dict[str, Any]
    tensors: dict[str, Tensor]

    def layer(self) -> dict[str, Any]:
        return self.manifest["plan"]["layers"]["conv_out"]

    def config(self) -> dict[str, Any]:
        return self.manifest["config"]

    def scale(self) -> dict[str, Any]:
        return self.layer()["input"]["scale"]


Change = Callable[[Content], Any]
SCALE, ZERO = "weights/conv_out/0/scale", "weights/conv_out/0/zero_point"
INPUT, STEPS = (
    "activations/conv_out.input_quantizer",
    "activations/down_blocks.0.resnets.0.time_emb_proj.input_quantizer",
)


def number(key: str, value: float) -> Change:
    """One number of a tensor is another one; the type stays, unless it cannot hold it."""

    def change(content: Content) -> None:
        tensor = content.tensors[key]
        changed = tensor.float().clone() if not 0 <= value <= 255 or value % 1 else tensor.clone()
        changed.view(-1)[0] = value
        content.tensors[key] = changed

    return change


def tensor(key: str, made: Callable[[Tensor], Tensor]) -> Change:
    return lambda content: content.tensors.update({key: made(content.tensors[key])})


def entry(place: str, value: Any) -> Change:
    """What stands at a place of the manifest is another value; `...` removes it. Slashes within keys are written ~."""

    def change(content: Content) -> None:
        *outer, last = (key.replace("~", "/") for key in place.split("/"))
        inner: Any = content.manifest
        for key in outer:
            inner = inner[key]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value

    return change


CHANGES: dict[str, Change] = {
    **{
        f"{key} {v}": number(key, v)
        for key in (SCALE, f"{INPUT}/scale", f"{STEPS}/scale")
        for v in (math.nan, math.inf, 0, -1)
    },
    **{f"{ZERO} {v}": number(ZERO, v) for v in (16, 255, -1, 3.5, math.nan, math.inf)},
    **{
        f"{key}/zero_point {v}": number(f"{key}/zero_point", v)
        for key in (INPUT, STEPS)
        for v in (256, -1, 0.5, math.nan)
    },
    **{f"bias {v}": number("float/conv_in.bias", v) for v in (math.nan, -math.inf)},
    **{
        f"{key} as {dtype}": tensor(key, lambda x, dtype=dtype: x.to(dtype))
        for key, dtype in [
            ("weights/conv_out/0/codes", torch.float32),
            ("weights/conv_out/0/codes", torch.int8),
            (SCALE, torch.float64),
            (SCALE, torch.float16),
            (ZERO, torch.int64),
            (f"{INPUT}/scale", torch.float64),
            ("float/conv_in.bias", torch.int32),
            ("float/conv_in.bias", torch.float16),
            ("float/conv_in.bias", torch.complex64),
        ]
    },
    "scale of another shape": tensor(SCALE, lambda x: x[:-1]),
    "scale with more numbers": tensor(SCALE, lambda x: torch.cat([x, x])),
    "activation scale of another shape": tensor(f"{INPUT}/scale", lambda x: x.repeat(2)),
    "codes too few": tensor("weights/conv_out/0/codes", lambda x: x[:-1]),
    **{
        f"bits {b}": entry("plan/layers/conv_out/weight/bits", b)
        for b in (0, -1, 1, 3, 9, 16, 10**9, 2**70, 4.0, "4", None, [4], True)
    },
    **{
        f"scheme {x}": entry("plan/layers/conv_out/weight/scheme", x)
        for x in ("symmetric", "other", None, ["affine"], 3)
    },
    **{f"axis {x}": entry("plan/layers/conv_out/weight/axis", x) for x in (None, 1, -1, 7, True, "0", 0.0)},
    **{f"input bits {b}": entry("plan/layers/conv_out/input/specs", [{"bits": b}]) for b in (0, 99, "8")},
    **{f"specs {x}": entry("plan/layers/conv_out/input/specs", x) for x in ([], {}, None, "x", [3], [[]], 10**9)},
    **{f"split {x}": entry("plan/layers/conv_out/split", x) for x in (0, 1, -1, 10**9, "1", [1], 0.5)},
    **{
        f"scale kind {x}": entry("plan/layers/conv_out/input/scale/kind", x)
        for x in ("other", None, 3, [], {}, "dynamic", "timestep_groups", "per_step", "tdq", "lsq", "frequency")
    },
    "a default that is written": entry("plan/layers/conv_out/output", None),
    **{
        f"function {x}": entry("plan/layers/conv_out/input/fn", x)
        for x in ("lsq", 3, [], {}, {"kind": "pact"}, {"kind": "static"})
    },
    **{f"offset {x}": entry("plan/layers/conv_out/input/offset", x) for x in ("sometimes", 3, None, [], "learned")},
    **{f"momentum {x}": entry("plan/layers/conv_out/input/scale/momentum", x) for x in (-1, "0.5", None, True, [])},
    "observer": entry("plan/layers/conv_out/input/scale/observer", {"kind": "minmax"}),
    "scale with an unknown key": entry("plan/layers/conv_out/input/scale/novelty", 1),
    "spec with an unknown key": entry("plan/layers/conv_out/weight/novelty", 1),
    "site with an unknown key": entry("plan/layers/conv_out/novelty", 1),
    "plan with an unknown key": entry("plan/novelty", 1),
    "manifest with an unknown key": entry("novelty", 1),
    "configuration with an unknown key": entry("config/novelty", 1),
    "configuration with a private key": entry("config/_attn_implementation", "x/y"),
    "heads of something unknown": entry("heads/novelty", 1),
    "shape of something unknown": entry("shapes/novelty", [1]),
    "site that is unknown": lambda c: c.manifest["plan"]["layers"].update(novelty=c.layer()),
    "site that is no layer": lambda c: c.manifest["plan"]["layers"].update(mid_block=c.layer()),
    "site that is the network": lambda c: c.manifest["plan"]["layers"].update({"": c.layer()}),
    "operands of something unknown": lambda c: c.manifest["plan"]["operands"].update(novelty={}),
    "site removed": entry("plan/layers/conv_out", ...),
    **{
        f"without {place}": entry(place, ...)
        for place in [
            *(
                "network",
                "config",
                "plan",
                "shapes",
                "cached",
                "unneeded",
                "heads",
                "recipe",
                "plan/layers",
                "plan/operands",
            ),
            *(
                "plan/timesteps",
                "plan/layers/conv_out/weight",
                "plan/layers/conv_out/weight/bits",
                "shapes/weights~conv_out~0",
            ),
            *("plan/layers/conv_out/weight/axis", "plan/layers/conv_out/input", "plan/layers/conv_out/input/specs"),
            *("plan/layers/conv_out/input/scale", "plan/layers/conv_out/input/scale/kind"),
            *("config/block_out_channels", "config/norm_num_groups", "config/freq_shift", "config/layers_per_block"),
        ]
    },
    **{
        f"{place} as {value!r}": entry(place, value)
        for place in (
            "network",
            "config",
            "plan",
            "shapes",
            "cached",
            "unneeded",
            "heads",
            "plan/layers",
            "plan/operands",
            "plan/timesteps",
        )
        for value in (None, "text", [1], {"a": 1})
    },
    **{f"layers {v!r}": entry("plan/layers/conv_out", v) for v in (None, 3, "text", [], {})},
    **{
        f"timesteps {t}": entry("plan/timesteps", t)
        for t in (
            [],
            [-1],
            [1, 1],
            [751, 501, 251, -1],
            [751.0, 501, 251, 1],
            [751, 501, 251, "1"],
            [2**62, 3, 2, 1],
            [True, 3, 2, 5],
            [1, 2, 3],
            [None],
        )
    },
    **{f"timesteps of a layer more {k}": lambda c, k=k: c.manifest["plan"]["timesteps"].append(k) for k in (0, 751)},
    **{
        f"shape {x}": entry("shapes/weights~conv_out~0", x)
        for x in ([], [-3, 16, 3, 3], [2**62, 4], [16, 3, 3, 3], [3, 16, 9], "x", None, [3.0, 16, 3, 3])
    },
    **{
        f"config {key}={value}": entry(f"config/{key}", value)
        for key, value in [
            *(("layers_per_block", x) for x in (0, -1, 2, 10**9, 2**80, 1e9, "1", None, [1, 1])),
            *(
                ("block_out_channels", x)
                for x in ([], [16], [16, 2**40], [2**62, 2**62], [0, 0], [-16, 32], ["16", 32], 16, [16] * 10**5)
            ),
            *(("norm_num_groups", x) for x in (0, -8, 7, 10**9, "8")),
            *(("in_channels", x) for x in (0, -3, 2**40, "3", 4)),
            *(
                ("down_block_types", x)
                for x in ([], ["DownBlock2D"], ["os.system", "x"], 3, ["CrossAttnDownBlock2D", "DownBlock2D"])
            ),
            *(("act_fn", x) for x in ("novelty", None, 3)),
            *(("attention_head_dim", x) for x in (0, -1, "16", 10**9)),
            *(("norm_eps", x) for x in ("x", math.nan, None)),
            *(("time_embedding_type", x) for x in ("novelty", "fourier", 3)),
            *(("center_input_sample", x) for x in ("yes", 1)),
            ("sample_size", [[8]]),
        ]
    },
    **{
        f"heads {x}": lambda c, x=x: c.manifest["heads"].update({next(iter(c.manifest["heads"])): x})
        for x in (0, -1, 3, 10**9, "2", 2.0, None, True)
    },
    **{f"recipe {x}": entry("recipe", x) for x in (3, "text", [], {}, {"sampler": "DDIM"}, {"sampler": "os.system"})},
    "heads missing": lambda c: c.manifest["heads"].popitem(),
    **{
        f"cached {x}": entry("cached", x)
        for x in ({"conv_out": {"bits": 8, "scheme": "affine", "axis": 0}}, {"novelty": {}}, {"": {}})
    },
    **{
        f"unneeded {x}": entry("unneeded", x)
        for x in (["conv_out"], ["novelty"], [""], ["time_embedding.linear_1"], [3], [None])
    },
    **{f"outside {x}": entry("outside", x) for x in (["weights/conv_out/0"], [], "weights", None, [3], {"a": 1})},
    "tensor missing": lambda c: c.tensors.pop("float/conv_in.bias"),
    "tensor more": lambda c: c.tensors.update(novelty=torch.zeros(1)),
    "empty": lambda c: c.tensors.clear(),
}
