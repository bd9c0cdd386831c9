"""A bad configuration fails in one line that names the place and the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_prorl.config.load import ConfigError, dump_config, load_config
from megatron_prorl.config.schema import Config
from megatron_prorl.config.stages import stage_config

EXAMPLES = Path(__file__).parents[3] / "examples"
BASE: dict[str, Any] = {
    "run_dir": "runs/test",
    "steps": 4,
    "model": {"path": "models/none"},
    "parallel": {"ranks_per_node": 4},
    "data": {"tasks": [{"task": "chain_sum", "params": {"max_terms": 2}}, {"task": "gcd"}]},
    "rollout": {
        "prompts_per_step": 16,
        "rollouts_per_prompt": 4,
        "max_prompt_tokens": 512,
        "max_response_tokens": 1024,
    },
    "tracking": {"wandb": None},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["parallel.tensr=2"], "parallel.tensr: no such option; did you mean parallel.tensor?"),
        (["rollout.engines.cuont=2"], "rollout.engines.cuont: no such option; did you mean rollout.engines.count?"),
        (["data.tasks.1.wieght=2"], "data.tasks.1.wieght: no such option; did you mean data.tasks.1.weight?"),
        (["tracking.wandb={proyect: x, project: x}"], "tracking.wandb.proyect: no such option; "
         "did you mean tracking.wandb.project?"),
        (["clip_high=0.3"], "clip_high: no such option; did you mean algorithm.clip_high?"),
        (["every_steps=3"], "every_steps: no such option; "
         "did you mean reset.every_steps or validation.every_steps or checkpoint.every_steps?"),
        (["reset.quantum=3"], "reset.quantum: no such option; reset has every_steps, plateau, drop, score, "
         "cooldown_steps, target, optimizer, "
         "warmup_updates"),
        (["steps=0"], "steps: expected at least 1, got 0"),
        (["steps=2.5"], "steps: expected a whole number, got 2.5"),
        (["steps=true"], "steps: expected a whole number, got true"),
        (["steps='4'"], "steps: expected a whole number, got '4'"),
        (["rollout.temperature=hot"], "rollout.temperature: expected a number, got 'hot'"),
        (["rollout.temperature=0"], "rollout.temperature: expected more than 0, got 0"),
        (["validation.top_p=1.5"], "validation.top_p: expected at most 1, got 1.5"),
        # The sampler's log-probs are those after top-p, which the trainer's never are: every ratio would be wrong.
        (["rollout.top_p=0.9"], "rollout.top_p: no such option; did you mean validation.top_p?"),
        (["optimizer.beta1=1"], "optimizer.beta1: expected less than 1, got 1"),
        (["optimizer.learning_rate=.inf"], "optimizer.learning_rate: expected a finite number, got inf"),
        (["parallel.sequence=1"], "parallel.sequence: expected true or false, got 1"),
        (["model.path=3"], "model.path: expected text, got 3"),
        (["model.path="], "model.path: expected text, got nothing"),
        (["model.path=''"], "model.path: expected text that is not empty, got ''"),
        (["run_dir=''"], "run_dir: expected text that is not empty, got ''"),
        (["seed=0x_"], "seed=0x_: the value line 1: 0x_ looks like YAML's int and is none; put quotes around a text"),
        (["tracking.wandb={name: 2026-13-01}"], "tracking.wandb={name: 2026-13-01}: the value line 1: "
         "2026-13-01 looks like YAML's timestamp and is none; put quotes around a text"),
        (["algorithm.correction.kind=[tis]"],
         "algorithm.correction.kind: expected 'none', 'tis', 'icepop' or 'seq_mask', got ['tis']"),
        (["algorithm.correction=3"], "algorithm.correction: expected a section of `key: value` lines, got 3"),
        (["model.dtype=fp16"], "model.dtype: expected 'bf16' or 'fp32', got 'fp16'"),
        (["parallel=3"], "parallel: expected a section of `key: value` lines, got 3"),
        (["parallel="], "parallel: expected a section of `key: value` lines, got nothing"),
        (["data.tasks=chain_sum"], "data.tasks: expected a list, got 'chain_sum'"),
        (["data.tasks=[]"], "data: has neither tasks nor sources; name something to train on"),
        (["data.sources=[{path: problems.csv}]"],
         "data.sources.0.path: problems.csv: a problem file ends with .jsonl or .parquet"),
        (["data.sources=[{path: a.jsonl, validation_path: b.txt}]"],
         "data.sources.0.validation_path: b.txt: a problem file ends with .jsonl or .parquet"),
        (["data.sources=[{weight: 2.0}]"], "data.sources.0.path: required, but not given"),
        (["data.tasks.0.params=3"], "data.tasks.0.params: expected `key: value` lines, got 3"),
        (["data.tasks.0={}"], "data.tasks.0.task: required, but not given"),
        (["tracking.wandb.name=x"], "tracking.wandb.project: required, but not given"),
        (["data.tasks.2.weight=1"], "data.tasks.2.weight=1: data.tasks is a list of 2; expected an index from 0 to 1"),
        (["steps.x=1"], "steps.x=1: steps is 4, not a section"),
        (["steps"], "steps: expected key=value, as in optimizer.learning_rate=1e-6"),
        (["model..path=1"], "model..path=1: empty name in the key"),
        (["model.path=[1"], "model.path=[1: the value line 1: expected ',' or ']', but got '<stream end>'"),
        (["steps={a: 1, a: 2}"], "steps={a: 1, a: 2}: the value line 1: a is given twice, first in line 1"),
    ],
)  # fmt: skip
def test_a_mistake_in_one_option_is_one_line(base: Path, overrides: list[str], line: str) -> None:
    assert complaint(base, *overrides) == f"config error: {line}"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["parallel.tensor=2", "parallel.pipeline=2", "parallel.ranks_per_node=6"],
            "parallel: tensor*pipeline*context = 2*2*1 = 4 does not divide world size 6",
        ),
        (
            ["parallel.tensor=2", "parallel.expert=3", "parallel.ranks_per_node=4"],
            "parallel: tensor*pipeline*expert = 2*1*3 = 6 does not divide world size 4",
        ),
        (["parallel.sequence=true"], "parallel.sequence: needs parallel.tensor above 1"),
        (
            ["parallel.context=2"],
            "parallel.context: 2 is not supported yet; set it to 1 and raise tensor with sequence",
        ),
        (
            ["model.layers=transformer_engine", "device=cpu"],
            "model.layers: transformer_engine needs device cuda; use local or auto",
        ),
        (
            ["model.fp8=hybrid", "model.layers=local"],
            "model.fp8: hybrid needs device cuda and model.layers transformer_engine or auto, "
            "got device auto and layers local",
        ),
        (["model.fp8=e4m3", "model.dtype=fp32"], "model.fp8: e4m3 needs model.dtype bf16, got fp32"),
        (
            ["optimizer.updates_per_step=3"],
            "optimizer.updates_per_step: 3 does not divide rollout.prompts_per_step = 16",
        ),
        (
            ["parallel.ranks_per_node=24", "optimizer.updates_per_step=4"],
            "rollout: prompts_per_step*rollouts_per_prompt/updates_per_step = 16*4/4 = 16 samples an update, "
            "fewer than the 24 data-parallel ranks",
        ),
        (
            ["batching.tokens_per_microbatch=1535"],
            "batching.tokens_per_microbatch: 1535 is below the longest sample, "
            "rollout.max_prompt_tokens + rollout.max_response_tokens = 512 + 1024 = 1536",
        ),
        (
            ["data.validation_problems=1"],
            "data.validation_problems: 1 is below the number of data.tasks and data.sources, 2",
        ),
        (["algorithm.correction.low=2"], "algorithm.correction: low = 2 must be below high = 2"),
        (
            ["algorithm.shaping.overlong_buffer_tokens=1024"],
            "algorithm.shaping.overlong_buffer_tokens: 1024 must be below rollout.max_response_tokens = 1024",
        ),
        (
            ["reset.every_steps=5", "algorithm.kl.coefficient=0"],
            "reset.every_steps: resets a reference model that algorithm.kl.coefficient = 0 does not use; "
            "leave reset.every_steps out or set the coefficient above 0",
        ),
        (["reset.plateau.patience=3", "validation.every_steps=0"],
         "reset.plateau: needs validations; set validation.every_steps above 0"),
        (["reset.every_steps=5", "reset.cooldown_steps=6"],
         "reset.every_steps: 5 is below reset.cooldown_steps = 6"),
        (["guards.entropy.steps=3"], "guards.entropy: has neither low nor high, so it never acts; give one"),
        (["guards.entropy={low: 2, high: 1}"], "guards.entropy: low = 2 must be below high = 1"),
        (["guards.non_finite.low=1"], "guards.non_finite: takes neither low nor high"),
        (["guards.kl.high=1", "algorithm.kl.coefficient=0"],
         "guards.kl: there is no reference with algorithm.kl.coefficient = 0; raise it or drop the guard"),
        (["data.tasks.0.weight=0", "data.tasks.1.weight=0"],
         "data: every weight is 0; give something to train on a weight"),
        (["stages=[{name: a}, {name: a}]"], "stages.1.name: a is there twice"),
        (["stages=[{name: a, options: {rollout.temperatur: 1}}]"],
         "stages.0.options: rollout.temperatur: no such option; did you mean rollout.temperature?"),
        (["stages=[{name: a, options: {rollout.prompts_per_step: 30}}]"],
         "stages.0.options: optimizer.updates_per_step: 4 does not divide rollout.prompts_per_step = 30"),
        (["stages=[{name: a, options: {algorithm.kl.coefficient: 0}}]"],
         "stages.0.options.algorithm.kl.coefficient: 0 beside 0.0001 outside: either all stages have a reference model "
         "or none has"),
        (["stages=[{name: a, options: {model.path: other}}]"],
         "stages.0.options.model.path: no option that a stage may set; those are algorithm.*, batching.*, guards.*, "
         "optimizer.*, reset.*, rollout.*, tasks.*, validation.*, verifier.* (but optimizer.distributed, "
         "rollout.engines.count), data.tasks.<i>.weight and data.sources.<i>.weight"),
        (["stages=[{name: a, options: {data.tasks.7.weight: 1}}]"],
         "stages.0.options.data.tasks.7.weight: data.tasks is a list of 2; expected an index from 0 to 1"),
        (
            ["rollout.engines.port=65535", "rollout.engines.count=4"],
            "rollout.engines: port + count - 1 = 65535 + 4 - 1 = 65538 is above 65535",
        ),
        (
            ["parallel.nodes=2", "rollout.engines.count=3"],
            "rollout.engines.count: parallel.nodes = 2 does not divide 3",
        ),
        (
            ["device=cuda", "parallel.ranks_per_node=2", "rollout.engines.count=2", "rollout.engines.tensor=2"],
            "rollout.engines: count/nodes*tensor = 2/1*2 = 4 GPUs a node are to be shared with 2 trainer ranks "
            "(parallel.ranks_per_node)",
        ),
        (
            ["device=cpu", "rollout.engines.tensor=2"],
            "rollout.engines.tensor: must be 1 on the CPU; raise rollout.engines.count instead",
        ),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_show_the_arithmetic(base: Path, overrides: list[str], line: str) -> None:
    assert complaint(base, *overrides) == f"config error: {line}"


def test_several_mistakes_are_one_line_each(base: Path) -> None:
    text = complaint(base, "steps=0", "parallel.tensr=2", "model.dtype=fp16")
    assert text.splitlines() == [
        "config error: steps: expected at least 1, got 0",
        "config error: model.dtype: expected 'bf16' or 'fp32', got 'fp16'",
        "config error: parallel.tensr: no such option; did you mean parallel.tensor?",
    ]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"steps: 1\nmodel:\n  path: a: b\n", "line 3: mapping values are not allowed here"),
        (b"steps: 1\nrun_dir: x\nsteps: 2\n", "line 3: steps is given twice, first in line 1"),
        (b"model: {path: x, path: y}\n", "line 1: path is given twice, first in line 1"),
        (b"steps: 1\nrun_dir: 2026-13-01\n", "line 2: 2026-13-01 looks like YAML's timestamp and is none; "
         "put quotes around a text"),
        (b"1: x\n", "line 1: a key must be text"),
        (b"? [a]\n: x\n", "line 1: a key must be text"),
        (b"run_dir: !!python/object:os.system x\n", "line 1: could not determine a constructor for the tag "
         "'tag:yaml.org,2002:python/object:os.system'"),
        (b"- steps\n", ": expected `key: value` lines, got ['steps']"),
        (b"", ": expected `key: value` lines, got nothing"),
        (b"\xff\xfe\xfa", ": not UTF-8 text"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_configuration_is_one_line(tmp_path: Path, content: bytes, line: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    separator = "" if line.startswith(":") else " "
    assert complaint(path) == f"config error: {path}{separator}{line}"


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    assert complaint(tmp_path / "no.yaml") == f"config error: {tmp_path}/no.yaml: no such file or directory"
    assert complaint(tmp_path) == f"config error: {tmp_path}: is a directory"


def sections(tree: Any, prefix: str = "") -> list[str]:
    """Every dotted key whose last part is an option's name; the free-form task params are not."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    keys = []
    for name, child in items:
        key = f"{prefix}{name}"
        keys += ([key] if isinstance(tree, dict) else []) + ([] if name == "params" else sections(child, f"{key}."))
    return keys


