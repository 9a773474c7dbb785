"""Check that the texts of a figure lie within the picture and their axes, and do not overlap."""

from __future__ import annotations

from itertools import combinations

from matplotlib.axis import Axis
from matplotlib.text import Text

SLACK = 2.0  # pixels


def misplaced(figure):
    """Return a message for every text that is cut off, is longer than its side of the axes, or overlaps another text."""
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    beside = {label for axis in figure.findobj(Axis) for label in ticks(axis)}
    texts = [text for text in texts if text not in beside] + [label for axis in figure.findobj(Axis) for label in drawn(axis)]
    boxes = {text: text.get_window_extent() for text in texts}
    picture = figure.bbox.padded(SLACK)
    found = [f"{text.get_text()!r} is beyond the picture" for text, box in boxes.items() if not inside(box, picture)]
    for axes in figure.axes:
        described = [text for text in (*axes.texts, axes.xaxis.label, axes.yaxis.label, axes.title) if text in boxes]
        found += [f"{text.get_text()!r} is beyond its axes" for text in described if not fits(boxes[text], text, axes)]
    apart = {text: box.padded(-SLACK / 2) for text, box in boxes.items()}
    overlapping = [(a, b) for a, b in combinations(apart, 2) if apart[a].overlaps(apart[b])]
    return found + [f"{a.get_text()!r} is over {b.get_text()!r}" for a, b in overlapping]


def ticks(axis):
    """Return all tick labels of an axis, including labels out of view, which are not drawn."""
    return [label for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()) for label in (tick.label1, tick.label2)]


def drawn(axis):
    """Return the tick labels of an axis that are in view."""
    low, high = sorted(axis.get_view_interval())
    found = []
    for minor in (False, True):
        places, labels = axis.get_ticklocs(minor=minor), axis.get_ticklabels(minor=minor)
        found += [x for place, x in zip(places, labels, strict=False) if low <= place <= high and x.get_visible() and x.get_text().strip()]
    return found


def fits(box, text, axes):
    """Return whether a label is no longer than the side it lies along. Texts inside the axes must fit along both sides."""
    frame = axes.get_window_extent().padded(SLACK)
    along_x = frame.x0 <= box.x0 and box.x1 <= frame.x1
    along_y = frame.y0 <= box.y0 and box.y1 <= frame.y1
    if text in axes.texts:
        return along_x and along_y
    return along_x if text is not axes.yaxis.label else along_y or text.get_rotation() == 0


def inside(box, frame):
    """Return whether a box lies within another."""
    return frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
