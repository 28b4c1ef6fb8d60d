# SPDX-License-Identifier: Apache-2.0
"""gralora-ext analyze: the ranks, the gradients of ΔW, and the sentences, which follow from the numbers."""

from __future__ import annotations

import itertools
import json
import statistics

import pytest
import torch
from cli_helpers import call, sentence
from compare_helpers import OF_SEVERAL_RANKS, SMALL, command, make_here, make_work, records
from safetensors.torch import load_file, save_file

from gralora_ext._gralora_k import nearest_k
from gralora_ext.cli.analyze import options as analyze_options
from gralora_ext.cli.compare import options as compare_options
from gralora_ext.compare import findings, runner, wide_layer
from gralora_ext.compare.analysis import Grid
from gralora_ext.compare.comparison import Comparison
from gralora_ext.compare.extras import Adapted, rank_of
from gralora_ext.compare.findings import NOT_REPRODUCED, OUT_OF_REACH, REPRODUCED
from gralora_ext.compare.grid_findings import Case, best_k, worse_at_high_rank
from gralora_ext.compare.methods import beyond
from gralora_ext.compare.plan import CHOOSE, MEASURE
from gralora_ext.compare.summary import Spread, apart, best_rate, beyond_t, spread
from gralora_ext.tuner.patterns import choose_k


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("analyze"))


def analyzed(work, what, *arguments):
    command(work, "analyze", what, "--output", what, "--lrs", 1e-2, *arguments)
    for end in ("png", "svg"):
        assert (work / what / f"{what}.{end}").stat().st_size > 5000
    return json.loads((work / what / f"{what}.json").read_text())


def test_rank_of_delta_w_is_k_r_in_float64_after_training(work, monkeypatch):
    monkeypatch.setattr(wide_layer, "WIDTH", 144)
    monkeypatch.setattr("gralora_ext.compare.analysis.WIDE_RANK", 16)
    content = analyzed(work, "rank")
    for k in (1, 2, 4, 8):
        layers = content["in_model"][str(k)]
        assert len(layers) == 3 * 14, "three seeds, both blocks of the model, seven layers each"
        assert all(layer["float64"] == layer["most"] for layer in layers)
        assert max(layer["most"] for layer in layers) == min(k * 8, 32)
        assert [layer["float64"] for layer in content["wide"][str(k)]] == [k * 16] * 3
    assert content["findings"][0]["verdict"] == REPRODUCED
    assert content["findings"][1]["verdict"] == NOT_REPRODUCED, "here the wide layer has another r than the paper's"


@pytest.fixture
def work_with_an_outlier(tmp_path):
    """One whose model has an outlier channel in each input of down_proj, as trained models do."""
    work = make_work(tmp_path)
    file = work / "model" / "model.safetensors"
    weights = load_file(file)
    for name, weight in weights.items():
        if name.endswith("up_proj.weight"):
            weight[5] *= 30
    save_file(weights, file, {"format": "pt"})
    return work


def test_an_outlier_reaches_all_of_loras_blocks_and_a_kth_of_gralora_s(work_with_an_outlier):
    content = analyzed(work_with_an_outlier, "outlier")
    assert all(set(by_k) == {"1", "2", "4", "8"} for by_k in content["means"].values())
    blocks = [row[layer["block_column"]] for layer in content["layers"] if layer["k"] == 2
              for row in layer["block_cosines_with"]]  # fmt: skip
    assert content["means"]["block_cosines_with"]["2"]["mean"] == pytest.approx(statistics.fmean(blocks))
    assert {k: s["mean"] for k, s in content["shares"].items()} == {"1": 1.0, "2": 0.5, "4": 0.25, "8": 0.125}
    assert content["findings"][0]["verdict"] == REPRODUCED
    for layer in content["layers"]:
        assert layer["layer"].endswith("down_proj") and layer["times_median"] > 10
        change, full = (torch.tensor(layer[name]) for name in ("change", "change_of_full"))
        column = layer["block_column"]
        assert (full.sum(0).nonzero().flatten() == column).all(), "full fine-tuning: one column of blocks"
        assert -1 <= layer["cosine_of_a"] <= 1 and -1 <= layer["cosine_of_b"] <= 1 and layer["size_of_a"] > 0
        of_adapter = change.sum(0).nonzero().flatten()
        assert len(of_adapter) == 8 // layer["k"] and column in of_adapter