LETTERS = "abcdefghijklmnopqrstuvwxyz_"
EVERY_KEY = sections(Config.model_validate(BASE | {"tracking": {"wandb": {"project": "x"}}}).model_dump())


@st.composite
def typos(draw: st.DrawFn) -> tuple[str, str]:
    """A dotted key of the schema, and the same with one slip of the fingers in its last part."""
    key = draw(st.sampled_from(EVERY_KEY))
    parent, _, name = key.rpartition(".")
    place = draw(st.integers(0, len(name) - 1))
    letter = draw(st.sampled_from(LETTERS))
    slips = {
        "dropped": name[:place] + name[place + 1 :],
        "added": name[:place] + letter + name[place:],
        "wrong": name[:place] + letter + name[place + 1 :],
        "swapped": name[:place] + name[place : place + 2][::-1] + name[place + 2 :],
    }
    wrong = slips[draw(st.sampled_from(sorted(slips)))]
    return key, f"{parent}.{wrong}" if parent else wrong


def reachable_by_one_slip(wrong: str, option: str) -> bool:
    """Whether one dropped, added, wrong or swapped letter makes `option` into `wrong`: by trying them all."""
    dropped = {option[:i] + option[i + 1 :] for i in range(len(option))}
    swapped = {option[:i] + option[i : i + 2][::-1] + option[i + 2 :] for i in range(len(option))}
    wild = {wrong[:i] + wrong[i + 1 :] for i in range(len(wrong))}
    one_wrong = len(wrong) == len(option) and sum(a != b for a, b in zip(wrong, option, strict=True)) == 1
    return wrong in dropped | swapped or option in wild or one_wrong


