"""The report in a real browser: no error, a dark page, no overflow on a phone or paper, a keyboard, nothing fetched."""

import json
import re
import shutil
import time
from collections import Counter
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
    # The console has it a moment after the page.
    messages: list[str] = []
    for _ in range(50):
        messages += [entry["message"] for entry in driver.get_log("browser")]
        if messages:
            break
        time.sleep(0.1)
    assert any("Content Security Policy" in message for message in messages)
    assert driver.execute_script("return window.broken") is None


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_three_answers_are_on_the_first_screen(driver: Any, page: Path, size: tuple[int, int]) -> None:
    show(driver, page, size)
    answers = driver.find_elements("css selector", ".answer")
    assert [answer.find_element("css selector", "h2").text for answer in answers] == [
        "Should I use it?",
        "What did I lose?",
        "What did I gain?",
        "Where do you run it?",
    ]
    for answer in answers[:3]:
        assert answer.find_element("css selector", "p, li").rect["y"] < size[1]


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


def roles(driver: Any) -> Counter[str]:
    """What a screen reader is told, role by role."""
    nodes = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    return Counter(node["role"]["value"] for node in nodes if not node["ignored"])


def test_a_phone_tells_a_screen_reader_the_same_tables(driver: Any, page: Path) -> None:
    """Rows are blocks there, and nothing scrolls sideways."""
    found = {}
    for size in (DESKTOP, PHONE):
        show(driver, page, size)
        found[size] = roles(driver)
    for role in ("table", "row", "columnheader", "rowheader", "region"):
        assert found[PHONE][role] == found[DESKTOP][role] > 0, role
    # A cell without a value is not read on a phone.
    assert 0 < found[PHONE]["cell"] <= found[DESKTOP]["cell"]
    script = "return [...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth).length"
    assert driver.execute_script(script) == 0


def test_a_keyboard_reaches_and_opens_everything(driver: Any, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    show(driver, page)
    opened, regions = [], 0
    for _ in range(12):
        driver.switch_to.active_element.send_keys(Keys.TAB)
        one = driver.switch_to.active_element
        assert one.value_of_css_property("outline-style") == "solid"
        if one.tag_name == "summary":
            one.send_keys(Keys.ENTER)
            opened.append(one.text.split(":")[0])
        regions += one.get_attribute("class") == "scroll"
    assert opened[:3] == ["Not measured", "How this verdict is made", "The numbers"]
    assert regions >= 3
    assert driver.execute_script("return document.querySelectorAll('details[open]').length") == len(opened)


def test_paper_is_wide_enough(driver: Any, page: Path) -> None:
    """A4 at 96 dots per inch, without margins of 10 mm."""
    show(driver, page, (718, 1000))
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    script = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    wide, view = driver.execute_script(script)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert wide == view