def test_loss_over_rank_and_k(work):
    content = analyzed(work, "grid", "--ranks", 8, 16, "--ks", 2, 2, "--seeds", 2, "--extend", 0)
    assert {(c["r"], c["k"]) for c in content["cells"]} == {(r, k) for r in (8, 16) for k in (1, 2)}
    for cell in content["cells"]:
        method = "lora" if cell["k"] == 1 else f"gralora-k{cell['k']}"
        losses = [r["results"]["loss"] for r in records(work / "grid")
                  if (r["run"]["rank"], r["run"]["method"]) == (cell["r"], method)]  # fmt: skip
        assert sorted(cell["values"]) == sorted(losses) and len(losses) == 2, "a k that is named twice counts once"
    assert {(c["r"], c["k"]) for c in content["cells"] if c["predicted"]} == {(8, 1), (16, 2)}
    assert len(content["findings"]) == 3


def test_a_comparison_s_runs_are_runs_of_the_grid():
    """By default: so that runs of ``compare``, copied beside, need not be made again."""
    grid, comparison = Grid(analyze_options(["grid"])), Comparison(compare_options([]))
    shared = [method for rank, method in grid.cases() if rank == comparison.settings.rank]
    assert [method.name for method in shared] == ["lora", "gralora-k2", "gralora-k4", "gralora-k8"]
    for method in shared:
        for part in (CHOOSE, MEASURE):
            names = {of.chooser.run(method, part, 1e-3, 0, comparison.settings.rank).name for of in (grid, comparison)}
            assert len(names) == 1