@given(typos())
def test_any_single_slip_in_any_key_is_told_with_the_nearest_name(base: Path, typo: tuple[str, str]) -> None:
    key, wrong = typo
    if wrong in EVERY_KEY or wrong.endswith(".") or not wrong:
        return
    lines = complaint(base, f"{wrong}=0").splitlines()
    [line] = [line for line in lines if line.startswith(f"config error: {wrong}: no such option; did you mean ")]
    suggested = line.removesuffix("?").rpartition(" ")[2]
    assert suggested in EVERY_KEY
    assert suggested.rpartition(".")[0] == key.rpartition(".")[0]
    assert reachable_by_one_slip(wrong.rpartition(".")[2], suggested.rpartition(".")[2])


@given(
    steps=st.integers(1, 10**9),
    rate=st.floats(min_value=1e-300, max_value=1e300),
    prompt=st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20),
    dynamic=st.booleans(),
)
def test_an_override_gives_back_the_value_that_was_meant(
    base: Path, steps: int, rate: float, prompt: str, dynamic: bool
) -> None:
    values = {
        "steps": steps,
        "optimizer.learning_rate": rate,
        "data.system_prompt": prompt,
        "rollout.dynamic_sampling": dynamic,
    }
    quoted = {key: yaml.safe_dump(v, default_style='"' if isinstance(v, str) else None) for key, v in values.items()}
    cfg = load_config(base, [f"{key}={value}" for key, value in quoted.items()])
    assert cfg.steps == steps
    assert cfg.optimizer.learning_rate == rate
    assert cfg.data.system_prompt == prompt
    assert cfg.rollout.dynamic_sampling is dynamic


