"""Plots of the demo: what every layer keeps and loses at each density."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hashattention.evaluation.demo import Setting
from hashattention.report.table import density_text

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif"
#: One hue for both colour schemes; the densest setting is drawn strongest.
ACCENT = "20,140,126"
#: Told apart without colour.
DASHES = ("solid", "6px,3px", "2px,3px")
#: Readable on white and on near-black.
QUIET = "rgba(128,134,139,{})"


def by_layer(settings: Sequence[Setting], field: str, percent: bool = False) -> Any:
    """A line for each density: `field` ("mass" or "error") of `Setting` by layer, as a plotly figure."""
    import plotly.graph_objects as go

    sparse = [setting for setting in settings if setting.density is not None]
    figure = go.Figure()
    for rank, setting in enumerate(sparse):
        values = getattr(setting, field)
        strength = 1 - 0.4 * rank / max(1, len(sparse) - 1)
        text = density_text(setting.density or 0.0)
        figure.add_scatter(
            x=list(values),
            y=list(values.values()),
            name=text,
            mode="lines",
            line={"color": f"rgba({ACCENT},{strength:.2f})", "width": 2.2, "dash": DASHES[rank % len(DASHES)]},
            hovertemplate=f"layer %{{x}}, density {text}: %{{y:{'.1%' if percent else '.3f'}}}<extra></extra>",
        )
    small = {"font": {"size": 13}}
    figure.update_layout(
        height=300,
        margin={"l": 44, "r": 8, "t": 8, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 13, "color": QUIET.format(1)},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "title": {"text": "density  "} | small},
        hovermode="closest",
    )
    figure.update_xaxes(title={"text": "layer"} | small, showgrid=False, zeroline=False, fixedrange=True)
    figure.update_yaxes(rangemode="tozero", gridcolor=QUIET.format(0.22), zeroline=False, fixedrange=True)
    if percent:
        figure.update_yaxes(range=[0, 1.02], tickformat=".0%")
    return figure


def to_html(figure: Any) -> str:
    """The figure as a fragment that needs plotly.js on the page."""
    html: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
    )
    return html