def test_gradient_of_lora_is_the_formula_of_the_docstring():
    torch.manual_seed(0)
    x, g = torch.randn(30, 24).double(), torch.randn(30, 16).double()
    A, B = torch.randn(1, 24, 4).double(), torch.randn(1, 4, 16).double()
    lora = Adapted("q", None, {"A": A, "B": B}, 0.5)
    full, down, up = g.T @ x, A[0].T, B[0].T
    expected = 0.25 * (up @ up.T @ full + full @ down.T @ down)
    torch.testing.assert_close(sum(lora.directions(x, g)), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lora.directions(x, g)[0], 0.25 * up @ up.T @ full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hybrid", [False, True])
def test_gradient_of_gralora_is_the_derivative_of_delta_w(hybrid):
    torch.manual_seed(0)
    x, g = torch.randn(30, 24).double(), torch.randn(30, 16).double()
    tensors = {"A": torch.randn(2, 12, 4).double(), "B": torch.randn(2, 4, 8).double()}
    if hybrid:
        tensors |= {"A_general": torch.randn(3, 24).double(), "B_general": torch.randn(16, 3).double()}
    layer = Adapted("q", None, tensors, 0.5)
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    loss = (g * (x @ Adapted("q", None, leaves, 0.5).delta().T)).sum()
    steps = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    small = 1e-6
    moved = Adapted("q", None, {n: t + small * steps[n] for n, t in tensors.items()}, 0.5).delta() - layer.delta()
    torch.testing.assert_close(sum(layer.directions(x, g)), moved / small, rtol=1e-3, atol=1e-2)


def test_rank_counts_what_rounding_does_not_explain():
    torch.manual_seed(0)
    product = torch.randn(60, 7).double() @ torch.randn(7, 50).double()
    assert rank_of(product) == {"float64": 7, "float32": 7}
    small = product + 1e-9 * torch.randn(60, 50).double()
    assert rank_of(small) == {"float64": 50, "float32": 7}
    assert rank_of(torch.zeros(5, 5)) == {"float64": 0, "float32": 0}


def of(*values):
    return Spread(tuple(map(float, values)))


def test_a_spread_is_a_deviation_of_the_sample_and_none_for_one_seed():
    assert of(1, 2, 3).deviation == 1.0 and of(1, 2, 3).text(1) == "2.0 ± 1.0"
    assert of(1).deviation is None and of(1).text(1) == "1.0"
    assert spread([1.0, None, 2.0]) is None, "a mean of what did not diverge would hide that something did"
    assert spread([1.0, float("nan")]) is None


@pytest.mark.parametrize(
    ("t", "freedom"), [(12.7062, 1), (4.30265, 2), (3.18245, 3), (2.77645, 4), (2.22814, 10), (1.98397, 100)]
)
def test_students_t_is_that_of_the_tables(t, freedom):
    assert beyond_t(t, freedom) == pytest.approx(0.05, abs=1e-6)
    assert beyond_t(0, freedom) == pytest.approx(1)


def test_means_are_apart_where_the_paired_test_says_so_and_there_are_three_seeds():
    """The differences decide, and not how far the seeds are from one another."""
    seeds = of(1.0, 5.0, 9.0)
    # Differences of mean m and deviation 0.1, 2 degrees of freedom: apart from m = 4.303 · 0.1 / √3 on.
    assert apart(seeds, of(1.149, 5.249, 9.349)) and not apart(seeds, of(1.148, 5.248, 9.348))
    assert not apart(seeds, of(9.349, 5.249, 1.149)), "the same values, of other seeds"
    # Where one of three pairs would be enough, from t = 7.649 on, which leaves 5 % / 3.
    assert apart(seeds, of(1.342, 5.442, 9.542), 3) and not apart(seeds, of(1.341, 5.441, 9.541), 3)
    assert apart(of(1.0, 1.0, 1.0), of(1.5, 1.5, 1.5)) and not apart(of(1.0, 1.0, 1.0), of(1.0, 1.0, 1.0))
    assert not apart(of(1.0, 1.0), of(9.0, 9.0))


@pytest.mark.parametrize(("pairs", "expected"), [(1, 0.05), (3, 0.05 / 3)])
def test_of_pairs_that_do_not_differ_about_one_in_twenty_is_told_apart(pairs, expected):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(20_000, 2, 3, generator=generator, dtype=torch.float64).tolist()
    found = sum(apart(of(*one), of(*other), pairs) for one, other in drawn) / len(drawn)
    assert found == pytest.approx(expected, rel=0.2)


def test_the_best_rate_is_none_of_those_that_diverged():
    assert best_rate({1e-3: 0.9, 3e-3: 0.8, 1e-2: None}) == 3e-3
    assert best_rate({1e-3: None}) is None
    assert [beyond(r, True) for r in (1e-4, 3e-4, 1e-3)] == [3e-4, 1e-3, 3e-3]
    assert [beyond(r, False) for r in (1e-4, 3e-4, 1e-3)] == [3e-5, 1e-4, 3e-4]


LOW, MIDDLE, HIGH = of(0.70, 0.71, 0.72), of(0.80, 0.81, 0.82), of(0.90, 0.91, 0.92)
NEARLY_LOW = of(0.71, 0.72, 0.705)  # of LOW one seed is less and two are greater


@pytest.mark.parametrize(
    ("losses", "expected", "verdict"),
    [
        ({8: MIDDLE, 64: LOW, 256: HIGH}, True, REPRODUCED),
        ({8: HIGH, 64: MIDDLE, 256: LOW}, True, NOT_REPRODUCED),
        ({8: HIGH, 64: LOW, 256: NEARLY_LOW}, True, OUT_OF_REACH),
        (
            {8: HIGH, 64: of(0.68, 0.70, 0.702), 256: LOW},
            True,
            OUT_OF_REACH,
        ),  # t is 5.2: enough for one pair, not for two
        ({8: MIDDLE, 64: LOW, 256: HIGH}, False, NOT_REPRODUCED),
        ({8: HIGH, 64: MIDDLE, 256: LOW}, False, REPRODUCED),
        ({8: HIGH, 256: of(0.5, 0.6)}, False, OUT_OF_REACH),
        ({8: NEARLY_LOW, 256: LOW}, True, OUT_OF_REACH),
        ({8: NEARLY_LOW, 256: LOW}, False, OUT_OF_REACH),
        ({8: LOW}, True, OUT_OF_REACH),
        ({8: LOW}, False, OUT_OF_REACH),
        ({8: HIGH, 64: LOW, 256: None}, True, OUT_OF_REACH),
        ({8: None, 64: LOW, 256: HIGH}, True, REPRODUCED),
        ({8: LOW, 64: MIDDLE, 256: HIGH}, True, REPRODUCED),
    ],
)
def test_whether_high_ranks_are_worse_follows_from_the_losses(losses, expected, verdict):
    found = worse_at_high_rank("LoRA", {r: Case(s, r == 64) for r, s in losses.items()}, expected, 135_000_000)
    assert found.verdict == verdict and found.sentence.lower().startswith(verdict)
    for r, s in losses.items():
        assert (f"a run diverged at r = {r}" in found.sentence) == (s is None)
        assert (f"{s.text(4)} at r = {r}" if s else f"diverged at r = {r}") in found.ours
    if 64 in losses and len(losses[64].values) >= 3:
        assert "the learning rate is the least or greatest of those tried at r = 64" in found.sentence
    assert ("not at a middle one" in found.sentence) == (expected and losses.get(8) == LOW and verdict == REPRODUCED)
    if verdict == OUT_OF_REACH and None not in losses.values():
        assert "135 million parameters" in found.sentence


def test_the_k_with_a_ratio_nearest_to_eight():
    """One rule for the findings and for ``gralora_k="auto"``."""
    assert {r: nearest_k(r) for r in (8, 16, 32, 64, 128, 256, 512)} == {
        8: 1, 16: 2, 32: 2, 64: 4, 128: 4, 256: 8, 512: 8,
    }  # fmt: skip
    assert all(nearest_k(r) == choose_k(r, 512, 512) for r in range(8, 520, 8))
    assert nearest_k(256, (2, 4)) == 4
    for k, other in itertools.combinations((1, 2, 4, 8), 2):  # r/k² - 8 = 8 - r/other²
        assert 16 * k**2 * other**2 % (k**2 + other**2), "an r as near with both"


@pytest.mark.parametrize(
    ("of_32", "of_128", "verdict", "told"),  # r/k² is 8 for k = 2 at r = 32, and for k = 4 at r = 128
    [
        (
            (MIDDLE, LOW, HIGH),
            (HIGH, MIDDLE, LOW),
            REPRODUCED,
            "is better than all others at r = 32, r = 128; the learn",
        ),
        (
            (MIDDLE, LOW, HIGH),
            (LOW, NEARLY_LOW, LOW),
            OUT_OF_REACH,
            "others at r = 32, 3 seeds do not tell at r = 128;",
        ),
        ((LOW, HIGH, MIDDLE), (HIGH, MIDDLE, LOW), OUT_OF_REACH, "nearest to 8 at r = 32; reproduced takes two such"),
        (
            (LOW, HIGH, MIDDLE),
            (MIDDLE, LOW, HIGH),
            NOT_REPRODUCED,
            "another k is better than the one with r/k² nearest",
        ),
        ((LOW, LOW, NEARLY_LOW), (LOW, LOW, NEARLY_LOW), OUT_OF_REACH, "3 seeds do not tell at r = 32, r = 128;"),
        ((LOW, NEARLY_LOW, HIGH), (LOW, LOW, HIGH), OUT_OF_REACH, "to 8 at r = 128, 3 seeds do not tell at r = 32;"),
        ((MIDDLE, LOW, None), (HIGH, MIDDLE, LOW), OUT_OF_REACH, "a run diverged at r = 32, k = 4"),
        ((LOW, None, HIGH), (HIGH, MIDDLE, LOW), OUT_OF_REACH, "a run diverged at r = 32, k = 2"),
        ((None, None, None), (HIGH, MIDDLE, LOW), OUT_OF_REACH, "3 seeds do not tell at r = 32;"),
    ],
)
def test_whether_the_best_k_follows_the_ratio_follows_from_the_losses(of_32, of_128, verdict, told):
    cases = {(r, k): Case(s, (r, k) == (128, 1)) for r, row in ((32, of_32), (128, of_128))
             for k, s in zip((1, 2, 4), row, strict=True)}  # fmt: skip
    found = best_k(cases, 135_000_000)
    assert found.verdict == verdict and told in found.sentence
    assert "the least or greatest of those tried at r = 128, k = 1" in found.sentence


@pytest.mark.parametrize(
    ("cosines", "verdict"),
    [
        ({1: LOW, 2: MIDDLE, 4: HIGH}, REPRODUCED),
        ({1: HIGH, 2: MIDDLE, 4: LOW}, NOT_REPRODUCED),
        ({1: LOW, 2: NEARLY_LOW}, OUT_OF_REACH),
        ({1: LOW, 2: NEARLY_LOW, 4: HIGH}, OUT_OF_REACH),
        ({1: HIGH, 2: MIDDLE, 4: of(0.91, 0.90, 0.91)}, OUT_OF_REACH),
        ({1: of(0.1), 2: of(0.9)}, OUT_OF_REACH),
    ],
)
def test_whether_gralora_is_nearer_to_full_follows_from_the_cosines(cosines, verdict):
    without = {k: Spread(tuple(v - 0.002 for v in s.values)) for k, s in cosines.items()}
    found = findings.nearer_to_full(cosines, without, 135_000_000)
    assert found.verdict == verdict and f"without the channel {without[1].text(3)} for k = 1" in found.ours
    if len(cosines[1].values) >= 3:
        assert "each cosine is the same within 0.002" in found.sentence


def test_ranks_that_are_not_k_r_are_not_reproduced():
    by_k = {1: [{"most": 8, "float64": 8}], 2: [{"most": 16, "float64": 15}]}
    assert findings.rank_in_model(by_k, 8, 3, 10**6).verdict == NOT_REPRODUCED
    assert findings.rank_in_model(by_k, 8, 2, 10**6).verdict == OUT_OF_REACH
    wide = {k: [{"float64": rank}] * 3 for k, rank in ((2, 256), (4, 512), (8, 1000))}
    assert findings.rank_of_paper(wide, 128, 1152, 10**6).verdict == NOT_REPRODUCED


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("rank", "seed0"),
        ("outlier", "seed0"),
        ("grid", "each case of LoRA has a run that diverged"),
    ],
)
def test_what_diverged_is_told_in_a_sentence(work, what, expected, monkeypatch):
    monkeypatch.setattr(runner.Runner, "_make", make_here)
    ranks = ("--ranks", 8, "--ks", 2, "--extend", 0) if what == "grid" else ()
    common = (*OF_SEVERAL_RANKS, *ranks) if what == "grid" else SMALL
    done = call("analyze", what, "--output", f"diverged-{what}", "--seeds", 1, "--lrs", 1e30, *common, cwd=work)
    assert done.returncode == 2 and expected in sentence(done) and "diverged" in sentence(done)
    assert "--lrs" in sentence(done)


