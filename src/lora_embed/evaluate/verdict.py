"""What an evaluation says in short: whether a merge beats its base, what it loses to each adapter, and what is uncertain."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lora_embed.evaluate.records import HEADLINE, Candidate, Difference, Evaluation, Figure
from lora_embed.text import agree, number_of

METRIC_NAMES = {
    "knn": "kNN accuracy",
    "probe": "linear probe",
    "recall@1": "recall@1",
    "recall@5": "recall@5",
    "map": "mean average precision",
    "nmi": "clusters (NMI)",
}
FEW_QUERIES = 30  # of a task or a class: with fewer, one image changes a figure by more than three points
MOST_MERGES = 4  # that are said in words


@dataclass(frozen=True)
class Sentence:
    """Text in which `{}` stands for each of the names, which a page keeps apart from the direction of the text around."""

    words: str
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.words.format(*self.names)

    @property
    def pieces(self) -> list[tuple[str, str]]:
        """Each piece of the text with the name that follows it, or with nothing."""
        return list(zip(self.words.split("{}"), (*self.names, ""), strict=True))


def joined(separator: str, sentences: Iterable[Sentence]) -> Sentence:
    """Several sentences, or parts of one, as one."""
    listed = list(sentences)
    return Sentence(separator.join(part.words for part in listed), tuple(name for part in listed for name in part.names))


def default_reference(candidates: Sequence[Candidate]) -> str:
    """The candidate that others are compared with: the base alone if it is one of them, otherwise the first."""
    return next((candidate.name for candidate in candidates if not candidate.adapters), candidates[0].name)


def singles_of(candidates: Sequence[Candidate]) -> dict[str, str]:
    """Adapter → the candidate that is this adapter alone, at weight 1; of several, the one with the adapter's name."""
    singles: dict[str, str] = {}
    for candidate in candidates:
        if len(candidate.adapters) == 1 == sum(candidate.weights.values()):
            adapter = candidate.adapters[0]
            singles[adapter] = candidate.name if candidate.name == adapter else singles.get(adapter, candidate.name)
    return singles


def pairs_of(candidates: Sequence[Candidate], reference: str) -> list[tuple[str, str]]:
    """The pairs to compare: each candidate with the reference, and each merge with the base and with its single adapters."""
    bases = [candidate.name for candidate in candidates if not candidate.adapters]
    singles = singles_of(candidates)
    pairs = [(candidate.name, reference) for candidate in candidates if candidate.name != reference]
    for merge in candidates:
        if len(merge.adapters) > 1:
            others = [*bases, *(singles[adapter] for adapter in merge.adapters if adapter in singles)]
            pairs += [(merge.name, other) for other in others]
    return list(dict.fromkeys(pairs))


def called(evaluation: Evaluation, name: str) -> Sentence:
    """A candidate with what it is, so that an adapter and a task of one name are told apart."""
    candidate = next((known for known in evaluation.candidates if known.name == name), None)
    if candidate is None:
        return Sentence("{}", (name,))
    if not candidate.adapters:
        return Sentence("the base") if name == "base" else Sentence("the base {}", (name,))
    if len(candidate.adapters) > 1:
        return Sentence("merge {}", (name,))
    return Sentence("adapter {}" if name == candidate.adapters[0] else "encoder {}", (name,))


def headline_of(evaluation: Evaluation, task: str) -> str | None:
    """The metric that stands for a task: kNN accuracy if it was measured, else the first; None for a task without figures."""
    measured = [figure.metric for figure in evaluation.figures if figure.task == task]
    return HEADLINE if HEADLINE in measured else next(iter(measured), None)


def in_short(evaluation: Evaluation, own: Mapping[str, str] | None = None) -> list[Sentence]:
    """For each merge in plain words: is it better than the base, and what does it lose to each adapter on its task?

    `own`: task → its adapter. Without it, a task belongs to the adapters that have a head for it, else to the best at it.
    """
    metrics = {task.name: headline_of(evaluation, task.name) for task in evaluation.tasks}
    gaps = {
        (gap.task, gap.candidate, gap.reference): gap for gap in evaluation.differences if gap.metric == metrics.get(gap.task)
    }
    bases = [candidate.name for candidate in evaluation.candidates if not candidate.adapters]
    merges = [candidate for candidate in evaluation.candidates if len(candidate.adapters) > 1]
    sentences = []
    for merge in merges:
        adapters = list(own.items()) if own is not None else own_adapters(evaluation, merge)
        singles = singles_of(evaluation.candidates)
        to_base = [gaps.get((task, merge.name, base)) for task in metrics for base in bases]
        to_adapters = [gaps.get((task, merge.name, singles.get(adapter, ""))) for task, adapter in adapters]
        if any(to_base) or any(to_adapters):
            sentences.append(_sentence(evaluation, merge, list(filter(None, to_base)), list(filter(None, to_adapters))))
    if merges and not sentences:
        sentences = [Sentence("Whether merge {} beats the base is not known. Add the base and each adapter with --alone.",
                              (merge.name,)) for merge in merges]  # fmt: skip
    return sentences[:MOST_MERGES]


