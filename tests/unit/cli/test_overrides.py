"""What is said of overrides that Hydra cannot read, or whose keys are not there."""

import re
import shlex
from pathlib import Path

import pytest

from tests.e2e.jobs import CONF
from tfmq_exp.cli.overrides import misread, parsed, quoted, read_arguments, unknown_keys, unreadable

pytestmark = pytest.mark.bad_input

HARD = (
    "checkpoints/epoch=12-step=340.ckpt",
    "a folder/with (brackets)/x",
    "naïve/ünï.ckpt",
    "日本/🙂",
    "it's",
    'say "x".ckpt',
    """both ' and ".ckpt""",
    "a[1].ckpt",
    "a{b}",
    "a#b;c&d!e",
    '\\"=',
)


@pytest.mark.parametrize("value", HARD)
def test_the_command_that_is_offered_means_what_was_meant(value: str) -> None:
    line = misread(f"data.path={value}", sweeping=False)
    assert line.startswith(f"data.path={value} has signs that need quotes inside those of the shell: ")
    (word,) = shlex.split(line.removeprefix(f"data.path={value} ").partition("shell: ")[2])
    assert parsed(word).value() == value


@pytest.mark.parametrize(
    "value", [*HARD, "C:\\=\\", "plain", "", "with space ", "\\", "\\\\'\\", "null", "1e-3", "[a]"]
)
def test_quoted_text_is_read_as_it_is(value: str) -> None:
    assert parsed(f"key={quoted(value)}").value() == value


def test_every_value_of_a_sweep_gets_its_quotes() -> None:
    line = misread("path=epoch=1.ckpt,epoch=2.ckpt", sweeping=True)
    (word,) = shlex.split(line.partition("shell: ")[2])
    assert list(parsed(word).sweep_string_iterator()) == ['"epoch=1.ckpt"', '"epoch=2.ckpt"']


@pytest.mark.parametrize("word", ["data.path=~/x y", 'data.path="~/x y"', "+data.path='~/x y'", "data.path=~"])
def test_the_home_folder_is_written_out(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    line = misread(word, sweeping=False)
    (offered,) = shlex.split(line.partition("write " if "write " in line else "shell: ")[2])
    assert parsed(offered).value() in ("/home/me/x y", "/home/me")
    assert parsed(offered).input_line.startswith(word.partition("=")[0])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("digits", "digits is no override: those are KEY=VALUE or GROUP=CHOICE"),
        ("sites={a=b: 1}", "inside it, text with signs such as = or a space needs quotes"),
        ("sites=[a=b]", "inside it, text with signs"),
        ("seed=rnge(3)", "Unknown function 'rnge'"),
        ("path =x", "path =x: token recognition error"),
    ],
)
def test_what_has_no_simple_remedy_is_named(word: str, said: str) -> None:
    assert said in misread(word, sweeping=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "method=tfmq -m seed=0,1",
            "unrecognized arguments: seed=0,1; flags such as -m come before all overrides or after",
        ),
        ("quant=w4a8 --cfg job seed=1", "unrecognized arguments: seed=1; flags such as -m come before all overrides"),
        ("--quant w4a8", "unrecognized arguments: --quant; overrides are KEY=VALUE, without dashes"),
        ("--quant=w4a8 method=tfmq", "unrecognized arguments: --quant=w4a8; overrides are KEY=VALUE, without dashes"),
        ("-seed 1", "unrecognized arguments: -seed; overrides are KEY=VALUE"),
    ],
)
def test_words_in_the_wrong_place(capsys: pytest.CaptureFixture[str], words: str, said: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        read_arguments(words.split())
    assert said in " ".join(capsys.readouterr().err.split())


def test_what_hydra_reads_is_left_to_it() -> None:
    words = [
        "model=digits",
        "seed=0,1",
        "~debug",
        "+a.b=3",
        "a=[1,2]",
        "b={c: d}",
        "path=x y",
        "seed=range(0,3)",
        "p=$x",
    ]
    words += ["captions=null", "method.surgery.roles.stem=null"]  # keys, not groups
    assert unreadable(read_arguments([*words, "-m", "--config-dir", "x"]), CONF) == []


@pytest.mark.parametrize(
    "words", [["debug=null"], ["engine=null", "seed=1"], ["sampler=null"], ["-m", "debug=smoke,null"]]
)
def test_a_group_that_is_set_to_null(words: list[str]) -> None:
    (line,) = unreadable(read_arguments(words), CONF)
    assert re.search(r"(debug|engine|sampler)=null: .* leave (debug|engine|sampler) out", line)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["role.stem=null"], ["there is no key role.stem: did you mean method.surgery.roles.stem?"]),
        (["guidence=3"], ["there is no key guidence: did you mean model.sampling.guidance?"]),
        (["protocol.images=3"], ["there is no key protocol.images: did you mean protocol.sampling.images"]),
        (["method/surgry=default"], ["there is no key method/surgry: did you mean method/surgery?"]),
        (["runtime.bach=3", "debug=smoke"], ["runtime.batch_size"]),
        (["-m", "method=tfmq,lsq", "sead=1,2"], ["there is no key sead: did you mean seed"]),
        (["data.pth=x", "data=image_folder"], ["data.path"]),
        (["seed=1", "+anything=3", "hydra.run.dir=x", "method=tfmq", "~engine"], []),
        (["data.path=x"], ["there is no key data.path in what is chosen; there is one in data=celebahq, data=cifar10"]),
        (["logger.mode=online"], ["there is no key logger.mode in what is chosen; there is one in logger=wandb"]),
        (
            ["model=pipeline", "path=x", "sampler.eta=0.5"],
            [
                "there is one in sampler=ddim, sampler=ddim_original, sampler=ddpm, sampler=folder; here are sampler.checkpoint, "
            ],
        ),
        (["zzzzzz=1"], []),
        (["method=nope", "sead=1"], []),
        (["method=tfqm", "seed=1"], ["there is no method=tfqm: did you mean method=tfmq"]),
        (["quant=w5a5"], ["did you mean quant=w"]),
        (["-m", "method=tfmq,brecg"], ["there is no method=brecg: did you mean method=brecq?"]),
        (
            ["experiment=tfmq/table2_curch"],
            ["did you mean experiment=tfmq/table2_church"],
        ),
        (
            ["debug=null", "method/weights=joinly"],
            ["there is no method/weights=joinly: did you mean method/weights=jointly?"],
        ),
        (["quantt=w4a8"], ["there is no key quantt: did you mean quant"]),
    ],
)
def test_a_key_that_is_not_there_is_answered_with_those_that_are(words: list[str], said: list[str]) -> None:
    lines = unknown_keys(read_arguments(words), CONF)
    assert len(lines) == len(said)
    assert all(text in line for text, line in zip(said, lines, strict=True))


def test_groups_of_a_folder_of_ones_own_are_known(tmp_path: Path) -> None:
    own = tmp_path / "with = sign/method/mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("defaults: [tfmq, _self_]\nname: mine\nstrength: 3\n")
    words = ["--config-dir", str(own.parents[1]), "method=mine", "strenght=4"]
    (line,) = unknown_keys(read_arguments(words), CONF)
    assert "did you mean method.strength?" in line