@pytest.mark.parametrize("text", ["0E0", "1e-6", "3", "true", "2026-11-21", "~", ": -"])
def test_a_text_that_looks_like_something_else_comes_back_from_the_dump(base: Path, tmp_path: Path, text: str) -> None:
    cfg = load_config(base, [f"data.system_prompt={json.dumps(text)}"])
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_config(cfg))
    assert load_config(dumped) == cfg


@pytest.mark.parametrize(
    ("text", "number"), [("1e-6", 1e-6), ("2E5", 2e5), (".5e-3", 5e-4), ("1.e+2", 100.0), ("1.5", 1.5), ("3", 3.0)]
)
def test_every_usual_way_to_write_a_number_is_a_number(base: Path, text: str, number: float) -> None:
    assert load_config(base, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == number


def test_overrides_reach_lists_free_form_params_and_absent_sections(base: Path) -> None:
    cfg = load_config(
        base,
        ["data.tasks.1.params.max_terms=7", "data.tasks.0={task: lcm}", "tracking.wandb.project=p", "model.path=a=b",
         "steps=5", "steps=6"],
    )  # fmt: skip
    assert [task.task for task in cfg.data.tasks] == ["lcm", "gcd"]
    assert cfg.data.tasks[1].params == {"max_terms": 7}
    assert cfg.tracking.wandb is not None and cfg.tracking.wandb.project == "p"
    assert cfg.model.path == "a=b"
    assert cfg.steps == 6


@pytest.mark.parametrize(
    ("overrides", "window"),
    [
        ([], (0.0, 2.0)),
        (["algorithm.correction.kind=tis"], (0.0, 2.0)),
        (["algorithm.correction.kind=icepop"], (0.5, 5.0)),
        (["algorithm.correction.kind=seq_mask"], (0.999, 1.002)),
        (["algorithm.correction.kind=icepop", "algorithm.correction.high=3.0"], (0.5, 3.0)),
        (["algorithm.correction.low=0.1"], (0.1, 2.0)),
    ],
)
def test_a_correction_has_the_window_of_its_kind_unless_another_is_given(
    base: Path, tmp_path: Path, overrides: list[str], window: tuple[float, float]
) -> None:
    cfg = load_config(base, overrides)
    assert cfg.algorithm.correction.window == window
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_config(cfg))
    assert load_config(dumped).algorithm.correction.window == window
    other = load_config(dumped, ["algorithm.correction.kind=seq_mask"]).algorithm.correction
    given = (cfg.algorithm.correction.low, cfg.algorithm.correction.high)
    assert other.window == tuple(
        mine if mine is not None else its for mine, its in zip(given, (0.999, 1.002), strict=True)
    )


