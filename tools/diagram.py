"""Draw nbs/images/method.png, the diagram of the method (Figure 2 of the paper in our own drawing): python
tools/diagram.py
"""

from pathlib import Path

import matplotlib

matplotlib.use('agg')
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, GREY, FROZEN, LEARNT, BACK = '#222222', '#9a9a9a', '#e4ecf5', '#ffe3c2', '#c8442b'


def box(ax, x, y, w, h, text, colour, size=12, dashed=False):
    "A rounded box around `text`; its middle is at (x, y)."
    style = dict(boxstyle='round,pad=0,rounding_size=.12', facecolor=colour, edgecolor=GREY if dashed else INK)
    ax.add_patch(
        FancyBboxPatch((x - w / 2, y - h / 2), w, h, linewidth=1.3, linestyle='--' if dashed else '-', **style)
    )
    ax.text(x, y, text, ha='center', va='center', fontsize=size, color=INK)


def arrow(ax, start, end, colour=INK, width=1.6, bend=0.0):
    "An arrow from `start` to `end`."
    shape = dict(arrowstyle='-|>', mutation_scale=15, shrinkA=0, shrinkB=0, connectionstyle=f'arc3,rad={bend}')
    ax.add_patch(FancyArrowPatch(start, end, color=colour, linewidth=width, **shape))


def forward_pass(ax, y=2.6):
    "Prompts and noise become latents in T steps, a frame, and a number."
    box(ax, 0.95, 4.15, 1.7, 0.75, 'prompts', '#f6f6f6')
    box(ax, 0.95, y, 1.7, 0.75, 'noise $x_T$', '#f6f6f6')
    steps = [(2.75, 'step', True), (4.15, 'step', True), (5.75, 'step', False), (7.15, 'step', False)]
    for x, text, dashed in steps:
        box(ax, x, y, 1.05, 1.05, 'denoiser\n+ LoRA', '#f2f2f2' if dashed else LEARNT, 10, dashed)
        arrow(ax, (x, 4.15), (x, y + 0.54), GREY, 1.0)
    ax.plot([1.8, 7.15], [4.15, 4.15], color=GREY, linewidth=1.0)
    for start, end in [(1.8, 2.22), (3.28, 3.62), (6.28, 6.62), (7.68, 8.1), (9.5, 9.9), (11.1, 11.5)]:
        arrow(ax, (start, y), (end, y))
    ax.text(4.95, y, '...', ha='center', va='center', fontsize=16)
    box(ax, 8.8, y, 1.4, 1.05, 'decoder\n(frozen)', FROZEN)
    box(ax, 10.5, y, 1.2, 1.05, 'one\nframe', '#f6f6f6')
    box(ax, 12.2, y, 1.4, 1.05, 'reward\n(frozen)', FROZEN)
    arrow(ax, (12.9, y), (13.3, y))
    ax.text(13.4, y, '$R$', ha='left', va='center', fontsize=18, color=INK)


def braces(ax, y=4.32):
    "Which steps carry a gradient."
    ax.text(3.45, y, '$T - K$ steps without a graph', ha='center', fontsize=11, color='#666666')
    ax.text(6.45, y, 'the last $K$ steps', ha='center', fontsize=11, color=BACK)


def backward_pass(ax, y=1.25):
    "The way back, from the reward to the LoRA weights."
    ax.plot([13.55, 13.55, 5.75], [2.25, y, y], color=BACK, linewidth=2.2, solid_joinstyle='round')
    for x in (12.2, 8.8):
        arrow(ax, (x + 0.9, y), (x - 0.3, y), BACK, 2.2)
    for x in (7.15, 5.75):
        arrow(ax, (x, y), (x, 2.05), BACK, 2.2)
    text = r'backward: $\nabla_\theta R$ goes through reward, decoder and $K$ steps into the LoRA weights $\theta$'
    ax.text(9.6, y - 0.42, text, ha='center', fontsize=12, color=BACK)
    ax.text(3.4, y - 0.12, 'AdamW moves $\\theta$\nso that $R$ rises', ha='center', fontsize=12, color=BACK)
    arrow(ax, (5.6, y), (4.6, y), BACK, 2.2)


def diagram():
    "The whole figure."
    fig, ax = plt.subplots(figsize=(14, 4.4))
    ax.set(xlim=(0, 14), ylim=(0.4, 4.7))
    ax.axis('off')
    forward_pass(ax)
    braces(ax)
    backward_pass(ax)
    fig.subplots_adjust(0, 0, 1, 1)
    return fig


if __name__ == '__main__':
    path = Path(__file__).resolve().parent.parent / 'nbs/images/method.png'
    diagram().savefig(path, dpi=100, facecolor='white')
