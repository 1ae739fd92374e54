"""Decide from the gates of a sample whether a new encoder is worth embedding all images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lora_embed.gates.checks import Comparison, Gate, Limits, comparison_gates
from lora_embed.text import rough_span


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When a new encoder is worth embedding all images.

    `skip_overlap`: if at least this share of neighbours (above chance) stays the same, the change is too small, unless
    labels show a gain of more than `skip_gain` plus two standard errors; None never skips. Measured overlaps: bfloat16 in
    place of float32 0.987, adapters with a tenth of noise 0.96, one merge with other random masks 0.79.
    """

    skip_overlap: float | None = 0.98
    skip_gain: float = 0.0
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether to embed all images with a new encoder, and a sentence that says why."""

    action: Literal["go on", "skip", "ask"]
    says: str


def re_embed_decision(compared: Comparison | None, policy: Policy, hours: float, extra: Sequence[Gate] = ()) -> Decision:
    """Decide from a sample: "ask" if a gate fails, "skip" if too little changes, else "go on".

    `hours` is the time that all other images would take; `extra` are further gates of the sample (`health_gates`,
    `processor`), and the only ones if the sample is too small to compare.
    """
    cost = rough_span(hours * 3600) if hours * 3600 >= 90 else "about 1 minute"
    gates = [*extra, *(comparison_gates(compared, policy.limits) if compared is not None else [])]
    if failed := [gate for gate in gates if not gate.holds]:
        reasons = "; ".join(f"{gate.name}: {gate.says}" for gate in failed)
        return Decision(action="ask", says=f"{reasons}. A person must decide: the rest takes {cost}.")
    if compared is None:
        return Decision(action="go on", says=f"too few images to compare; embedding them anew takes {cost}")
    kept = f"{compared.overlap:.1%} of neighbours stay the same"
    accuracy = compared.accuracy
    gains = accuracy is not None and accuracy.change > policy.skip_gain + 2 * accuracy.error
    if policy.skip_overlap is not None and compared.overlap >= policy.skip_overlap and not gains:
        threshold = f"the change is below your threshold: {kept}, and reembed.skip_overlap is {policy.skip_overlap:.1%}"
        return Decision(action="skip", says=f"{threshold}; embedding all images anew would have taken {cost}")
    return Decision(action="go on", says=f"{kept}; embedding all images anew takes {cost}")
