# SPDX-License-Identifier: Apache-2.0
"""The page of a comparison in a browser without a window: what it shows is what the files of runs say."""

from __future__ import annotations

import json
import shutil
import statistics

import pytest
from compare_helpers import command, make_work, records

from gralora_ext.compare import page, summary
from gralora_ext.compare.comparison import PAGE

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    work = make_work(tmp_path_factory.mktemp("page"))
    command(work, "compare", "--output", "out", "--methods", "full", "lora", "gralora-k2", "gralora-k4", "--lrs", 1e-2,
            "--extend", 0)  # fmt: skip
    return work / "out"


@pytest.fixture(scope="module")
def browser():
    """One that is cut off from every network."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of the browsers {', '.join(BROWSERS)} is installed")
    with driver.sync_playwright() as play:
        started = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started.new_context(offline=True)
        started.close()


def opened(browser, path):
    """The page, opened from its file, what it complained of, and what it asked for."""
    shown = browser.new_page()
    complaints, asked = [], []
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    shown.on("console", lambda message: complaints.append(message.text))
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto(path.as_uri())
    return shown, complaints, asked


@pytest.fixture(scope="module")
def shown(browser, output):
    return opened(browser, output / PAGE)


def order(shown):
    return [row.get_attribute("data-method") for row in shown.locator("#table tbody tr").all()]


def values(output, method, metric):
    """The values of a column, by the files of runs alone."""
    base = next(r for r in records(output) if r["run"]["method"] == "base")["results"]
    taken = {
        "forgetting": lambda r: r["general_loss"] - base["general_loss"],
        "peak_memory": lambda r: r["peak_memory_mib"]["host"],
        "parameters": lambda r: r["parameters"] / 1e6,
        "checkpoint": lambda r: r["checkpoint_bytes"] / 2**20,
    }.get(metric, lambda r: r[metric])
    return [taken(r["results"]) for r in records(output)
            if (r["run"]["method"], r["run"]["part"]) == (method, "measure")]  # fmt: skip


def test_the_page_asks_for_nothing_and_complains_of_nothing(shown, output):
    _, complaints, asked = shown
    assert complaints == []
    assert [url for url in asked if not url.startswith("data:")] == [(output / PAGE).as_uri()]


def test_the_table_is_what_the_files_of_runs_and_the_summary_say(shown, output):
    shown, *_ = shown
    content = json.loads((output / "summary.json").read_text())
    assert [m["key"] for m in content["metrics"]] == [
        "loss", "general_loss", "forgetting", "tokens_per_second", "peak_memory", "parameters", "checkpoint",
    ]  # fmt: skip
    for row in content["rows"][1:]:
        cells = {name: shown.locator(f'#table tr[data-method="{row["method"]}"] td[data-key="{name}"]')
                 for name in ("rate", "seeds", *row["metrics"])}  # fmt: skip
        assert float(cells["rate"].inner_text().replace("\N{MINUS SIGN}", "-")) == row["rate"]
        assert cells["seeds"].inner_text() == str(row["seeds"]) == "3"
        for metric in content["metrics"]:
            cell, of_row = cells[metric["key"]], row["metrics"][metric["key"]]
            of_runs = values(output, row["method"], metric["key"])
            mean, deviation = statistics.fmean(of_runs), statistics.stdev(of_runs)
            for name, value in (("mean", mean), ("deviation", deviation)):
                assert float(cell.get_attribute(f"data-{name}")) == pytest.approx(value, rel=1e-9, abs=1e-12)
                assert of_row[name] == pytest.approx(value, rel=1e-9, abs=1e-12)
            text = f"{mean:,.{metric['digits']}f} ± {deviation:,.{metric['digits']}f}"
            assert cell.inner_text().lstrip("•\xa0") == text == of_row["text"]


def test_a_click_on_a_heading_sorts_by_it_and_another_one_turns_the_order(shown, output):
    shown, *_ = shown
    by_loss = sorted(("base", "full", "lora", "gralora-k2", "gralora-k4"),
                     key=lambda m: statistics.fmean(values(output, m, "loss")))  # fmt: skip
    assert order(shown) == by_loss
    shown.click('#table th[data-key="loss"] button')
    assert order(shown) == by_loss[::-1]
    assert shown.locator('#table th[data-key="loss"]').get_attribute("aria-sort") == "descending"
    shown.click('#table th[data-key="tokens_per_second"] button')
    by_speed = sorted(
        by_loss, key=lambda m: -statistics.fmean(values(output, m, "tokens_per_second")) if m != "base" else 0
    )
    assert order(shown) == by_speed, "the fastest first, and what has no speed last"
    shown.click('#table th[data-key="method"] button')
    assert order(shown) == ["full", "gralora-k2", "gralora-k4", "lora", "base"], "by their labels"


def test_the_plot_shows_the_axes_that_are_chosen(shown, output):
    shown, *_ = shown
    for x, y in (("parameters", "loss"), ("tokens_per_second", "general_loss")):
        shown.select_option("#x-axis", x)
        shown.select_option("#y-axis", y)
        dots = shown.locator("#pareto circle").all()
        assert {d.get_attribute("data-method") for d in dots} == {"full", "lora", "gralora-k2", "gralora-k4"}
        for dot in dots:
            mean = statistics.fmean(values(output, dot.get_attribute("data-method"), y))
            assert float(dot.get_attribute("data-y")) == pytest.approx(mean, rel=1e-12)
        right = max(dots, key=lambda d: float(d.get_attribute("data-x")))
        assert float(right.get_attribute("cx")) == max(float(d.get_attribute("cx")) for d in dots)
        low = min(dots, key=lambda d: float(d.get_attribute("data-y")))
        assert float(low.get_attribute("cy")) == max(float(d.get_attribute("cy")) for d in dots)
    assert "loss on general text" in shown.locator("#pareto .y-name").text_content()


def test_a_line_joins_the_methods_that_no_other_one_beats_on_both_axes(browser, output, tmp_path):
    """Less loss is better and more speed: of these lora is beaten by gralora-k2, and no other one is."""
    placed = {"full": (1.0, 10), "lora": (2.0, 20), "gralora-k2": (1.5, 30), "gralora-k4": (3.0, 40)}
    content = content_of(output)
    for row in content["rows"][1:]:
        for key, mean in zip(("loss", "tokens_per_second"), placed[row["method"]], strict=True):
            row["metrics"][key] |= {"mean": mean, "deviation": 0.0}
    (tmp_path / PAGE).write_text(page.made(content), encoding="utf-8")
    shown, complaints, _ = opened(browser, tmp_path / PAGE)
    shown.select_option("#x-axis", "tokens_per_second")
    shown.select_option("#y-axis", "loss")
    line = [tuple(map(float, p.split(","))) for p in shown.locator("#pareto .front").get_attribute("points").split()]
    dots = {d.get_attribute("data-method"): (float(d.get_attribute("cx")), float(d.get_attribute("cy")))
            for d in shown.locator("#pareto circle").all()}  # fmt: skip
    assert line == [dots[name] for name in ("full", "gralora-k2", "gralora-k4")] and complaints == []
    shown.close()


def test_curves_are_drawn_for_the_methods_that_are_ticked(shown):
    shown, *_ = shown
    drawn, bands = (shown.locator(f"#curves {name}") for name in ("polyline", "polygon"))
    assert drawn.count() == bands.count() == 4
    shown.locator("#legend input").first.uncheck()
    assert drawn.count() == bands.count() == 3
    shown.locator("#legend input").first.check()


def test_a_curve_ends_where_a_run_diverged(browser, output, tmp_path):
    """What remains would be the mean of fewer seeds."""
    content = content_of(output)
    run = next(run for run in content["runs"] if (run["run"]["method"], run["run"]["seed"]) == ("lora", 1))
    run["losses"][-1]["loss"] = None
    (tmp_path / PAGE).write_text(page.made(content), encoding="utf-8")
    shown, complaints, _ = opened(browser, tmp_path / PAGE)
    points = {name: len(shown.locator(f'#curves [data-method="{name}"]').get_attribute("points").split())
              for name in ("lora", "gralora-k2")}  # fmt: skip
    assert points == {"lora": len(run["losses"]) - 1, "gralora-k2": len(run["losses"])} and complaints == []
    shown.close()


def test_what_is_marked_is_the_best_and_what_is_not_told_apart_from_it():
    def row(method, *losses):
        spread = {"mean": statistics.fmean(losses), "deviation": statistics.stdev(losses), "values": list(losses)}
        return {"method": method, "metrics": {"loss": spread}}

    rows = [
        row("base", 0.1, 0.1, 0.1),
        row("lora", 0.5, 0.6, 0.7),
        row("dora", 0.52, 0.59, 0.71),
        row("full", 0.6, 0.7, 0.81),
    ]
    summary.mark(rows)
    assert [r["metrics"]["loss"].get("mark") for r in rows] == [None, "best", "near", None]


def test_each_run_can_be_opened_with_its_settings(shown, output):
    shown, *_ = shown
    assert shown.locator("#runs details").count() == 1 + 4 * 3
    run = shown.locator("#runs details").last
    run.locator("summary").click()
    settings = json.loads(run.locator("pre").inner_text())
    assert settings["settings"]["max_length"] == 64 and settings["versions"]["torch"]


def test_names_are_shown_letter_by_letter_and_two_seeds_tell_no_methods_apart(browser, output, tmp_path):
    content = content_of(output)
    for n, row in enumerate(content["rows"]):
        row["label"] = "<img src=x onerror=alert(1)> & &amp;"
        for metric in row["metrics"].values():
            metric |= {"mean": float(n), "deviation": 1e-6, "values": [n - 1e-6, n + 1e-6]}
    summary.mark(content["rows"])
    (tmp_path / PAGE).write_text(page.made(content), encoding="utf-8")
    shown, complaints, _ = opened(browser, tmp_path / PAGE)
    assert complaints == [] and shown.locator("img").count() == 0
    cells = shown.locator('#table td[data-key="loss"]')
    assert sorted(cell.get_attribute("class") or "" for cell in cells.all()) == ["", "best", "near", "near", "near"]
    assert shown.locator("#table tbody th:first-child").first.inner_text() == "<img src=x onerror=alert(1)> & &amp;"
    assert shown.locator("#pareto text").last.text_content() == "<img src=x onerror=alert(1)> & &amp;"
    shown.close()


def content_of(output):
    return json.loads((output / "summary.json").read_text()) | {"runs": records(output)}


def test_what_stands_in_the_data_cannot_end_the_pages_data(output):
    content = content_of(output)
    content["settings"]["data"] = "</script><script>alert(1)</script> {{style}}"
    text = page.made(content)
    assert text.count("</script>") == text.count("<script") == 3, "the data, the plots and the program"
    data = text.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["settings"]["data"] == content["settings"]["data"]


def test_the_page_names_nothing_outside_of_it(output):
    text = (output / PAGE).read_text()
    assert not [word for word in ("src=", 'href="http', "@import", "fetch(", "url(http") if word in text]
