"""doit report: the page with the state of the build, and how a real browser shows it."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import ImageStat
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from build_tasks.report import charts, snapshot_diff
from build_tasks.report.records import FileSnapshot, ModelSnapshot, Snapshot
from tests.report import browser
from tests.support.project import OTHER, ROOT, Project

PAGE = "build/report.html"
HOSTILE = "<script>document.title='owned'</script> & \"so\" `on`"


class PageText(HTMLParser):
    """The text of a page without its markup, with headings and the text in SVG; and its tags with their attributes."""

    def __init__(self, html: str):
        super().__init__()
        self.parts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.parts))


def write_report(project: Project, *names: str, **environment: str) -> PageText:
    """Run `doit report` and read its page."""
    assert project.built("report", *names, **environment).out == f"{PAGE}\n"
    return PageText((project / PAGE).read_text())


@pytest.fixture
def built(built_tiny: Project, copy_of: Callable[[Project], Project]) -> Project:
    return copy_of(built_tiny)


def test_nothing_is_built_by_a_report_of_nothing(project: Project) -> None:
    project.model("other", OTHER.replace('"torchscript"', '"torchscript", "tensorrt"'))
    page = write_report(project, CUDA_VISIBLE_DEVICES="")
    assert "other_ trt not for this machine" in page.text
    assert "other_trt: this machine lacks TensorRT" in page.text
    assert "random weights" in page.text
    assert re.search(r"\d+ tasks are not built: doit other builds them\.", page.text)
    assert "up to date" not in page.text
    assert not (project / "build/other").exists()


def test_what_is_built_is_shown(built: Project) -> None:
    page = write_report(built)
    for words in (
        "tiny_ onnx up to date ok error ",  # the overview
        "same class in 7 of 7 not measured: doit bench:tiny version 1, Triton 26.08",
        "TorchScript ok",
        "build/tiny/model.pt",
        "input INPUT__0 float32 any × 3 × 160 × 160",
        'platform: "onnxruntime_onnx"',
        "torch 2.",
        "brick.jpg class",
        "This is the first report of this model.",
    ):
        assert words in page.text, words
    titles = re.findall(r"<title>(\S+): up to date, took [\d.]+ s</title>", (built / PAGE).read_text())
    assert {"weights:tiny", "onnx:tiny", "measure:tiny_onnx", "publish:tiny"} <= set(titles)
    pictures = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 7
    assert all(source.startswith("data:image/webp;base64,") for source in pictures)


def test_a_model_that_exists_only_as_onnx_is_compared_with_that(built: Project) -> None:
    spec = 'formats = ["onnx"]\n[weights]\nsource = "network.onnx"\n[input]\nshape = [3, 160, 160]\n'
    folder = built.model("only", f"{spec}mean = [0, 0, 0]\nstd = [1, 1, 1]\n[[accuracy.gate]]\ntop1 = 1\n")
    shutil.copy(built / "build/tiny/model.onnx", folder / "network.onnx")
    built.built("only")
    page = write_report(built, "only")
    assert "sample ONNX Runtime ONNX" in page.text
    assert "PyTorch" not in page.text
    assert "weights.onnx up to date" in page.text


def test_the_state_of_a_spec_that_was_edited_is_told_with_its_reason(built: Project) -> None:
    built.edit("models/tiny/model.toml", "max_batch_size = 4", "max_batch_size = 5")
    page = write_report(built)
    assert re.search(r"torchscript:tiny \S*max_batch_size: 4 -> 5", page.text)
    assert "if model.pt" in page.text
    assert "5" not in (built / "model_repository/tiny/config.pbtxt").read_text().split("max_batch_size: ")[1][:1]


def test_the_next_report_tells_what_has_changed(built: Project) -> None:
    write_report(built)
    assert "Nothing has changed." in write_report(built).text
    built.edit("models/tiny/model.toml", "[accuracy]", "[onnx]\nopset = 16\n\n[accuracy]")
    built.built()
    snapshot = json.loads((built / snapshot_diff.SNAPSHOT).read_text())
    snapshot["models"]["tiny"]["tools"] |= {"onnxslim": "0.0.1", "abandoned": "1.0"}
    del snapshot["models"]["tiny"]["files"]["build/tiny/labels.txt"]
    (built / snapshot_diff.SNAPSHOT).write_text(json.dumps(snapshot))
    page = write_report(built)
    assert re.search(r"build/tiny/model\.onnx : sha256 \w{8}… → \w{8}…", page.text)
    assert re.search(r"onnxslim : 0\.0\.1 → [1-9.]*", page.text)
    assert "abandoned : gone" in page.text
    assert "build/tiny/labels.txt : new" in page.text
    assert "build/tiny/model.pt :" not in page.text
    assert "Nothing has changed." in write_report(built).text


def test_differences_in_words() -> None:
    before = ModelSnapshot(
        files={"a": FileSnapshot("1" * 64, 10), "b": FileSnapshot("2" * 64, 1)},
        errors={"a": 1.3e-6, "b": 2e-3},
        statuses={"a": "ok"},
        tools={"onnx": "1"},
        seconds={"fast": 0.1, "slow": 10.0, "much": 4.0},
    )
    now = ModelSnapshot(
        files={"a": FileSnapshot("3" * 64, 12), "b": FileSnapshot("2" * 64, 1)},
        errors={"a": 2.2e-6, "b": 2.0001e-3},
        statuses={"a": "refused"},
        tools={"onnx": "2"},
        seconds={"fast": 0.9, "slow": 11.0, "much": 9.0},
    )
    assert snapshot_diff.describe_changes(before, now) == [
        ("a", "sha256 11111111… → 33333333…, 10 → 12 bytes"),
        ("a", "error 1.3e-06 → 2.2e-06"),
        ("a", "ok → refused"),
        ("onnx", "1 → 2"),
        ("much", "4.0 s → 9.0 s"),
    ]
    assert snapshot_diff.describe_changes(before, before) == []
    assert snapshot_diff.describe_changes(None, now) is None


def test_a_snapshot_of_another_version_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert snapshot_diff.read_snapshot() == Snapshot()
    (tmp_path / "build").mkdir()
    saved = {"files": {"a": ["1" * 64, None]}, "errors": {}, "verdicts": {}, "tools": {}, "seconds": {}}
    content = {"written": 1.5, "models": {"m": saved, "old": {"files": {}}, "new": {**saved, "further": {}}}}
    (tmp_path / snapshot_diff.SNAPSHOT).write_text(json.dumps(content))
    model = ModelSnapshot({"a": FileSnapshot("1" * 64, None)}, {}, {}, {}, {})
    assert snapshot_diff.read_snapshot() == Snapshot(1.5, {"m": model})


def test_a_report_of_one_model_keeps_what_is_known_of_the_others(built: Project) -> None:
    built.model("other", OTHER)
    write_report(built)
    page = write_report(built, "other")
    assert "models/tiny/model.toml" not in page.text
    assert "Nothing has changed." in page.text
    shutil.rmtree(built / "models/other")
    assert json.loads((built / snapshot_diff.SNAPSHOT).read_text())["models"].keys() == {"tiny", "other"}
    write_report(built, "tiny")
    assert json.loads((built / snapshot_diff.SNAPSHOT).read_text())["models"].keys() == {"tiny"}


def test_a_model_that_there_is_not_is_a_mistake(built: Project) -> None:
    run = built.doit("report", "tinny")
    assert run.code == 3
    assert "found 'tinny' (did you mean 'tiny'?)" in run.out
    assert not (built / PAGE).exists()


def test_a_sample_that_changes_its_class_comes_first(built: Project) -> None:
    path = built / "build/tiny/model.onnx.measured.json"
    measured = json.loads(path.read_text())
    output = measured["outputs"]["OUTPUT__0"]
    assert len(output["classes"]) == output["samples"] == 7
    change = {"sample": "rocket.jpg", "reference_class": output["classes"][6], "artifact_class": 3, "margin": 0.25}
    output["top1_changes"] = [change]
    path.write_text(json.dumps(measured))
    page = write_report(built)
    assert "1 of 7 samples change their class" in page.text
    assert re.search(r"ONNX rocket\.jpg class \d+ class \d+ same \S+ ≠ class 3 margin 0\.25 RMS", page.text)


def test_an_output_without_numbers_is_refused_in_words(built: Project) -> None:
    path = built / "build/tiny/model.onnx.measured.json"
    measured = json.loads(path.read_text())
    measured["outputs"]["OUTPUT__0"] = {"wrong": "NaN or infinity in 3 of 7000 values"}
    path.write_text(json.dumps(measured))
    page = write_report(built)
    assert "ONNX refused NaN or infinity in 3 of 7000 values" in page.text
    assert re.search(r"tiny_ onnx failed refused not measured: .* version 1, Triton 26.08", page.text)
    assert "accuracy:tiny_onnx failed: output OUTPUT__0: NaN or infinity in 3 of 7000 values" in page.text


def test_what_failed_is_shown_with_its_reason_until_it_is_built(built: Project) -> None:
    templates = built / "build_tasks/stages/templates"
    shutil.rmtree(templates)
    for folder in (built / "build/tiny/clients").iterdir():
        shutil.rmtree(folder)
    assert built.doit().code != 0
    page = write_report(built)
    assert "tiny_ onnx failed ok" in page.text
    assert re.search(r"client:tiny_onnx failed: .*client\.py\.j2", page.text)
    assert "doit tiny tries again." in page.text
    shutil.copytree(ROOT / "build_tasks/stages/templates", templates)
    built.built()
    assert not (built / "build/.failures.json").exists()
    assert "what to do" not in write_report(built).text


def test_speed_is_that_of_the_last_benchmark(built: Project) -> None:
    figures = [(4, 8.0, 500.4), (1, 2.5, 400.0)]
    points = [
        {
            "format": "onnx",
            "concurrency": 1,
            "p99_ms": 9.0,
            "batch": batch,
            "p50_ms": median,
            "images_per_s": speed,
        }
        for batch, median, speed in figures
    ]
    run = {"machine": {"cpu": "A processor", "cores": 2}, "tools": {}, "date": "2026-11-01T00:00:00Z", "points": []}
    timing = {"timed_by": "wall clock", "device": "cpu", "sha256": "0" * 64}
    runs = [run | {"date": "2026-11-02T00:00:00Z", "points": points, "measured": {"onnx": timing}}, run]
    (built / "build/tiny/bench.json").write_text(json.dumps({"model": "tiny", "runs": runs}))
    page = write_report(built)
    assert "500 images/s at batch 4; 2.5 ms at batch 1, of an older build" in page.text
    assert "On 2 cores of A processor, measured by doit bench:tiny on 2026-11-02" in page.text
    table = built.built("report", "--markdown").out
    assert "| tiny\\_onnx | up to date | ok: error " in table
    assert "500 images/s at batch 4; 2.5 ms at batch 1, of an older build | version 1, Triton 26.08 | " in table


def test_figures_of_another_artifact_are_not_shown(built: Project) -> None:
    (built / "build/tiny/model.onnx").write_bytes(b"another")
    (built / "build/tiny/model.pt.measured.json").write_text("{")
    (built / "build/tiny/model.pt.signature.json").write_text("[]")
    (built / snapshot_diff.SNAPSHOT).write_text("[]")
    page = write_report(built)
    assert "The artifacts that are here now were not measured" in page.text
    assert re.search(r"measure:tiny build/tiny/model\.pt\.measured\.json: sha256 \w{8} -> \w{8}", page.text)


def test_a_report_is_written_whole_or_not_at_all(built: Project) -> None:
    write_report(built)
    before = (built / PAGE).read_bytes(), (built / snapshot_diff.SNAPSHOT).read_bytes()
    with (built / "build_tasks/report/templates/report.html.j2").open("a") as template:
        template.write("{{ nobody }}")
    run = built.doit("report")
    assert run.code != 0
    assert before == ((built / PAGE).read_bytes(), (built / snapshot_diff.SNAPSHOT).read_bytes())
    assert list((built / "build/.scratch").iterdir()) == []


# From here on: what a reader sees.


def test_edges_pass_behind_no_box() -> None:
    dependencies = {
        "weights": set(), "reference": {"weights"}, "torchscript": {"weights"}, "onnx": {"torchscript"},
        "labels": set(), "measure": {"torchscript", "reference", "weights"}, "config": {"torchscript", "labels"},
        "measure_onnx": {"onnx", "reference"}, "config_onnx": {"onnx", "labels"}, "publish": {"measure", "config"},
        "publish_onnx": {"measure_onnx", "config_onnx", "labels"},
    }  # fmt: skip
    shared = dict.fromkeys(("weights", "labels", "reference"), "")
    bands = {name: shared.get(name, "onnx" if "onnx" in name else "torchscript") for name in dependencies}
    graph = charts.task_graph(dependencies, bands)
    boxes = {box.name: box for box in graph.boxes}
    assert all(boxes[source].x < boxes[name].x for name, sources in dependencies.items() for source in sources)
    assert len({(box.x, box.y) for box in graph.boxes}) == len(dependencies)
    assert len(graph.edges) == sum(map(len, dependencies.values())) - 2  # two follow from others
    for edge in graph.edges:
        x1, y1, left, *_, right, y2, x2 = map(int, re.findall(r"\d+", edge))
        for box in graph.boxes:
            for start, end, y in ((x1, left, y1), (right, x2, y2)):
                inside = box.y <= y <= box.y + charts.BOX_HEIGHT
                assert not (inside and start < box.x + charts.BOX_WIDTH and box.x < end), edge


def test_every_sample_is_in_a_bar_of_a_histogram() -> None:
    errors = [0.0, 1e-12, 3e-7, 3.1e-7, 2e-3]
    chart = charts.histogram(errors, 1e-2, [*errors, 1e-2])
    assert [bar.label.split()[0] for bar in chart.bars] == ["2", "2", "1"]
    assert all(0 <= bar.x < bar.x + bar.width <= chart.width for bar in chart.bars)
    assert chart.bars[-1].x < chart.limit


def test_a_layer_without_a_number_is_drawn_at_the_top() -> None:
    layers = [
        {"node": "b", "operator": "Exp", "place": 2, "error": None},
        {"node": "a", "operator": "Conv", "place": 1, "error": 1e-4},
    ]
    first, second = charts.curve(layers, "a").points
    assert (first.kind, second.kind) == ("jump", "not-finite")
    assert second.y < first.y
    assert "NaN or infinity" in second.label


@pytest.fixture(scope="module")
def hostile(built_tiny: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of the hard cases: names that are HTML, a spec that was edited, a model that is not built."""
    project = built_tiny.copy(tmp_path_factory.mktemp("hostile") / "project")
    samples = project / "models/tiny/samples"
    samples.mkdir()
    for index, path in enumerate(sorted((ROOT / "build_tasks/verification/photographs").glob("*.jpg"))):
        shutil.copy(path, samples / f"<img src=x onerror=alert({index})>&.jpg")
    labels = project / "models/tiny/labels.txt"
    labels.write_text("".join(f"{HOSTILE} {index}\n" for index in range(1000)))
    project.edit("models/tiny/model.toml", "[accuracy]", '[accuracy]\nsamples = "samples"')
    project.built()
    project.model("other", OTHER)
    project.edit("models/tiny/model.toml", "max_batch_size = 4", "max_batch_size = 3")
    project.built("report")
    return project / PAGE


