"""The report: what it reads, what it refuses, and what a browser shows of it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Awaitable, Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import Tab, browse, find_browser
from made_runs import made_result
from scripted_server import Script, options, run

from mooli.bench.errors import BenchmarkError
from mooli.bench.report_charts import TimeAxis, activity
from mooli.bench.report_page import main, page
from mooli.bench.report_runs import Run, read_runs, run_of
from mooli.bench.serving import report

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' onmouseover=alert(3) ]]> <!-- \ud800 \x00"


def made_run(*args: Any, name: str = "a", **kwargs: Any) -> Run:
    return run_of(made_result(*args, **kwargs), name, place=name)


def written(file: Path, *results: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(result) + "\n" for result in results))
    return file


class Figures(HTMLParser):
    """All figures of a page: (run, key) -> values, and all tags with their attributes."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.found: dict[tuple[int, str], set[float]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag == "data":
            place = int(given["data-run"] or 0), given["data-key"] or ""
            self.found.setdefault(place, set()).add(float(given["value"] or ""))


def test_every_figure_on_the_page_is_the_results_own() -> None:
    runs = [made_run(60, num_failed=2), made_run(60, seed=2, speed=2.0, name="b")]
    figures = Figures(page(runs)).found
    for (number, key), values in figures.items():
        assert values == {float(runs[number].result[key])}
    for name in ("ttft", "itl", "tpot", "e2e_latency"):
        for kind in ("mean", "median", "p90", "p95", "p99"):
            assert {(0, f"{kind}_{name}_ms"), (1, f"{kind}_{name}_ms")} <= figures.keys()
    for key in ("output_throughput", "request_throughput", "cache_hit_rate_pct", "completed", "failed", "duration"):
        assert {(0, key), (1, key)} <= figures.keys()


def test_figures_are_shown_as_the_table_of_the_command_shows_them() -> None:
    made = made_run(30)
    shown = html.unescape(re.sub(r"<[^>]+>", " ", page([made])))
    assert f"{made.result['p99_ttft_ms']:,.2f}" in shown
    assert f"{made.result['total_throughput']:,.2f}" in shown


def test_differences_are_ratios_to_the_first_run() -> None:
    first, second = made_run(60), made_run(60, speed=2.0, name="b")
    markup = page([first, second])
    times = second.result["median_itl_ms"] / first.result["median_itl_ms"]
    assert f'<span class="ratio better" title="better">×{times:.2f}</span>' in markup
    assert 'class="ratio worse"' in page([second, first])
    assert 'class="ratio' not in page([first])


def test_steps_of_a_second_are_the_results_own_lists() -> None:
    made = made_run(100, rate=4)
    found = activity([made], TimeAxis.of([made]))
    assert found is not None and found.tokens[0] is not None and found.open[0] is not None
    assert found.tokens[0].values.tolist() == made.result["output_tokens_per_second"]
    assert found.open[0].values.tolist() == made.result["requests_per_second"]


def test_short_runs_have_shorter_steps_that_hold_the_same_tokens() -> None:
    made = made_run(20, rate=20)
    found = activity([made], TimeAxis.of([made]))
    assert found is not None and found.tokens[0] is not None
    assert found.tokens[0].width_s < 1
    total = found.tokens[0].values.sum() * found.tokens[0].width_s
    assert total == pytest.approx(made.result["total_output_tokens"])
    assert "counted from the requests" in found.note


def test_ten_thousand_requests_stay_a_small_page_that_says_what_it_leaves_out() -> None:
    markup = page([made_run(10_000, rate=15, output_len=8)])
    assert len(markup) < 500_000
    assert "400 of 10,000 requests are drawn, those sent from" in markup
    assert "One step is 3 s" in markup


