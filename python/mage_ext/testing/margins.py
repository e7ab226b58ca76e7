"""How close the decisions of a generation were to others.

Two correct loops add up floats in another order, so a request may part from its twin where two tokens, two confidences
or two units are equal up to rounding. A test that compares tokens holds a difference against the request's margin: a
difference of a request whose decisions were all clear is an error of the loop.

Test: pytest tests/python/test_denoise.py
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mage_ext import sampling
from mage_ext.results import StepInfo

# Probabilities, entropies and relative masses that differ less may come out in either order.
CLOSE = 2e-5


class Margins:
    """Least margin per request of one generation.

    Use `recorded` around `generate` and give `callback` to it:

        with (margins := Margins()).recorded():
            results = generate(model, prompts, config, callback=margins.callback)
    """

    def __init__(self, then: Callable[[StepInfo], None] | None = None):
        self._least: dict[int, float] = defaultdict(lambda: float("inf"))
        self._outside = float("inf")  # of draws before the first block, whose request is not known
        self._gaps: Tensor | None = None
        self._rows: Tensor | None = None
        self._then = then

    def of(self, request: int) -> float:
        """Least margin of a request's decisions."""
        return min(self._least[request], self._outside)

    @contextlib.contextmanager
    def recorded(self) -> Iterator["Margins"]:
        """Watches `sampling.draw_tokens` and `sampling.decide` meanwhile."""
        draw_tokens, decide = sampling.draw_tokens, sampling.decide

        def watched_draw(logits, **arguments):
            if self._gaps is not None:  # a prefill's draw, or a commit's that no callback has claimed
                self._outside = min(self._outside, *self._gaps.tolist())
            self._gaps = _token_gaps(logits, arguments["mask_id"])
            return draw_tokens(logits, **arguments)

        def watched_decide(config, draws, open):
            decided = decide(config, draws, open)
            gaps = torch.full(open.shape, torch.inf)
            drawn = self._gaps  # of the open positions, or of all (strict)
            gaps[open] = drawn if len(drawn) != open.numel() else drawn.view(open.shape)[open]
            self._gaps = None
            rows = torch.where(decided, gaps, torch.inf).amin(-1)
            self._rows = torch.minimum(rows, _decision_gaps(config, draws, open, decided))
            return decided

        sampling.draw_tokens, sampling.decide = watched_draw, watched_decide
        try:
            yield self
        finally:
            sampling.draw_tokens, sampling.decide = draw_tokens, decide

    def callback(self, info: StepInfo) -> None:
        """Assigns what was watched in a forward to its requests."""
        rows = [torch.full((len(info.requests),), torch.inf)]
        if info.kind == "commit" and self._gaps is not None:
            rows.append(self._gaps)
            self._gaps = None
        if info.kind != "commit" and self._rows is not None:
            rows.append(self._rows)
        if info.mass is not None or info.candidates is not None:
            rows.append(_selection_gaps(info))
        for request, margin in zip(info.requests, torch.stack(rows).amin(0).tolist(), strict=True):
            self._least[request] = min(self._least[request], margin)
        if self._then is not None:
            self._then(info)


def _token_gaps(logits: Tensor, mask_id: int) -> Tensor:
    """[N]: difference of the two largest probabilities of logits [N, V]."""
    logits = logits.detach().float().clone()
    logits[:, mask_id] = -torch.inf
    top = torch.softmax(logits, -1).topk(2, -1).values
    return top[:, 0] - top[:, 1]


def _decision_gaps(config: sampling.SamplerConfig, draws: sampling.Draws, open: Tensor, decided: Tensor) -> Tensor:
    """[A]: how far the sampler's choice of positions was from another."""
    if config.name == "sequential":
        return torch.full(open.shape[:1], torch.inf)
    confidence = draws.confidence
    if config.name == "entropy_bounded":
        confidence = -draws.entropy
    least = torch.where(decided, confidence, torch.inf).amin(-1)
    most = torch.where(open & ~decided, confidence, -torch.inf).amax(-1)
    gaps = least - most  # order at the cut
    if config.name == "low_confidence_dynamic":
        gaps = torch.where(open, (confidence - config.threshold).abs(), torch.inf).amin(-1)
        alone = decided.sum(-1) == 1  # maybe by force: then the order counts too
        gaps = torch.where(alone, torch.minimum(gaps, least - most), gaps)
    if config.name == "entropy_bounded":
        ascending = torch.where(open, draws.entropy, torch.inf).sort(-1).values
        sums = ascending.cumsum(-1)
        bound = torch.where(sums.isfinite(), (sums - config.entropy_bound).abs(), torch.inf).amin(-1)
        gaps = torch.minimum(gaps, bound)
    return gaps.nan_to_num(nan=torch.inf, posinf=torch.inf)


def _selection_gaps(info: StepInfo) -> Tensor:
    """[A]: least relative difference of a listed unit's mass and that of a heavier-than-none unlisted one, over layers
    and heads; with candidates of both levels."""
    starts = torch.tensor(info.starts)[:, None, None]
    lists, candidates = info.selection, info.candidates
    if candidates is None:
        return _gaps(info.mass, lists.indices, starts // lists.g)
    unit = candidates.token_mass.shape[-1] // candidates.units.shape[-1]
    tokens = torch.arange(candidates.token_mass.shape[-1]) % unit + candidates.units.repeat_interleave(unit, -1) * unit
    size = candidates.unit_mass.shape[-1] * unit
    masses = torch.zeros(*tokens.shape[:-1], size + 1)
    masses.scatter_(-1, torch.where(tokens >= 0, tokens, size).long(), candidates.token_mass)
    first = _gaps(candidates.unit_mass, candidates.units, starts // unit)
    return torch.minimum(first, _gaps(masses[..., :-1], lists.indices, starts))


def _gaps(mass: Tensor, indices: Tensor, ends: Tensor) -> Tensor:
    """The same of one ranking: mass [L, A, Hkv, n], lists [L, A, Hkv, K] of those below ends [A, 1, 1]."""
    listed = torch.zeros(*mass.shape[:-1], mass.shape[-1] + 1, dtype=torch.bool)
    listed.scatter_(-1, torch.where(indices >= 0, indices, mass.shape[-1]).long(), True)
    listed = listed[..., :-1]
    eligible = torch.arange(mass.shape[-1]) < ends
    least = torch.where(listed, mass, torch.inf).amin(-1)
    most = torch.where(eligible & ~listed, mass, 0.0).amax(-1)
    gaps = (least - most).abs() / least.clamp(min=1e-30)
    return torch.where(gaps.isfinite(), gaps, torch.inf).amin((0, 2))
