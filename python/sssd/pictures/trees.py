"""A draft tree as a picture."""

from collections.abc import Callable, Sequence

from sssd._core import DraftTree
from sssd.pictures.svg import (
    CHARACTER,
    columns,
    escaped,
    legend,
    picture,
    plain,
    short,
    source_class,
    source_name,
)

_ROW, _GAP, _MARGIN, _LABEL = 26, 34, 8, 18

Decode = Callable[[list[int]], str]


def draw_tree(
    tree: DraftTree,
    decode: Decode | None = None,
    *,
    root: str = "root",
    accepted: Sequence[int] = (),
    bonus: int | None = None,
    most: int = 64,
    styled: bool = True,
) -> str:
    """Draws a draft tree from left to right: sources by colour, probabilities by width.

    Args:
        tree: The tree.
        decode: Turns a list of token ids into text (such as ``tokenizer.decode``); ids are shown without it.
        root: What to call the root, which is no node.
        accepted: Nodes of the accepted path, as ``DraftTree.accept`` gives them; drawn filled.
        bonus: The target's own token after the accepted path; drawn with a dashed border.
        most: Nodes to draw, the most probable ones; those accepted are always drawn.
        styled: Whether the picture carries its style; False in a page that has ``sssd.pictures.svg.STYLE``.

    Returns:
        The picture, as SVG that can stand in a page or a file. Texts are escaped.
    """
    path = [int(node) for node in accepted]
    shown = sorted({*range(min(len(tree), most)), *path})
    tokens, parents, probs, sources = (
        array.tolist() for array in (tree.token_ids, tree.parents, tree.probs, tree.sources)
    )
    last = path[-1] if path else -1
    children = _children(shown, parents, path, last if bonus is not None else None)
    rows, depths, height = _places(children)
    labels = {-1: short(plain(root), _LABEL)}
    for node in (node for node in rows if node != -1):
        token = bonus if node == _BONUS else tokens[node]
        assert token is not None
        labels[node] = short(plain(decode([token])) if decode else str(token), _LABEL)
    lefts = _columns(labels, depths)
    parts = []
    for node, row in rows.items():
        y = _MARGIN + row * _ROW + _ROW / 2
        x, wide = lefts[depths[node]], _width(labels[node])
        if node == -1:
            parts.append(_box("root", x, y, wide, labels[node], "", "the last token of the sequence"))
            continue
        parent = last if node == _BONUS else parents[node]
        start, above = (
            lefts[depths[parent]] + _width(labels[parent]),
            _MARGIN + rows[parent] * _ROW + _ROW / 2,
        )
        if node == _BONUS:
            kind, beside, said, thick = "bonus s8", "", f"the target's own token {bonus}", 1.5
        else:
            source, prob = sources[node], probs[node]
            kind = source_class(source) + (" in" if node in path else "")
            beside, thick = f"{prob:.2f}", 1 + 7 * prob
            said = f"node {node}: token {tokens[node]}, probability {prob:.3f}, from {source_name(source)}"
        middle = (start + x) / 2
        curve = f"M{start:.0f} {above:.0f}C{middle:.0f} {above:.0f} {middle:.0f} {y:.0f} {x:.0f} {y:.0f}"
        edge = f'<path class="edge" d="{curve}" stroke-width="{thick:.1f}" stroke-opacity=".6"/>'
        parts.append(_box(kind, x, y, wide, labels[node], beside, said, edge))
    present = [source for source in range(-1, 127) if any(sources[node] == source for node in shown)]
    bottom = _MARGIN + height * _ROW
    names, end = legend(present, _MARGIN, bottom + 18)
    title = _title(tree, len(shown))
    parts.append(f'{names}<text class="dim" x="{_MARGIN}" y="{bottom + 34}">{title}</text>')
    right = lefts[-1] if lefts else 0.0
    return picture(
        max(right, end, CHARACTER * len(title) * 0.9 + _MARGIN) + _MARGIN,
        bottom + 42,
        title,
        parts,
        styled=styled,
    )


_BONUS = -2
"""The place of the bonus token among nodes; -1 is the root."""


def _title(tree: DraftTree, shown: int) -> str:
    left_out = f", {len(tree) - shown} more nodes not drawn" if shown < len(tree) else ""
    expected = tree.expected_accepted + 0.0  # which makes no minus of an empty sum
    return f"Draft tree of {len(tree)} nodes, {expected:.2f} expected to be accepted{left_out}"


def _children(
    shown: list[int], parents: list[int], path: list[int], bonus_of: int | None
) -> dict[int, list[int]]:
    """The nodes shown below each, and the bonus token below one; those accepted first, along the top."""
    children: dict[int, list[int]] = {}
    for node in shown:
        children.setdefault(parents[node], []).append(node)
    if bonus_of is not None:
        children.setdefault(bonus_of, []).append(_BONUS)
    for siblings in children.values():
        siblings.sort(key=lambda node: node not in path)
    return children


def _places(children: dict[int, list[int]]) -> tuple[dict[int, int], dict[int, int], int]:
    """Row and depth of each node below the root, parents first, and the number of rows.

    A node stands beside its first child.
    """
    rows, depths, height = {}, {}, 0
    stack = [(-1, 0, False)]
    while stack:
        node, depth, below = stack.pop()
        height += below
        rows[node], depths[node] = height, depth
        for i, child in reversed(list(enumerate(children.get(node, ())))):
            stack.append((child, depth + 1, i > 0))
    return rows, depths, height + 1


def _columns(labels: dict[int, str], depths: dict[int, int]) -> list[float]:
    """Where each depth begins, and where all end."""
    lefts = [float(_MARGIN)]
    for depth in range(max(depths.values()) + 1):
        widest = max(_width(labels[node]) for node, found in depths.items() if found == depth)
        lefts.append(lefts[-1] + widest + CHARACTER * 4 + _GAP)
    lefts[-1] -= _GAP - _MARGIN
    return lefts


def _width(label: str) -> float:
    return CHARACTER * max(columns(label), 1) + 12


def _box(
    kind: str, x: float, y: float, wide: float, label: str, beside: str, said: str, edge: str = ""
) -> str:
    number = f'<text class="dim" x="{x + wide + 3:.0f}" y="{y - 4:.0f}">{beside}</text>' if beside else ""
    return (
        f'<g class="{kind}"><title>{escaped(said)}</title>{edge}<rect class="box" x="{x:.0f}" '
        f'y="{y - 10:.0f}" '
        f'width="{wide:.0f}" height="20" rx="5"/><text x="{x + 6:.0f}" y="{y + 4:.0f}" xml:space="preserve">'
        f"{escaped(label)}</text>{number}</g>"
    )