CONFIGURATIONS = [path for path in sorted(EXAMPLES.glob("*.yaml")) if "\nrun_dir:" in path.read_text()]


@pytest.mark.parametrize("example", CONFIGURATIONS, ids=lambda path: path.name)
def test_an_example_loads_to_the_same_configuration_every_time_and_from_its_own_dump(
    example: Path, tmp_path: Path
) -> None:
    cfg = load_config(example)
    assert load_config(example) == cfg
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_config(cfg), encoding="utf-8")
    assert load_config(dumped) == cfg


def test_the_paper_s_recipe_is_the_paper_s() -> None:
    cfg = load_config(EXAMPLES / "prorl_1p5b.yaml")
    assert (cfg.parallel.nodes, cfg.parallel.ranks_per_node) == (4, 8)
    assert (cfg.rollout.prompts_per_step, cfg.rollout.rollouts_per_prompt, cfg.rollout.temperature) == (256, 16, 1.2)
    assert cfg.rollout.max_prompt_tokens + cfg.rollout.max_response_tokens == 8192
    assert (cfg.algorithm.clip_low, cfg.algorithm.clip_high, cfg.rollout.dynamic_sampling) == (0.2, 0.4, True)
    assert (cfg.optimizer.learning_rate, cfg.rollout.prompts_per_step // cfg.optimizer.updates_per_step) == (2e-6, 64)
    held_back = {"acre", "boxnet", "game_of_life_halting"}
    assert not held_back & {task.task for task in cfg.data.tasks}


def write(path: Path, document: dict[str, Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_file_goes_over_those_that_it_extends_section_by_section(base: Path, tmp_path: Path) -> None:
    write(tmp_path / "method" / "common.yaml", {"algorithm": {"clip_low": 0.1, "clip_high": 0.1}, "seed": 1})
    method = {"extends": "common.yaml", "algorithm": {"clip_high": 0.3}, "data": {"tasks": [{"task": "lcm"}]}}
    write(tmp_path / "method" / "this.yaml", method)
    path = write(
        tmp_path / "run.yaml",
        {"extends": [str(base), "method/this.yaml"], "run_dir": "runs/other", "rollout": {"prompts_per_step": 8}},
    )
    cfg = load_config(path, ["algorithm.clip_low=0.15"])
    assert (cfg.algorithm.clip_low, cfg.algorithm.clip_high, cfg.seed, cfg.run_dir) == (0.15, 0.3, 1, "runs/other")
    assert (cfg.rollout.prompts_per_step, cfg.rollout.rollouts_per_prompt) == (8, 4)
    assert [task.task for task in cfg.data.tasks] == ["lcm"], "a list is one thing"


@pytest.mark.parametrize(
    ("bases", "line"),
    [
        ("none.yaml", "none.yaml: no such file or directory"),
        (3, "extends: expected a file or a list of files, got 3"),
        (["other.yaml"], "extends this file itself"),
    ],
)
def test_bases_that_cannot_be_are_one_line(tmp_path: Path, bases: Any, line: str) -> None:
    path = write(tmp_path / "run.yaml", BASE | {"extends": bases})
    write(tmp_path / "other.yaml", {"extends": "run.yaml"})
    found = complaint(path)
    assert line in found and len(found.splitlines()) == 1


PRESETS = sorted((EXAMPLES / "presets").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_a_method_and_leaves_the_scale_alone(tmp_path: Path, preset: Path) -> None:
    """Over the smallest example, of which it changes neither the sizes nor the learning rate."""
    base = EXAMPLES / "quickstart.yaml"
    below = load_config(base)
    cfg = load_config(write(tmp_path / "run.yaml", {"extends": [str(base), str(preset)]}))
    changes = {"temperature": cfg.rollout.temperature, "dynamic_sampling": cfg.rollout.dynamic_sampling}
    assert cfg.rollout == below.rollout.model_copy(update=changes)
    updates = {"updates_per_step": cfg.optimizer.updates_per_step}
    assert cfg.optimizer == below.optimizer.model_copy(update=updates)
    assert (cfg.steps, cfg.data, cfg.model) == (below.steps, below.data, below.model)


def test_the_paper_s_recipe_is_the_preset_and_its_scale() -> None:
    recipe, preset = (
        yaml.safe_load((EXAMPLES / name).read_text()) for name in ("prorl_1p5b.yaml", "presets/prorl_v1.yaml")
    )
    for section in ("rollout", "optimizer", "algorithm"):
        for key, value in preset[section].items():
            assert recipe[section][key] == value, f"{section}.{key}"
    assert recipe["reset"]["optimizer"] == preset["reset"]["optimizer"]


def test_v2_s_stages_last_as_long_as_the_run_and_penalise_length_a_sixth_of_it() -> None:
    cfg = load_config(EXAMPLES / "prorl_v2.yaml")
    penalties = [stage_config(cfg, i).algorithm.shaping.cosine_penalty for i in range(len(cfg.stages))]
    lengths = [stage.steps or 0 for stage in cfg.stages]
    assert sum(lengths) == cfg.steps == 6 * sum(steps for steps, p in zip(lengths, penalties, strict=True) if p)


def test_the_recipes_in_full_are_what_they_say() -> None:
    """Rollouts a step, updates and whether there is a reference."""
    found = {}
    for name in ("prorl_1p5b", "prorl_v2", "prorl_v2_1", "brorl", "justrl"):
        cfg = load_config(EXAMPLES / f"{name}.yaml")
        batch = cfg.rollout.prompts_per_step * cfg.rollout.rollouts_per_prompt
        found[name] = batch, cfg.optimizer.updates_per_step, cfg.algorithm.kl.coefficient > 0, cfg.reset.optimizer
    assert found == {
        "prorl_1p5b": (4096, 4, True, "clear"), "prorl_v2": (4096, 4, True, "keep"),
        "prorl_v2_1": (4096, 1, True, "keep"), "brorl": (65536, 4, True, "keep"), "justrl": (2048, 4, False, "clear"),
    }  # fmt: skip


def test_a_stage_s_correction_has_the_window_of_its_own_kind(base: Path) -> None:
    stages = "stages=[{name: a, steps: 2}, {name: b, options: {algorithm.correction.kind: seq_mask}}]"
    cfg = load_config(base, [stages])
    assert [stage_config(cfg, stage).algorithm.correction.window for stage in (0, 1)] == [(0.0, 2.0), (0.999, 1.002)]
