"""Draws those pictures of the pages that follow from the code alone. Run by `make pictures`."""

from pathlib import Path

from sssd import DraftTree
from sssd.pictures import draw_tree

IMAGES = Path(__file__).resolve().parent.parent / "docs/images"
WORDS = ("", "the", "cat", "sat", "on", "mat", ".", "ran", "to", "a")


def step() -> str:
    """The tree of docs/step.md, on a ground of its own: an image knows nothing of the page's colours."""
    tree = DraftTree([3, 7, 4, 8, 1], [-1, -1, 0, 1, 2], [0.55, 0.3, 0.5, 0.2, 0.4], [0, 2, 0, 2, 0])
    picture = draw_tree(tree, lambda ids: WORDS[ids[0]], root="cat", accepted=[0, 2], bonus=9)
    ground = '<rect width="100%" height="100%" fill="#fff" rx="8"/>'
    return picture.replace("</style>", f"svg.sssd{{color:#1c2127}}</style>{ground}", 1) + "\n"


if __name__ == "__main__":
    (IMAGES / "step.svg").write_text(step(), encoding="utf-8")
