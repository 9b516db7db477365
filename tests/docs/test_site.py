"""The site is built without a warning, and holds what it promises: every page, field, room and check."""

import dataclasses
import re
import typing
from pathlib import Path

import doctor
import fields
import method_figures
import pytest
from docstrings import as_rst
from pages import rewrite
from PIL import Image

import stare_jax
from stare_jax.runs.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
CLASSES = [section.cls for section in fields.merged(fields.sections(RunConfig, "config"))]


def test_it_is_built_without_a_warning_and_every_page_is_in_the_navigation(site):
    navigation = (site / "index.html").read_text("utf-8")
    for page in DOCS.glob("*.md"):
        assert (site / f"{page.stem}.html").is_file()
        assert page.stem == "index" or f'href="{page.stem}.html"' in navigation, page.name


def test_every_field_of_a_configuration_is_in_the_reference(site):
    page = (site / "configuration.html").read_text("utf-8")
    for cls in CLASSES:
        _, _, section = page.partition(f'<section id="{cls.__name__.lower()}">')
        section = section.partition("</section>")[0]
        for field in dataclasses.fields(cls):
            assert re.search(
                rf'<dt><code class="docutils literal notranslate"><span class="pre">{field.name}<', section
            )


def test_every_room_has_a_page_with_its_public_names(site):
    for room in stare_jax.__all__:
        page = (site / f"api/{room}.html").read_text("utf-8")
        for name in getattr(getattr(stare_jax, room), "__all__", ()):
            member = getattr(getattr(stare_jax, room), name)
            if callable(member) and (member.__doc__ or "").strip() and isinstance(member, type(lambda: 0) | type):
                assert f'id="stare_jax.{room}.{name}"' in page, f"{room}.{name}"


def test_the_method_is_shown_with_its_equations_and_plots(site):
    page = (site / "method.html").read_text("utf-8")
    assert page.count("<math ") > 20 and "\\tag" not in page
    assert re.findall(r'class="eqno">\((\d)\)', page) == ["3", "4", "1", "6", "2", "5"]
    for name in ("potentials", "margins", "ends"):
        assert (site / f"_images/{name}.png").is_file() and (site / f"_images/{name}_dark.png").is_file()


def test_links_out_of_the_pages_lead_to_copies(site):
    page = (site / "pods.html").read_text("utf-8")
    (copy,) = set(re.findall(r'href="(_downloads/[^"]*gke.yaml)"', page))
    assert (site / copy).read_bytes() == (ROOT / "launch/pod/gke.yaml").read_bytes()


def sizes(folder):
    """Returns name -> width and height of the pictures in a folder."""
    found = {}
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            found[path.name] = image.size
    return found


@pytest.mark.slow
def test_the_plots_of_the_method_are_what_its_script_draws(tmp_path):
    method_figures.main([f"--out={tmp_path}"])
    assert sizes(tmp_path) == sizes(DOCS / "method")


def test_troubleshooting_has_a_row_for_every_check_of_the_doctor():
    text = (DOCS / "troubleshooting.md").read_text("utf-8")
    table = text.partition("| check |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.M) == list(doctor.CHECKS)


def test_the_texts_below_fields_and_their_ranges_are_read():
    section = fields.Section(type(RunConfig.__dataclass_fields__["ppo"].default), ("config.ppo",))
    text = fields._markdown(section)
    assert "`clip_eps`: number > 0; default: `0.2`" in text
    assert "`num_steps`: whole number ≥ 1, or None; default: `None`\n: actions of a batch, whose last episodes" in text
    assert "`reward`: `'success'`, `'rl4vla'`, `'dense'`; default: `'success'`" in text
    assert "`gamma`: number ≥ 0 and ≤ 1; default: `0.99`\n: discount of rewards" in text


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_has_a_text_of_its_own_or_is_a_section(cls):
    is_section = {name for name, hint in typing.get_type_hints(cls).items() if fields._classes_in(hint)}
    assert {field.name for field in dataclasses.fields(cls)} - fields.field_texts(cls).keys() <= is_section


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["Returns `x` and |m_k|, 2 * x_."], [r"Returns ``x`` and \|m_k\|, 2 \* x\_."]),
        (["The `Batch`es."], [r"The ``Batch``\ es."]),
        ([], []),
        (
            ["A sum.", "", "    |a| + b", "", "Args:", "    x: y"],
            ["A sum.", "", "::", "", "    |a| + b", "", "Args:", "    x: y"],
        ),
    ],
)
def test_docstrings_are_text_and_not_markup(lines, expected):
    assert as_rst(lines) == expected


def test_a_page_that_no_list_names_is_in_the_navigation():
    class Environment:
        found_docs = {"index", "method", "news", "api/index"}

    class App:
        srcdir, env = str(DOCS), Environment()

    source = ["```{toctree}\nmethod\n```\n```{toctree}\n<!-- pages that no list names -->\n```\n"]
    rewrite(App(), "index", source)
    assert source == ["```{toctree}\nmethod\n```\n```{toctree}\nnews\n```\n"]