def test_a_model_without_the_layers_of_outliers_is_told_of(work, monkeypatch):
    monkeypatch.setattr(runner.Runner, "_make", make_here)
    monkeypatch.setattr("gralora_ext.compare.extras.OF_OUTLIERS", "c_proj")
    done = call("analyze", "outlier", "--output", "no-outlier", "--seeds", 1, "--lrs", 1e-2, *SMALL, cwd=work)
    assert done.returncode == 2 and "no adapted layer of the model is named c_proj" in sentence(done)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "analyze: expected rank, outlier or grid, got ''"),
        (["rang"], "analyze: expected rank, outlier or grid, got 'rang' (did you mean rank?)"),
        (["grid", "--ks", "3", "--ranks", "9"], "--ks: expected 2, 4 or 8, got 3"),
        (["grid", "--ks", "3", "--ranks", "8"], "--ks: expected 2, 4 or 8, got 3"),
        (["grid", "--ranks", "12"], "analyze grid: k = 8 does not divide the rank 12"),
        (["rank", "--rank", "4"], "analyze rank: k = 8 does not divide the rank 4"),
        (["grid", "--rank", "8"], "unrecognized arguments: --rank 8"),
    ],
)
def test_what_cannot_be_is_told_before_anything_runs(work, arguments, expected):
    done = call("analyze", *arguments, cwd=work)
    assert done.returncode == 2 and expected in sentence(done)