def own_adapters(evaluation: Evaluation, merge: Candidate) -> list[tuple[str, str]]:
    """Each task with the merge's adapters that have a head for it, or else with the one that is best at it alone."""
    singles = {adapter: name for adapter, name in singles_of(evaluation.candidates).items() if adapter in merge.adapters}
    own = []
    for task in evaluation.tasks:
        metric = headline_of(evaluation, task.name)
        means = {
            figure.candidate: figure.mean
            for figure in evaluation.figures
            if (figure.task, figure.metric) == (task.name, metric)
        }
        with_head = {head.adapter for head in evaluation.retention if head.task == task.name}
        known = [adapter for adapter, name in singles.items() if name in means]
        best = max(known, key=lambda adapter: means[singles[adapter]], default=None)
        own += [(task.name, adapter) for adapter in known if adapter in with_head or (not with_head and adapter == best)]
    return own


def _sentence(evaluation: Evaluation, merge: Candidate, to_base: list[Difference], to_adapters: list[Difference]) -> Sentence:
    name = called(evaluation, merge.name)
    if to_base:
        begin = joined(" ", [name, joined("; it ", [_against(evaluation, gap) for gap in to_base])])
    else:
        begin = Sentence(f"whether {name.words} beats the base is not known, since the base is no candidate", name.names)
    if to_adapters:
        losses = joined(
            "; ", [joined("", [Sentence("on task {} it ", (gap.task,)), _loss(evaluation, gap)]) for gap in to_adapters]
        )
    else:
        losses = Sentence("what it loses to its adapters is not known, since none of them alone is a candidate")
    metrics = tuple(dict.fromkeys(METRIC_NAMES.get(gap.metric, gap.metric) for gap in [*to_base, *to_adapters]))
    points = Sentence(f"points are of {', '.join('{}' for _ in metrics)}, with 95 % intervals.", metrics)
    return joined(". ", map(_capital, (begin, losses, points)))


def _against(evaluation: Evaluation, gap: Difference) -> Sentence:
    """What a merge is beside the base, after `it`."""
    base = called(evaluation, gap.reference)
    names = (*base.names, gap.task)
    if gap.verdict != "within noise":
        return Sentence(f"is {gap.verdict} than {base.words} on task {{}} by {unsigned(gap)}", names)
    if not gap.has_interval and not gap.mean:
        return Sentence(f"equals {base.words} on task {{}} in each split", names)
    how = "only within noise" if gap.has_interval else "by a figure without an interval"
    return Sentence(f"differs from {base.words} on task {{}} {how} ({signed(gap)})", names)


def _loss(evaluation: Evaluation, gap: Difference) -> Sentence:
    """What a merge loses to an adapter, after `it`."""
    adapter = called(evaluation, gap.reference)
    if gap.verdict == "worse":
        return Sentence(f"loses {unsigned(gap)} to {adapter.words}", adapter.names)
    if gap.verdict == "better":
        return Sentence(f"is better than {adapter.words} by {unsigned(gap)}", adapter.names)
    if not gap.has_interval and not gap.mean:
        return Sentence(f"equals {adapter.words} in each split", adapter.names)
    how = "differs only within noise" if gap.has_interval else "differs by a figure without an interval"
    return Sentence(f"{how} from {adapter.words} ({signed(gap)})", adapter.names)


def _capital(sentence: Sentence) -> Sentence:
    return Sentence(sentence.words[:1].upper() + sentence.words[1:], sentence.names)


def in_points(share: float) -> str:
    """A difference of shares in points, with its sign: `−0.4`."""
    return f"{round(100 * share, 1) + 0.0:+.1f}".replace("-", "−")  # + 0.0: there is no −0.0


def signed(gap: Difference) -> str:
    """A difference in points with its interval, such as `−0.4 points, −1.0 to +0.2`."""
    interval = f", {in_points(gap.low)} to {in_points(gap.high)}" if gap.has_interval else ""
    return f"{in_points(gap.mean)} points{interval}"


def unsigned(gap: Difference) -> str:
    """A gain or a loss in points with its interval, such as `3.8 points (0.4 to 7.2)`."""
    mean, *ends = (f"{100 * abs(value):.1f}" for value in (gap.mean, *sorted((gap.low, gap.high), key=abs)))
    return f"{mean} points ({ends[0]} to {ends[1]})"


def warnings_of(evaluation: Evaluation) -> list[Sentence]:
    """What must not be read as certain: tasks of few queries, and figures whose interval has no width."""
    warnings = []
    for task in evaluation.tasks:
        figures = [figure for figure in evaluation.figures if figure.task == task.name]
        queries, flat = queries_of(evaluation, task.images), [figure for figure in figures if not figure.has_interval]
        if figures and queries < FEW_QUERIES:
            warnings.append(
                Sentence(
                    f"On task {{}} a split has about {number_of(queries, 'query')}, fewer than {FEW_QUERIES}: one image "
                    f"changes a figure by {100 / max(queries, 1):.0f} points. "
                    "Label more images before you decide by these figures.",
                    (task.name,),
                )
            )
        if flat:
            warnings.append(_flat(task.name, flat, len(figures)))
    return warnings


def _flat(task: str, flat: Sequence[Figure], figures: int) -> Sentence:
    """The warning of figures without an interval."""
    return Sentence(
        f"On task {{}}, {len(flat):,} of {number_of(figures, 'figure')} {agree(len(flat), 'has', 'have')} no interval, because "
        "all splits or queries gave the same value. With few images that is chance, and no sign of certainty.",
        (task,),
    )


def queries_of(evaluation: Evaluation, images: int) -> int:
    """About how many of some images are queries in a split."""
    return round(images * (1 - evaluation.bank_share))
