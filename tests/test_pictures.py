"""Pictures of trees, stores and curves: markup that parses, and in which no text acts."""

import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sssd
from sssd.hardware import CostCurve
from sssd.pictures import charts, draw_curve, draw_tree, svg
from sssd.pictures.charts import Estimate

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = [
    "</text><script>alert(1)</script>",
    "\x00\x1b[31m",
    "\u202eabc",
    "\ud800",
    "a\nb",
    "\"'&<>",
    "日本" * 30,
]


def elements(picture, name, kind=None):
    found = ElementTree.fromstring(picture).iter(f"{SVG}{name}")
    return [item for item in found if kind is None or kind in item.get("class", "").split()]


@st.composite
def trees(draw):
    """Trees of up to 60 nodes, probabilities falling, sources at random; and a path from the root."""
    count = draw(st.integers(0, 60))
    parents = [draw(st.integers(-1, i - 1)) for i in range(count)]
    probs = sorted((draw(st.floats(0, 1, width=32)) for _ in range(count)), reverse=True)
    sources = [draw(st.integers(-1, len(sssd.SOURCES) - 1)) for _ in range(count)]
    tree = sssd.DraftTree(list(range(count)), parents, probs, sources)
    node = draw(st.integers(-1, count - 1))
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return tree, path[::-1]


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a machine that does other things too
@given(trees(), st.sampled_from(HOSTILE), st.integers(0, 60))
def test_a_tree_shows_its_nodes_whatever_they_say(drawn, text, most):
    tree, path = drawn
    picture = draw_tree(tree, lambda _: text, root=text, accepted=path, bonus=7, most=most)
    shown = {*range(min(most, len(tree))), *path}
    assert len(elements(picture, "g", "in")) == len(path)
    assert len(elements(picture, "g", "bonus")) == len(elements(picture, "g", "root")) == 1
    boxes = elements(picture, "rect", "box")
    assert len(boxes) == len(shown) + 2
    assert not elements(picture, "script")
    assert f"Draft tree of {len(tree)} nodes" in picture
    assert ("not drawn" in picture) == (len(shown) < len(tree))
    # no box lies on another
    places = [tuple(float(box.get(key)) for key in ("x", "y", "width", "height")) for box in boxes]
    for i, (x, y, width, _) in enumerate(places):
        for left, top, wide, _ in places[:i]:
            assert y != top or x >= left + wide or left >= x + width
    width, height = (float(ElementTree.fromstring(picture).get(key)) for key in ("width", "height"))
    assert all(x + wide <= width and y + tall <= height for x, y, wide, tall in places)


def test_what_is_more_probable_is_drawn_wider_and_sources_have_colours():
    tree = sssd.DraftTree([5, 6, 7], [-1, 0, -1], [0.6, 0.5, 0.3], [0, 2, -1])
    groups = [item for item in elements(draw_tree(tree), "g") if item.find(f"{SVG}path") is not None]
    widths = [float(item.find(f"{SVG}path").get("stroke-width")) for item in groups]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == 3
    assert [item.get("class") for item in groups] == ["s0", "s2", svg.source_class(-1)]
    said = [item.find(f"{SVG}title").text for item in groups]
    assert said[1] == "node 1: token 6, probability 0.500, from datastore"
    assert {"request", "datastore", "no source"} <= {item.text for item in elements(draw_tree(tree), "text")}
    assert len({*svg.PALETTE, svg.UNKNOWN}) > len(sssd.SOURCES), "each source has a colour of its own"


def test_nothing_was_drafted():
    picture = draw_tree(sssd.Drafter().begin([1]).draft(0), bonus=3)
    assert "0.00 expected" in picture
    assert "-0.00" not in picture


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_do_nothing(text):
    shown = svg.escaped(text)
    assert svg.plain(text).isprintable()
    assert ElementTree.fromstring(f'<a b="{shown}">{shown}</a>').text == svg.plain(text)


def test_notebooks_show_trees_stores_and_curves(tmp_path):
    path = tmp_path / "<b>.sssd"
    with sssd.DatastoreBuilder(path, vocab_size=100) as builder:
        builder.add([1, 2, 3])
    store = sssd.Datastore.open(path)
    assert "&lt;b&gt;.sssd</td><td>3</td>" in store._repr_html_()
    store.close()
    assert "closed" in store._repr_html_()
    tree = sssd.DraftTree([5], [-1], [0.5])
    assert draw_tree(tree) in tree._repr_html_()
    curve = CostCurve.load("h100-llama-3-8b-roofline")
    assert "roofline, not measured" in curve._repr_html_()
    assert len(elements(draw_curve(curve), "path", "line")) == len(elements(draw_curve(curve), "circle")) > 1
    assert draw_curve(curve).count("<style>") == 1


def test_nothing_of_pictures_is_imported_before_it_is_wanted():
    code = "import sys, sssd; assert not [name for name in sys.modules if name.startswith('sssd.pictures')]"
    subprocess.run([sys.executable, "-c", code], check=True)


@given(st.lists(st.tuples(st.floats(0.01, 1e4), st.floats(0, 10)), min_size=1, max_size=8), st.booleans())
def test_charts_place_figures_in_their_order(values, log):
    groups = [("<a>", [Estimate("one", value, value / 2, value + more)]) for value, more in values]
    picture = charts.intervals("title", "axis", groups, log=log)
    dots = [float(dot.get("cx")) for dot in elements(picture, "circle")][1:]
    order = np.argsort([value for value, _ in values], kind="stable")
    assert (np.diff(np.array(dots)[order]) >= 0).all()
    assert all(0 <= x <= charts.WIDTH for x in dots)
    assert "&lt;a&gt;" in picture


def test_shares_fill_the_bar():
    picture = charts.shares("title", [("16 nodes", [(0, 30), (2, 10)]), ("none", [])])
    widths = [float(bar.get("width")) for bar in elements(picture, "rect")]
    assert widths[0] == pytest.approx(3 * widths[1])
    assert re.search(r"request 30 of 40 \(75.0 %\)", picture)


def test_reliability_puts_what_comes_true_on_the_diagonal():
    picture = charts.reliability("title", [("x", [(0.25, 0.25, 10), (0.5, 0.9, 1)])])
    on, above = elements(picture, "circle")[1:]
    left, bottom = 52, 360
    assert float(on.get("cx")) - left == pytest.approx(bottom - float(on.get("cy")))
    assert bottom - float(above.get("cy")) > float(above.get("cx")) - left
    assert float(on.get("r")) > float(above.get("r"))