def test_a_burst_of_many_requests_is_thinned_evenly() -> None:
    result = made_result(1000)
    result["start_times"] = [0.0] * 1000
    result["latencies"] = [result["duration"] * (i + 1) / 1000 for i in range(1000)]
    assert "400 of 1,000 requests are drawn, evenly spread." in page([run_of(result, "a", place="a")])


@pytest.mark.parametrize("key", ["tag", "model", "backend", "dataset_note", "tokenizer", "date"])
def test_words_of_a_result_are_words_on_the_page(key: str) -> None:
    check_harmless(page([made_run(12, **{key: NASTY}), made_run(12, **{key: NASTY}, name=NASTY)]))


def test_words_of_servers_and_models_are_words_on_the_page() -> None:
    result = made_result(12, server_info={"version": NASTY, "model_path": NASTY, "backend": {"device": NASTY}})
    result |= {"generated_texts": [NASTY] * 12, "notes": [NASTY], "failures": [{"reason": NASTY, "count": 2}]}
    result["errors"] = ["", NASTY] * 6
    result["client"]["machine"] |= {"cpu": NASTY, NASTY: "x", "flags": [NASTY]}
    check_harmless(page([run_of(result, NASTY, place="a")]))


def check_harmless(markup: str) -> None:
    tags = Figures(markup).tags
    assert [tag for tag, _ in tags].count("script") == 1
    assert not [tag for tag, _ in tags if tag in ("img", "iframe", "link", "a", "object", "form")]
    assert not [
        name for _, given in tags for name in given if name.startswith("on") or name in ("src", "href", "style")
    ]
    assert "alert(1)" in markup


def test_secrets_of_a_server_are_not_shown() -> None:
    assert "sk-never-shown" not in page([made_run(12)])


def test_a_file_without_single_requests_has_figures_and_says_what_is_missing() -> None:
    markup = page([made_run(50, with_details=False, with_cache=False)])
    assert "the file lists no single requests (--output-details)" in markup
    assert "The server did not say how much it reused" in markup
    assert "Output tokens per second over time" in markup and "Timeline" not in markup


def test_a_file_of_sglang_has_curves_without_our_keys() -> None:
    result = made_result(50)
    for key in ("start_times", "latencies", "request_indices", "turns", "server_prompt_tokens", "cached_tokens"):
        del result[key]
    for key in ("client", "failures", "failed", "notes", "output_tokens_per_second", "requests_per_second", "cold"):
        del result[key]
    run = run_of(result, "theirs", place="a")
    assert run.remarks == ()
    markup = page([run])
    assert "Distribution of gaps" in markup
    assert "The files say nothing about time" in markup


def test_requests_that_do_not_give_the_summary_are_pointed_out() -> None:
    result = made_result(50)
    result["mean_ttft_ms"] *= 2
    (remark,) = run_of(result, "a", place="a").remarks
    assert "have a mean ttft of" in remark and remark in html.unescape(page([run_of(result, "a", place="a")]))


def test_numbers_that_are_none_do_not_stop_the_page() -> None:
    result = made_result(20) | {"median_itl_ms": "fast", "p99_ttft_ms": float("nan"), "concurrency": 10**400}
    result["itls"][3] = None
    result["ttfts"][4] = None
    result["request_rate"] = float("inf")
    markup = page([run_of(result, "a", place="a")])
    assert "nan" not in re.sub(r"<(style|script|pre).*?</\1>", "", markup, flags=re.DOTALL).lower()
    assert "no limit (inf)" in markup