def test_names_are_text_and_nothing_comes_from_elsewhere(hostile: Path) -> None:
    html = hostile.read_text()
    page = PageText(html)
    assert HOSTILE in page.text
    assert "<img src=x onerror=alert(3)>&.jpg" in page.text
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object", "base"} & set(tags)
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "action"):
            own = ("#", "data:image/webp", "../model_repository/")
            assert (attributes.get(name) or "#").startswith(own), attributes
    assert not re.search(r"url\(|@import", html)
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


needs_browser = pytest.mark.skipif(
    not (browser.CHROMIUM and browser.CHROMEDRIVER),
    reason="no Chromium here: apt-get install chromium chromium-driver",
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.chromium() as driver:
        yield driver


# Each text on the page with its color, the color behind it, and the contrast of the two.
# Source: WCAG 2.2, success criterion 1.4.3, and "relative luminance" there.
CONTRASTS = """
const parsed = color => (color.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const luminance = color => parsed(color).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const opaque = color => parsed(color).length < 4 || parsed(color)[3] === 1;
const ground = element => {
    for (let one = element; one && element.ownerSVGElement; one = one.previousElementSibling)
        if (one.matches("rect.box, rect.band")) return getComputedStyle(one).fill;
    for (let one = element; one; one = one.parentElement) {
        const color = getComputedStyle(one).backgroundColor;
        if (opaque(color)) return color;
    }
};
const contrasts = [];
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || element.matches("title, style")) continue;
    const style = getComputedStyle(element);
    const pair = [element.ownerSVGElement ? style.fill : style.color, ground(element)];
    const [low, high] = pair.map(luminance).sort((a, b) => a - b);
    contrasts.push([(high + 0.05) / (low + 0.05), texts.currentNode.data.trim(), ...pair]);
}
return contrasts;
"""

# Elements that a screen reader cannot handle.
MISTAKES = """
const all = selector => [...document.querySelectorAll(selector)];
const level = element => Number(element.tagName[1]);
const headings = all("h1, h2, h3, h4");
return [
    ...all("html:not([lang]), img:not([alt]), thead th:not([scope]), tbody th:not([scope])"),
    ...all("[tabindex='0']:not(pre):not([aria-label])"),
    ...all("svg:not([aria-label])"),
    ...all("[id]").filter(e => all(`[id="${e.id}"]`).length > 1),
    ...all("a[href^='#']").filter(e => !document.getElementById(e.getAttribute("href").slice(1))),
    ...all("[aria-labelledby]").filter(e => !document.getElementById(e.getAttribute("aria-labelledby"))),
    ...headings.filter((e, i) => i && level(e) > level(headings[i - 1]) + 1),
    ...all("h1").slice(1),
].map(e => e.outerHTML.slice(0, 120));
"""


@needs_browser
@pytest.mark.parametrize("scheme", browser.SCHEMES)
@pytest.mark.parametrize("width", [400, 1600])
def test_a_reader_sees_all_of_it(hostile: Path, chromium: Any, scheme: str, width: int) -> None:
    browser.open_page(chromium, hostile, scheme, width)
    assert browser.console_messages(chromium) == []
    assert browser.requests(chromium) == [hostile.absolute().as_uri()]
    assert chromium.title.endswith("report")
    chromium.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert chromium.execute_script("return document.documentElement.scrollWidth") == width
    assert chromium.execute_script("return [...document.images].every(one => one.naturalWidth > 0)")
    contrasts = chromium.execute_script(CONTRASTS)
    assert len(contrasts) > 200
    assert [row for row in contrasts if row[0] < 4.5] == []
    assert chromium.execute_script(MISTAKES) == []


# Lines and borders that carry a meaning, with the color behind them.
# Source: WCAG 2.2, success criterion 1.4.11.
LINES = (
    CONTRASTS.partition("const contrasts")[0]
    + """
const band = getComputedStyle(document.querySelector("rect.band")).fill;
const lines = "svg .edge, svg .axis, svg .limit, svg .box, svg .line, td, .panel";
return [...document.querySelectorAll(lines)].map(element => {
    const style = getComputedStyle(element);
    const color = element.ownerSVGElement ? style.stroke : style.borderBottomColor;
    const drawn = element.ownerSVGElement || parseFloat(style.borderBottomWidth);
    const behind = element.matches(".edge, .box") ? band : ground(element);
    const [low, high] = [color, behind].map(luminance).sort((a, b) => a - b);
    return [drawn ? (high + 0.05) / (low + 0.05) : 21, element.outerHTML.slice(0, 80), color, behind];
});
"""
)

# The labels of boxes that are wider than their box.
CLIPPED = """
const end = element => element.getBBox().x + element.getBBox().width;
return [...document.querySelectorAll("svg g")]
    .filter(group => [...group.querySelectorAll("text")].some(text => end(text) > end(group.querySelector("rect"))))
    .map(group => group.textContent);
"""


@needs_browser
@pytest.mark.parametrize("scheme", browser.SCHEMES)
def test_lines_and_labels_can_be_seen(hostile: Path, chromium: Any, scheme: str) -> None:
    browser.open_page(chromium, hostile, scheme, 1600)
    lines = chromium.execute_script(LINES)
    assert len(lines) > 100
    assert [row for row in lines if row[0] < 3] == []
    assert chromium.execute_script(CLIPPED) == []


@needs_browser
def test_state_and_accuracy_stand_in_the_first_screen_of_a_phone(hostile: Path, chromium: Any) -> None:
    browser.open_page(chromium, hostile, "light", 390, 844)
    ends = """return [...document.querySelectorAll(".models tr:has(.figures) .state")]
        .map(element => element.getBoundingClientRect()).map(box => [box.right, box.bottom])"""
    assert len(chromium.execute_script(ends)) == 4  # two models with an artifact that was measured
    assert all(right <= 390 and bottom <= 844 for right, bottom in chromium.execute_script(ends))


PAPER_WIDTH = 718  # pixels of CSS: A4 without the margins of Chromium

CUT = """
const right = document.documentElement.clientWidth;
return [...document.querySelectorAll("td, th, p, li, pre, svg, .state, h1, h2, h3")]
    .filter(e => e.getBoundingClientRect().right > right + 1).map(e => e.outerHTML.slice(0, 120));
"""


@needs_browser
def test_paper_is_light_and_shows_all_of_it(hostile: Path, chromium: Any) -> None:
    browser.open_page(chromium, hostile, "dark", PAPER_WIDTH, media="print")
    assert chromium.execute_script(CUT) == []
    assert [row for row in chromium.execute_script(CONTRASTS) if row[0] < 4.5] == []
    ground = chromium.execute_script("return getComputedStyle(document.querySelector('.panel')).backgroundColor")
    assert ground == "rgb(255, 255, 255)"
    closed = "return [...document.querySelectorAll('details:not([open]) > :not(summary)')].map(e => e.offsetHeight)"
    assert all(chromium.execute_script(closed)), "what is folded on the screen is printed"


# The element that has the focus: whether the reader sees it, and where it is.
FOCUSED = """
const element = document.activeElement, style = getComputedStyle(element), box = element.getBoundingClientRect();
return [element.outerHTML.slice(0, 120), style.outlineStyle === "solid" && parseFloat(style.outlineWidth) >= 2
    && box.bottom > 0 && box.top < innerHeight];
"""
WIDE = (
    "[...document.querySelectorAll('.scroll, pre')].filter(e => e.checkVisibility() && e.scrollWidth > e.clientWidth)"
)


@needs_browser
@pytest.mark.parametrize("width", [400, 1600])
def test_the_keyboard_reaches_and_scrolls_all_of_it(hostile: Path, chromium: Any, width: int) -> None:
    browser.open_page(chromium, hostile, "light", width)
    stops = chromium.execute_script("return document.querySelectorAll('a[href], summary, [tabindex]').length")
    seen: list[str] = []
    while len(seen) <= stops:
        chromium.switch_to.active_element.send_keys(Keys.TAB)
        html, visible = chromium.execute_script(FOCUSED)
        if html.startswith("<body"):
            break
        assert visible, html
        seen.append(html)
        if html.startswith("<summary") and not chromium.execute_script("return document.activeElement.parentNode.open"):
            chromium.switch_to.active_element.send_keys(Keys.ENTER)
            assert chromium.execute_script("return document.activeElement.parentNode.open")
    assert len(seen) == stops
    assert chromium.execute_script(f"return {WIDE}.length") > (0 if width == 1600 else 5)
    for index in range(chromium.execute_script(f"return {WIDE}.length")):
        chromium.execute_script(f"{WIDE}[{index}].focus()")
        chromium.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    moved = f"return {WIDE}.map(e => e.scrollLeft)"
    WebDriverWait(chromium, 10).until(lambda driver: all(driver.execute_script(moved)))


@needs_browser
def test_light_and_dark_differ(hostile: Path, chromium: Any) -> None:
    brightness = {}
    for scheme in browser.SCHEMES:
        browser.open_page(chromium, hostile, scheme, 1280)
        brightness[scheme] = ImageStat.Stat(browser.screenshot(chromium, 1280, 900).convert("L")).mean[0]
    assert brightness["light"] > 200 > 60 > brightness["dark"]
