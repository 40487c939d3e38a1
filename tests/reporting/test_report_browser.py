"""The report in a real browser: no error, tables that sort, a dark page, no overflow on a phone, nothing fetched."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_results as results

from moeify.reporting.report import report

webdriver = pytest.importorskip("selenium.webdriver")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None or DRIVER is None,
        reason="needs a browser: chromium and chromedriver (Debian: apt-get install chromium chromium-driver)",
    ),
]
DESKTOP, PHONE = (1280, 900), (390, 844)
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (*QUIET, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(DRIVER))
    # The page that a browser opens by itself goes on asking for its parts.
    found.get("about:blank")
    yield found
    found.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it, and names that would like to be code."""
    folder = tmp_path_factory.mktemp("run")
    hostile = ["<script>window.broken = 1</script>", "</script><img src=x onerror='window.broken = 1'>", "x" * 200]
    found = results.smollm2(tokens=[*hostile, *results.WORDS])
    found.machine = {"device": hostile[1], "processor": hostile[2]}
    results.write(folder, found)
    results.write_others(folder)
    return report(folder).out


def show(driver: Any, page: Path, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> None:
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    for kind in ("browser", "performance"):
        driver.get_log(kind)
    driver.get(page.as_uri())


def column(driver: Any, table: str, index: int) -> list[str]:
    script = (
        "return [...document.getElementById(arguments[0]).tBodies[0].rows].map(r => r.cells[arguments[1]].innerText)"
    )
    return [text.split("\n")[0] for text in driver.execute_script(script, table, index)]


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_an_error_and_fetches_nothing(
    driver: Any, page: Path, size: tuple[int, int], scheme: str
) -> None:
    show(driver, page, size, scheme)
    assert driver.get_log("browser") == []
    assert driver.execute_script("return window.broken") is None
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked == [page.as_uri()]


def test_the_console_would_show_an_error(driver: Any, page: Path, tmp_path: Path) -> None:
    """So that an empty console means something; the page's policy stops every script but its own."""
    changed = tmp_path / "changed.html"
    changed.write_text(page.read_text().replace("</main>", "<script>window.broken = 1</script></main>"))
    show(driver, changed)
    assert any("Content Security Policy" in entry["message"] for entry in driver.get_log("browser"))
    assert driver.execute_script("return window.broken") is None


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_three_answers_are_on_the_first_screen(driver: Any, page: Path, size: tuple[int, int]) -> None:
    show(driver, page, size)
    answers = driver.find_elements("css selector", ".answer")
    assert [answer.find_element("css selector", "h2").text for answer in answers] == [
        "Should I use it?",
        "What did I lose?",
        "What did I gain?",
    ]
    for answer in answers:
        assert answer.find_element("css selector", "p, li").rect["y"] < size[1]


def test_a_click_sorts_and_a_second_click_turns_it_round(driver: Any, page: Path) -> None:
    show(driver, page)
    table = driver.find_element("id", "sizes")
    header = table.find_elements("css selector", "thead th")[2]
    assert header.get_attribute("aria-sort") is None
    before = column(driver, "sizes", 0)
    assert before == ["dense", "moe-50", "static-50"]
    header.find_element("tag name", "button").click()
    assert column(driver, "sizes", 0) == ["static-50", "moe-50", "dense"]
    assert header.get_attribute("aria-sort") == "ascending"
    header.find_element("tag name", "button").click()
    assert column(driver, "sizes", 0) == before
    assert header.get_attribute("aria-sort") == "descending"
    other = table.find_elements("css selector", "thead th")[0]
    other.find_element("tag name", "button").click()
    assert header.get_attribute("aria-sort") is None
    assert other.get_attribute("aria-sort") == "ascending"


def test_tables_sort_from_the_keyboard_by_value_with_gaps_last(driver: Any, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    show(driver, page)
    driver.execute_script("document.getElementById('timings').closest('details').open = true")
    button = driver.find_elements("css selector", "#timings thead th button")[5]
    for order in (1, -1):
        button.send_keys(Keys.ENTER)
        found = column(driver, "timings", 5)
        values = [float(text.replace(",", "")) for text in found[:-1]]
        assert found[-1] == "\u2013"
        assert values == sorted(values, reverse=order < 0)
        assert values[0] != values[-1]


def test_the_layer_can_be_chosen(driver: Any, page: Path) -> None:
    from selenium.webdriver.support.ui import Select

    show(driver, page)
    figure = driver.find_element("css selector", "figure.pairs")

    def drawn() -> list[str]:
        return [path.get_attribute("d") for path in figure.find_elements("css selector", "svg.heat path")]

    first, said = drawn(), figure.find_element("css selector", ".strongest").text
    assert len(first) > 5
    assert "Most often together: " in said
    # Every pair is a cell, both ways.
    assert sum(path.count("M") for path in first) == 32 * 31
    Select(figure.find_element("tag name", "select")).select_by_visible_text("17")
    assert drawn() != first
    assert figure.find_element("css selector", ".strongest").text != said


def test_cells_can_be_read(driver: Any, page: Path) -> None:
    from selenium.webdriver import ActionChains

    show(driver, page)
    for selector, words in (("svg.heat[data-table]", "% of all choices"), ("figure.pairs svg.heat", "Experts ")):
        drawing = driver.find_element("css selector", selector)
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", drawing)
        # Off the middle, where a pair would be one expert with itself.
        ActionChains(driver).move_to_element_with_offset(drawing, 60, 20).perform()
        readout = drawing.find_element("xpath", "../p[@class='readout']")
        assert words in readout.text


def test_dark_is_dark(driver: Any, page: Path) -> None:
    script = "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]"
    seen = {}
    for scheme in ("light", "dark"):
        show(driver, page, scheme=scheme)
        paper, ink = (sum(map(int, re.findall(r"\d+", color)[:3])) / 3 for color in driver.execute_script(script))
        seen[scheme] = ink - paper
    assert seen["light"] < -200
    assert seen["dark"] > 200


@pytest.mark.parametrize("opened", [False, True], ids=["closed", "opened"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_is_as_wide_as_the_screen(driver: Any, page: Path, size: tuple[int, int], opened: bool) -> None:
    show(driver, page, size)
    if opened:
        driver.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
    wide, view = driver.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide == view
    if size == PHONE:
        assert view == PHONE[0]
