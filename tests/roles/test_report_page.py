"""The report in a browser: its script sorts and filters, its policy holds, and 2,000 workers are no load."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plimsoll import report
from plimsoll.findings import findings
from plimsoll.formats import CgroupSample, HostData, Sample
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

T0 = 1_763_942_400
EVIL = '"><img src=x onerror="window.broken=1"><script>window.broken=1</script><style>body{display:none}</style>'


def worker(unit: str, rate: float, pid: int) -> tuple[list[Sample], list[CgroupSample]]:
    """A day and a quarter of one process, a restart and an OOM kill after 10 and 20 hours. rate in KiB an hour."""
    samples = [
        Sample(T0 + 900 * n, pid, int(60_000 + rate * n / 4 + 700 * (n % 7)), "celery", unit, T0, "child", tasks=10 * n)
        for n in range(120)
    ]
    figures = [
        CgroupSample(
            one.timestamp, unit, one.rss_kb + 30_000, 300_000, 400_000, oom_kill=int(n >= 80), n_restarts=int(n >= 40)
        )
        for n, one in enumerate(samples)
    ]
    return samples, figures


def made(*units: tuple[str, float]) -> tuple[Any, list[Any]]:
    parts = [worker(unit, rate, pid) for pid, (unit, rate) in enumerate(units, 7)]
    site = {"file": "/x/releases/1/app/shop/tasks.py", "line": 9, "function": EVIL, "growth_kb": 500}
    traces = [
        {"kind": "task_growth", "time": 1, "task": EVIL, "count": 9, "rss_growth_kb": 700, "unit": units[0][0]},
        {"kind": "growth", "time": 2, "sites": [site], "tasks": {EVIL: {"traced_growth_kb": 500}}, "unit": units[0][0]},
    ]
    samples, figures = ([one for part in parts for one in part[at]] for at in (0, 1))
    hosts: Any = [
        ({"host": "w-1", "collected": True, "reason": "", "last": T0}, HostData("w-1", samples, figures, traces)),
        ({"host": EVIL, "collected": False, "reason": EVIL, "last": None}, None),
    ]
    return findings(hosts, T0)


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    # As root, and where /dev/shm is small.
    for option in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1280,1600"):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


def shown(browser: webdriver.Chrome, path: Path, document: Any, verdicts: list[Any], at: str = "") -> None:
    path.write_text(report.html(document, verdicts))
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(f"file://{path}{at}")


def column(browser: webdriver.Chrome, number: int) -> list[str]:
    rows = browser.find_elements(By.CSS_SELECTOR, f"#workers tbody tr:not([hidden]) td:nth-child({number})")
    return [row.text for row in rows]


UNITS = ("a.service", 2000.0), ("c.service", 9000.0), ("b.service", 0.0)


def test_a_heading_sorts_and_what_is_typed_filters(browser: webdriver.Chrome, tmp_path: Path) -> None:
    shown(browser, tmp_path / "report.html", *made(*UNITS))
    assert column(browser, 2) == ["c.service", "a.service", "b.service"], "the most urgent first"
    heads = browser.find_elements(By.CSS_SELECTOR, "#workers th button")
    by_name, by_growth = heads[1], heads[4]
    by_name.click()
    assert column(browser, 2) == ["a.service", "b.service", "c.service"]
    by_name.send_keys(Keys.ENTER)
    assert column(browser, 2) == ["c.service", "b.service", "a.service"]
    assert browser.find_element(By.CSS_SELECTOR, "th[aria-sort]").get_attribute("aria-sort") == "descending"
    by_growth.click()
    assert column(browser, 2) == ["c.service", "a.service", "b.service"]
    browser.find_element(By.ID, "leaking").click()
    assert column(browser, 2) == ["c.service", "a.service"]
    browser.find_element(By.ID, "words").send_keys("A.SERV growing")
    assert column(browser, 2) == ["a.service"]
    assert browser.find_element(By.ID, "shown").text == "1 of 3 workers"


# Of each worker's cell the lines that its name is on.
LINES = """
return [...document.querySelectorAll("#workers tbody td:nth-child(2)")].map((cell) => {
  const lines = new Map(), texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
  for (let text; (text = texts.nextNode()); )
    for (let at = 0; at < text.length; at++) {
      const range = document.createRange();
      range.setStart(text, at);
      range.setEnd(text, at + 1);
      const top = Math.round(range.getBoundingClientRect().top);
      lines.set(top, (lines.get(top) || "") + text.data[at]);
    }
  return [...lines.values()];
});
"""


@pytest.fixture(params=[1100, 400])
def narrow(browser: webdriver.Chrome, request: Any) -> Iterator[webdriver.Chrome]:
    """A window of that width, which is less than one of its own may have."""
    metrics = {"width": request.param, "height": 1400, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_name_is_on_two_lines_at_most_and_cut_inside_of_no_word(narrow: webdriver.Chrome, tmp_path: Path) -> None:
    names = [f"celery-worker@{name}.service" for name in ("gate", "recommendations-nightly", "x" * 40, "mail_2.eu")]
    names.append("celery-nightly.service")
    endless = f"celery-worker@{'y' * 150}.service"
    shown(narrow, tmp_path / "report.html", *made(*((name, 2000.0) for name in [*names, endless])))
    lines = {"".join(some).strip(): some for some in narrow.execute_script(LINES)}
    assert set(lines) == {*names, endless}
    for name in names:
        assert lines[name] in ([name], [part for part in re.split(r"(?<=@)", name) if part]), lines[name]
    assert any(len(lines[name]) == 2 for name in names) and len(lines[endless]) > 2
    assert narrow.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0
    over = (
        "return [...document.querySelectorAll('#workers td')].filter((one) => one.scrollWidth > one.clientWidth).length"
    )
    assert narrow.execute_script(over) == 0
    narrow.find_element(By.ID, "words").send_keys("worker@gate.service")
    assert column(narrow, 2) == names[:1]


def test_nothing_that_a_host_sent_runs_or_is_loaded(browser: webdriver.Chrome, tmp_path: Path) -> None:
    document, verdicts = made(*UNITS)
    shown(browser, tmp_path / "report.html", document, verdicts)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return [window.broken, document.images.length, document.scripts.length]") == [
        None,
        0,
        1,
    ]
    assert EVIL in browser.find_element(By.TAG_NAME, "main").text
    # Should one of them ever get through as markup, the policy is what is left.
    page = tmp_path / "torn.html"
    page.write_text(report.html(document, verdicts).replace("<main>", f"<main><p>{EVIL[2:]}</p>"))
    browser.get(f"file://{page}")
    said = [one["message"] for one in browser.get_log("browser")]
    assert browser.execute_script("return window.broken") is None
    assert browser.find_element(By.TAG_NAME, "h1").is_displayed()
    assert sum("Content Security Policy" in one for one in said) >= 3, said


def test_a_link_opens_the_worker_that_it_names(browser: webdriver.Chrome, tmp_path: Path) -> None:
    shown(browser, tmp_path / "report.html", *made(*UNITS))
    calm = browser.find_element(By.TAG_NAME, "details")
    assert calm.get_attribute("open") is None
    browser.find_element(By.LINK_TEXT, "b.service").click()
    assert calm.get_attribute("open") == "true" and calm.find_element(By.TAG_NAME, "svg").is_displayed()
    leak = browser.find_element(By.LINK_TEXT, "c.service").get_attribute("href").partition("#")[2]
    assert "c.service" in browser.find_element(By.ID, leak).find_element(By.TAG_NAME, "h3").text


def test_restarts_kills_floors_and_the_forecast_are_in_the_chart(browser: webdriver.Chrome, tmp_path: Path) -> None:
    shown(browser, tmp_path / "report.html", *made(*UNITS))
    drawn = browser.find_element(By.CSS_SELECTOR, "section svg")
    marks = [one.text for one in drawn.find_elements(By.CSS_SELECTOR, "text.mark")]
    assert [one[0] for one in marks] == ["↻", "✕"]
    for what in ("polyline.grows", "polyline.floor", "polygon.band", "polyline.forecast", "line.max", "line.high"):
        assert drawn.find_elements(By.CSS_SELECTOR, what), what
    assert "marked: restart, OOM kill" in str(drawn.get_attribute("aria-label"))


def test_it_can_be_read_without_the_script(browser: webdriver.Chrome, tmp_path: Path) -> None:
    document, verdicts = made(*UNITS)
    page = tmp_path / "plain.html"
    text = report.html(document, verdicts)
    page.write_text(text[: text.rindex("<script>")])
    browser.get(f"file://{page}")
    assert len(column(browser, 2)) == 3 and not browser.find_element(By.ID, "tools").is_displayed()


def test_two_thousand_workers_sort_and_filter_at_once(browser: webdriver.Chrome, tmp_path: Path) -> None:
    document, verdicts = made(*UNITS)
    few = list(zip(document["workers"], verdicts))
    many = [(copy.deepcopy(one), verdict) for one, verdict in few for _ in range(667)]
    for at, (one, _) in enumerate(many):
        one["host"], one["growth_kb_per_hour"] = f"host-{at:04}", float(at * 7919 % 2003)
    document["workers"] = [one for one, _ in many]
    shown(browser, tmp_path / "report.html", document, [verdict for _, verdict in many])
    assert (tmp_path / "report.html").stat().st_size < 12 << 20
    assert len(browser.find_elements(By.TAG_NAME, "svg")) == report.MOST_CHARTS
    browser.find_elements(By.CSS_SELECTOR, "#workers th button")[4].click()
    growth = browser.execute_script(
        "return [...document.querySelectorAll('#workers tbody td:nth-child(5)')].map((one) => Number(one.dataset.v))"
    )
    assert len(growth) == 2001 and growth == sorted(growth, reverse=True)
    browser.find_element(By.ID, "words").send_keys("host-1999")
    assert column(browser, 1) == ["host-1999"]
