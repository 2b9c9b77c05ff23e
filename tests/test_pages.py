"""The pages in a real browser: what a person sees, by mouse, keyboard and screen reader."""

import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from regraft.api import check
from regraft.delivery.findings import write_findings
from regraft.delivery.gate import Access, Limits
from regraft.delivery.report import write_report
from regraft.inputs import InputSpec
from regraft.models.backbone import Backbone
from regraft.models.classifier import Classifier
from test_report import HOSTILE, make_comparison, make_run
from test_serve import running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to look at pages with")

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
LOOKS = [(WIDE, "light"), (PHONE, "dark")]
NAMES = ("bacteria", "normal", "<img src=x onerror=alert(1)>")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback alone: the server under test."""
    real = socket.socket.connect

    def only_loopback(self: socket.socket, address: Any) -> None:
        assert address[0] == "127.0.0.1", f"a test tried to connect to {address}"
        real(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_loopback)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def look(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page that may load nothing from elsewhere, and must complain of nothing."""
    contexts: list[Any] = []
    complaints: list[str] = []
    foreign: list[str] = []

    def open_page(url: str, viewport: Any = WIDE, scheme: str = "light", **options: Any) -> Any:
        context = browser.new_context(viewport=viewport, color_scheme=scheme, **options)
        contexts.append(context)
        origin = url if url.startswith("file:") else url.split("/", 3)[2]

        def gate(route: Any) -> None:
            wanted = route.request.url
            if wanted.startswith(("data:", "blob:")) or origin in wanted:
                route.continue_()
            else:
                foreign.append(wanted)
                route.abort()

        context.route("**/*", gate)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"a dialog: {dialog.message}"))
        page.on("console", lambda told: complaints.extend([told.text] * ("olicy" in told.text)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert foreign == []


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two images and a text file."""
    folder = tmp_path_factory.mktemp("files")
    generator = np.random.default_rng(0)
    for number, name in enumerate(("chest.png", "knee.jpg")):
        side = 40 + 300 * number
        pixels = generator.integers(0, 256, (side, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return [folder / name for name in ("chest.png", "knee.jpg", "notes.txt")]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    inputs = InputSpec((32, 32), 3, mean=(0.5,) * 3, std=(0.25,) * 3)
    network = Classifier(Backbone.create("resnet10t", inputs, seed=1), NAMES)
    with torch.no_grad():
        network.head.weight.mul_(20)
    folder = tmp_path_factory.mktemp("models") / "knees"
    network.save(folder)
    return folder


@pytest.fixture(scope="module")
def url(classifier: Path) -> Iterator[str]:
    with running(classifier, limits=Limits()) as server:
        yield f"http://127.0.0.1:{server.port}/"


def serious_faults(page: Any) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{fault['id']}: {node['html'][:200]}"
        for fault in found
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


def test_two_images_and_a_text_file_give_two_results_and_one_clear_error(
    url: str, look: Callable[..., Any], files: list[Path]
) -> None:
    page = look(url)
    page.get_by_text("3 classes: bacteria, normal").wait_for()
    handle = page.evaluate_handle(
        """(named) => {
            const transfer = new DataTransfer();
            for (const [name, text] of named) {
                const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
                transfer.items.add(new File([bytes], name));
            }
            return transfer;
        }""",
        [[file.name, _base64(file)] for file in files],
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": handle})
    page.locator(".card:not(.waiting)").nth(2).wait_for()
    cards = page.locator(".card").all()
    assert [card.locator("h3").inner_text() for card in cards] == [file.name for file in files]
    for card in cards[:2]:
        shares = [float(text.split()[-2]) for text in card.locator(".classes li").all_inner_texts()]
        assert shares == sorted(shares, reverse=True)
        assert abs(sum(shares) - 100) < 0.2
        name = card.locator(".answer bdi").inner_text()
        assert name in NAMES
        assert card.locator("img").evaluate("image => image.naturalWidth") == 60
    told = cards[2].inner_text().split()
    assert " ".join(told) == "notes.txt No result not an image: a text file"
    page.get_by_role("status").get_by_text("3 done").wait_for(state="attached")
    assert "1 no result" in page.locator("#summary").inner_text()


def test_a_picture_shows_where_the_model_looked_when_asked(
    url: str, look: Callable[..., Any], files: list[Path]
) -> None:
    page = look(url)
    page.get_by_text("3 classes: bacteria, normal").wait_for()
    page.set_input_files("input[type=file]", files[:1])
    button = page.get_by_role("button", name="Show where it looked")
    button.click()
    overlay = page.locator(".picture.explained .overlay")
    overlay.wait_for()
    assert button.get_attribute("aria-pressed") == "true"
    assert overlay.get_attribute("alt") == "where the model looked in chest.png"
    assert overlay.evaluate("image => image.decode().then(() => image.naturalWidth)") == 32
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert serious_faults(page) == []


def _base64(file: Path) -> str:
    import base64

    return base64.b64encode(file.read_bytes()).decode("ascii")


def test_the_keyboard_alone_is_enough(
    url: str, look: Callable[..., Any], files: list[Path]
) -> None:
    page = look(url)
    # The browser gives choosers to a test that listens, and is told so by a message that nobody
    # waits for: of one that begins to listen with the key press, the key may come first.
    page.on("filechooser", lambda _: None)
    page.get_by_text("3 classes: bacteria, normal").wait_for()
    page.bring_to_front()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "files"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files(files[:1])
    page.locator(".card:not(.waiting)").wait_for()
    page.keyboard.press("Tab")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    lines = Path(download.value.path()).read_bytes().decode().split("\r\n")
    assert (
        lines[0]
        == '"file","predicted","p(bacteria)","p(normal)","p(<img src=x onerror=alert(1)>)","error"'
    )
    assert lines[1].startswith('"chest.png",')
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator(".card").wait_for(state="detached")
    assert page.evaluate("document.activeElement.id") == "files"


def test_the_saved_table_tells_what_is_unsure_and_unfamiliar(
    url: str, look: Callable[..., Any], files: list[Path]
) -> None:
    shares = {"bacteria": 0.1, "normal": 0.9}
    told = {"predicted": "normal", "probabilities": shares, "unsure": True, "unfamiliar": False}
    page = look(url)
    page.route("**/predict", lambda route: route.fulfill(json=told))
    page.set_input_files("#files", files[:1])
    page.locator(".card:not(.waiting)").wait_for()
    with page.expect_download() as download:
        page.locator("#save").click()
    head, row, _ = Path(download.value.path()).read_bytes().decode().split("\r\n")
    assert head == '"file","predicted","p(bacteria)","p(normal)","unsure","unfamiliar","error"'
    assert row == '"chest.png","normal",0.1,0.9,"true","false",""'


def test_the_token_is_asked_for_and_kept(
    classifier: Path, look: Callable[..., Any], files: list[Path]
) -> None:
    token = "a-token-of-some-length"
    with running(classifier, access=Access(token=token), limits=Limits()) as server:
        page = look(f"http://127.0.0.1:{server.port}/")
        page.get_by_label("This server asks for its token").fill("a-wrong-one")
        page.get_by_role("button", name="Use it").click()
        page.get_by_role("alert").get_by_text("That is not its token.").wait_for()
        assert serious_faults(page) == []
        page.locator("#secret").fill(token)
        page.get_by_role("button", name="Use it").click()
        page.locator("#token").wait_for(state="hidden")
        page.set_input_files("#files", files[:1])
        page.locator(".card:not(.waiting) .classes").wait_for()


@pytest.mark.parametrize(("viewport", "scheme"), LOOKS)
def test_the_page_has_no_serious_fault_and_fits(
    url: str, look: Callable[..., Any], files: list[Path], viewport: Any, scheme: str
) -> None:
    page = look(url, viewport, scheme)
    page.get_by_text("3 classes: bacteria, normal").wait_for()
    assert serious_faults(page) == []
    page.set_input_files("#files", files)
    page.locator(".card:not(.waiting)").nth(2).wait_for()
    assert serious_faults(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


@pytest.mark.parametrize(("viewport", "scheme"), LOOKS)
@pytest.mark.parametrize("kind", ["run", "comparison", "check"])
@pytest.mark.fault("L1", "L4")
def test_a_report_has_no_serious_fault_and_fits(
    look: Callable[..., Any],
    make_shapes: Callable[..., Path],
    tmp_path: Path,
    kind: str,
    viewport: Any,
    scheme: str,
) -> None:
    if kind == "run":
        out = write_report([make_run(tmp_path / "run", names=HOSTILE)], tmp_path / "report.html")
    elif kind == "comparison":
        out = write_report([make_comparison(tmp_path / "comparison")], tmp_path / "report.html")
    else:
        root = make_shapes(("a", "b"), 6, splits=("train", "test"))
        shutil.copy(next((root / "train/a").iterdir()), root / "test/b" / "copy.png")
        out = write_findings(check([root]), tmp_path / "check.html")
    page = look(out.as_uri(), viewport, scheme)
    assert serious_faults(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    if kind == "check":
        assert page.locator("img").first.evaluate("image => image.naturalWidth") > 0
        return
    coloured = page.locator("figure svg path").first.evaluate("one => getComputedStyle(one).stroke")
    assert coloured.startswith("rgb")