@pytest.mark.parametrize("num", [1, 2])
def test_very_few_requests_and_equal_values_can_be_drawn(num: int) -> None:
    result = made_result(num, output_len=2)
    result |= {"ttfts": [0.0] * num, "itls": [[0.0]] * num, "latencies": [0.0] * num, "duration": 0.0}
    assert "Distribution of requests" in page([run_of(result, "a", place="a")])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("{", "line 1: not JSON"),
        ("\n[1]\n", "line 2: not a JSON object"),
        ('{"duration": 1}', "not a result of bench_serving"),
        ('{"duration": 1, "mean_ttft_ms": 2, "ttfts": 3, "errors": [""]}', "ttfts is not a list"),
        ('{"duration": 1, "mean_ttft_ms": 2, "ttfts": [3, 4], "errors": [""]}', "ttfts has 2 entries, errors has 1"),
        ("\x00\xff", "not UTF-8"),
    ],
)
def test_files_that_are_no_results_are_refused_in_one_line(
    content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(content.encode("latin-1"))
    assert main([str(file), "-o", str(tmp_path / "r.html")]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


def test_the_last_line_of_a_file_is_shown_and_the_others_on_request(tmp_path: Path) -> None:
    file = written(tmp_path / "x.jsonl", made_result(12, tag="old"), made_result(12, tag="new"))
    (last,) = read_runs([file], all_lines=False)
    assert last.label == "new" and "holds 2 runs" in last.remarks[0]
    assert [run.label for run in read_runs([file], all_lines=True)] == ["old", "new"]
    with pytest.raises(BenchmarkError, match="at most 6 runs"):
        read_runs([file] * 4, all_lines=True)


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "x.jsonl", made_result(12))
    assert main([str(file), "-o", str(tmp_path / "no" / "r.html")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_the_flag_writes_the_page_with_single_requests_whatever_the_line_holds(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    file, target = tmp_path / "r.html", tmp_path / "out.jsonl"
    flags = ("--report", str(file), "--output-file", str(target))
    scripts = [Script([(0.2, "a", 1), (0.1, "b", 1), (0.1, "c", 1)], cached_tokens=4) for _ in range(3)]
    measured, server, said = run(scripts, tokenizer_path, *flags)
    report(options(server.url, tokenizer_path, "--num-prompts", "3", *flags), measured, said.append)
    assert f"Report written to {file}" in said
    line = json.loads(target.read_text())
    assert "ttfts" not in line
    markup = file.read_text()
    assert "Timeline of requests" in markup and "Cache hit rate over time" in markup
    assert Figures(markup).found[0, "mean_ttft_ms"] == {line["mean_ttft_ms"]}


@pytest.mark.parametrize("name", ["", "/", "/no/such/folder/r.html"])
def test_a_report_that_could_not_be_written_is_refused_before_the_run(name: str, tokenizer_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="--report takes the name of a file"):
        options("http://h", tokenizer_path, "--report", name)


# In a browser

needs_browser = pytest.mark.skipif(
    find_browser() is None,
    reason="no Chromium or Chrome on the path; install one (Debian: apt-get install chromium) or name it in"
    " MOOLI_TEST_BROWSER",
)

OVERLAPS = """
(() => {
  const found = [];
  for (const svg of document.querySelectorAll("svg")) {
    const texts = [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
    const frame = svg.getBoundingClientRect();
    texts.forEach(([words, box], i) => {
      const outside = box.left < frame.left - 1 || box.right > frame.right + 1;
      if (outside || box.top < frame.top - 2 || box.bottom > frame.bottom + 2) found.push(`${words} sticks out`);
      for (const [others, other] of texts.slice(i + 1)) {
        const apart = box.right <= other.left || other.right <= box.left
          || box.bottom - 3 <= other.top || other.bottom - 3 <= box.top;
        if (!apart) found.push(`${words} over ${others} in ${svg.getAttribute("aria-label")}`);
      }
    });
  }
  return found;
})()
"""

OVERFULL = """
[...document.querySelectorAll(".tile, .tile-row, .legend, h1, .subtitle")]
  .filter((box) => box.scrollWidth > box.clientWidth + 1).map((box) => box.textContent)
"""

SHOWN = """
[...document.querySelectorAll("data")].filter((figure) => figure.getClientRects().length)
  .map((figure) => [Number(figure.dataset.run), figure.dataset.key, Number(figure.value), figure.textContent])
"""

Visit = Callable[[Tab], Awaitable[Any]]


@pytest.fixture(scope="module")
def show(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Visit], Any]:
    def show(visit: Visit) -> Any:
        browser = find_browser()
        assert browser is not None
        return browse(browser, tmp_path_factory.mktemp("profile"), visit)

    return show


@needs_browser
def test_a_browser_shows_it_light_and_dark_without_complaint_network_or_overlap(
    show: Callable[[Visit], Any], tmp_path: Path
) -> None:
    pages = {
        "one": [made_run(100, num_failed=3, rate=6)],
        "two": [made_run(100, rate=6), made_run(100, seed=2, speed=1.6, rate=6, name="packed weights, two threads")],
        "many": [made_run(40, seed=i, speed=1 + i / 3, rate=30, name=f"run {i}") for i in range(6)],
        "plain": [made_run(40, with_details=False, with_cache=False)],
        "nasty": [made_run(12, tag=NASTY * 2, model=NASTY, generated_texts=[NASTY] * 12)],
    }
    for name, runs in pages.items():
        (tmp_path / f"{name}.html").write_bytes(page(runs).encode("utf-8", "replace"))

    async def visit(tab: Tab) -> None:
        for name, runs in pages.items():
            file = tmp_path / f"{name}.html"
            grounds = []
            for theme in ("light", "dark"):
                tab.loaded.clear()
                await tab.open(file, theme=theme)
                assert tab.complaints == []
                assert tab.loaded == [file.as_uri()]
                assert await tab.value(OVERLAPS) == []
                assert await tab.value(OVERFULL) == []
                assert await tab.value("document.documentElement.scrollWidth <= innerWidth")
                grounds.append(await tab.value("getComputedStyle(document.body).backgroundColor"))
            assert grounds[0] != grounds[1]
            for number, key, value, words in await tab.value(SHOWN):
                assert value == float(runs[number].result[key]) and words
            await tab.open(file, width=400)
            assert await tab.value(OVERFULL) == []
            assert await tab.value("document.documentElement.scrollWidth <= innerWidth")

    show(visit)


@needs_browser
def test_pointing_at_a_request_tells_its_story(show: Callable[[Visit], Any], tmp_path: Path) -> None:
    result = made_result(20, rate=20)
    result["errors"][0] = NASTY[:40]
    file = tmp_path / "r.html"
    file.write_bytes(page([run_of(result, "a", place="a")]).encode())

    async def visit(tab: Tab) -> list[str]:
        await tab.open(file)
        tips = []
        for number in (0, 1):
            place = f"document.querySelectorAll('.rows g')[{number}].getBoundingClientRect()"
            await tab.value(f"scrollTo(0, {place}.top + scrollY - 300)")
            await tab.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            x, y = await tab.value(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({place})")
            await tab.point_at(x, y)
            tips.append(await tab.value("document.getElementById('tip').hidden ? '' : tip.textContent"))
        await tab.point_at(2, 2)
        tips.append(await tab.value("document.getElementById('tip').hidden ? '' : tip.textContent"))
        assert tab.complaints == []
        return tips

    first, second, away = show(visit)
    assert first == f"request 0, sent at 0 s\nfailed: {NASTY[:40]}"
    assert "first token after " in second and "256 tokens in, 24 out" in second
    assert away == ""


@needs_browser
def test_injected_script_does_not_run_even_when_it_gets_in(show: Callable[[Visit], Any], tmp_path: Path) -> None:
    markup = page([made_run(12)]).replace("<main>", "<main><script>window.ran = true</script><img src=x onerror=ran()>")
    file = tmp_path / "r.html"
    file.write_text(markup)

    async def visit(tab: Tab) -> Any:
        await tab.open(file)
        assert any("Content Security Policy" in complaint for complaint in tab.complaints)
        return await tab.value("window.ran === undefined")

    assert show(visit) is True
